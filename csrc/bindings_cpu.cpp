#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/nm_select.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "C++ kernels for the CPU. Pointers are data_ptr() integers; sizes are the caller's word.";

    module.def(
        "nm_select",
        [](uintptr_t weight, int dtype_code, int64_t rows, int64_t columns, int group_size, int n,
           bool compliant, int score_kind, uintptr_t column_scale, uintptr_t row_term, uintptr_t column_term,
           uintptr_t matrix, uintptr_t values, uintptr_t bitmask, int threads) {
            const msp::NmSelect op = msp::nm_select_arguments(weight, dtype_code, rows, columns, group_size,
                                                              n, compliant, score_kind, column_scale,
                                                              row_term, column_term, matrix, values, bitmask);
            const msp::Isa isa = msp::isa();
            py::gil_scoped_release without_gil;
            return msp::nm_select(op, isa, threads);
        },
        "weight_ptr"_a, "dtype_code"_a, "rows"_a, "columns"_a, "group_size"_a, "n"_a, "compliant"_a,
        "score_kind"_a, "column_scale_ptr"_a, "row_term_ptr"_a, "column_term_ptr"_a, "matrix_ptr"_a,
        "values_ptr"_a, "bitmask_ptr"_a, "threads"_a,
        "Keep the n best of every group_size columns and pack them.\n\n"
        "dtype_code: 0 float32, 1 float16, 2 bfloat16. score_kind: 0 |w|; 1 |w| * s_j; 2 (|w| * (r_i + c_j)) "
        "* "
        "s_j; 3 (w * w) * F_ij; 4 the matrix itself. Vectors and matrix are fp32, 0 where unused; everything "
        "is "
        "contiguous. Fills values [rows, columns / group_size * n] and bitmask [rows, ceil(columns / 8)].\n\n"
        "Returns how many weights are not finite or have a score that is not; with any, what was kept of "
        "their "
        "groups is unspecified.");

    module.def(
        "isa", [] { return msp::isa_name(msp::isa()); },
        "The instruction set in use: avx512, avx2 or scalar; MSP_ISA forces one.");
    module.def("features", &msp::cpu_features, "The vector extensions of this CPU.");
}
