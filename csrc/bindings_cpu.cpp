#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/nm_keep.h"
#include "cpu/nm_linear.h"
#include "cpu/nm_rank.h"
#include "cpu/nm_select.h"
#include "cpu/obs_prune.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

msp::Packed packed_arguments(uintptr_t values, uintptr_t bitmask, int dtype_code, int64_t rows,
                             int64_t columns, int group_size, int n) {
    msp::require_format(dtype_code, rows, columns, group_size);
    msp::require(n >= 0 && n <= group_size,
                 "n " + std::to_string(n) + " is outside 0 ... " + std::to_string(group_size));
    const auto dtype = static_cast<msp::Dtype>(dtype_code);
    const bool any = rows > 0 && columns > 0;
    return {msp::elements(values, dtype, "values", any && n > 0),
            msp::pointer<uint8_t>(bitmask, "bitmask", any),
            dtype,
            rows,
            columns,
            group_size,
            n};
}

}  // namespace

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
        py::kw_only(), "weight_ptr"_a, "dtype_code"_a, "rows"_a, "columns"_a, "group_size"_a, "n"_a,
        "compliant"_a, "score_kind"_a, "column_scale_ptr"_a, "row_term_ptr"_a, "column_term_ptr"_a,
        "matrix_ptr"_a, "values_ptr"_a, "bitmask_ptr"_a, "threads"_a,
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
        "nm_rank",
        [](uintptr_t weight, int dtype_code, int64_t rows, int64_t columns, int group_size, int score_kind,
           uintptr_t column_scale, uintptr_t row_term, uintptr_t column_term, uintptr_t matrix,
           uintptr_t rank, int threads) {
            const msp::NmRank op{
                msp::scored_arguments(weight, dtype_code, rows, columns, group_size, score_kind, column_scale,
                                      row_term, column_term, matrix),
                msp::pointer<uint8_t>(rank, "rank", rows > 0 && columns > 0)};
            const msp::Isa isa = msp::isa();
            py::gil_scoped_release without_gil;
            return msp::nm_rank(op, isa, threads);
        },
        py::kw_only(), "weight_ptr"_a, "dtype_code"_a, "rows"_a, "columns"_a, "group_size"_a, "score_kind"_a,
        "column_scale_ptr"_a, "row_term_ptr"_a, "column_term_ptr"_a, "matrix_ptr"_a, "rank_ptr"_a,
        "threads"_a,
        "Fill rank [rows, columns] with how many of its group of group_size columns are better than each.\n\n"
        "Arguments and what is returned are as for nm_select.");

    module.def(
        "nm_keep",
        [](uintptr_t weight, uintptr_t rank, uintptr_t out, int dtype_code, int64_t count, int n,
           int threads) {
            const msp::Dtype dtype = msp::require_dtype(dtype_code);
            msp::require(count >= 0, "count " + std::to_string(count) + " is negative");
            msp::require(n >= 0, "n " + std::to_string(n) + " is negative");
            const msp::NmKeep op{msp::elements(weight, dtype, "weight", count > 0),
                                 msp::pointer<uint8_t>(rank, "rank", count > 0),
                                 msp::elements(out, dtype, "out", count > 0),
                                 dtype,
                                 count,
                                 n};
            const msp::Isa isa = msp::isa();
            py::gil_scoped_release without_gil;
            msp::nm_keep(op, isa, threads);
        },
        "weight_ptr"_a, "rank_ptr"_a, "out_ptr"_a, "dtype_code"_a, "count"_a, "n"_a, "threads"_a,
        "Fill out [count] with the weight where rank is below n and with zero elsewhere; dtype_code as for "
        "nm_select.");

    py::class_<msp::Packed>(
        module, "PackedRows", py::module_local(),
        "A weight [rows, columns] in packed form, of which exactly n bits are set in every group_size of the "
        "bitmask. It holds addresses, not tensors. dtype_code: 0 float32, 1 float16, 2 bfloat16.")
        .def(py::init(&packed_arguments), py::kw_only(), "values_ptr"_a, "bitmask_ptr"_a, "dtype_code"_a,
             "rows"_a, "columns"_a, "group_size"_a, "n"_a);

    module.def(
        "nm_linear",
        [](const msp::Packed& weight, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t tokens, int threads) {
            msp::require(tokens >= 0, std::to_string(tokens) + " tokens are a negative size");
            const msp::NmLinear op{
                weight, msp::elements(x, weight.dtype, "x", tokens > 0 && weight.columns > 0),
                msp::elements(bias, weight.dtype, "bias", false),
                msp::elements(y, weight.dtype, "y", tokens > 0 && weight.rows > 0), tokens};
            const msp::Isa isa = msp::isa();
            py::gil_scoped_release without_gil;
            msp::nm_linear(op, isa, threads);
        },
        "weight"_a, "x_ptr"_a, "bias_ptr"_a, "y_ptr"_a, "tokens"_a, "threads"_a,
        "y [tokens, rows] = x [tokens, columns] W^T + bias, summed in fp32.\n\n"
        "x, bias and y have the dtype of the weight. bias_ptr may be 0. Everything is contiguous.");

    module.def(
        "nm_unpack",
        [](const msp::Packed& weight, uintptr_t dense, int threads) {
            void* to = msp::elements(dense, weight.dtype, "dense", weight.rows > 0 && weight.columns > 0);
            const msp::Isa isa = msp::isa();
            py::gil_scoped_release without_gil;
            msp::nm_unpack(weight, to, isa, threads);
        },
        "weight"_a, "dense_ptr"_a, "threads"_a,
        "Fill dense [rows, columns] from the packed form, in its dtype.");

    module.def(
        "obs_prune",
        [](uintptr_t weight, uintptr_t factor, uintptr_t updated, uintptr_t kept, int64_t rows,
           int64_t columns, int group_size, int n, int threads) {
            msp::require_format(static_cast<int>(msp::Dtype::kFloat32), rows, columns, group_size);
            msp::require(n >= 0 && n <= group_size,
                         "n " + std::to_string(n) + " is outside 0 ... " + std::to_string(group_size));
            const bool any = rows > 0 && columns > 0;
            const msp::ObsPrune op{msp::pointer<const float>(weight, "weight", any),
                                   msp::pointer<const float>(factor, "factor", any),
                                   msp::pointer<float>(updated, "updated", any),
                                   msp::pointer<uint8_t>(kept, "kept", any),
                                   rows,
                                   columns,
                                   group_size,
                                   n};
            const msp::Isa isa = msp::isa();
            py::gil_scoped_release without_gil;
            msp::obs_prune(op, isa, threads);
        },
        py::kw_only(), "weight_ptr"_a, "factor_ptr"_a, "updated_ptr"_a, "kept_ptr"_a, "rows"_a, "columns"_a,
        "group_size"_a, "n"_a, "threads"_a,
        "Prune column by column, n kept of every group_size, the columns behind making up for each error.\n\n"
        "weight: fp32 [rows, columns]. factor: fp32 [columns, columns], the upper Cholesky factor of the "
        "inverse Hessian; what lies below its diagonal is not read. Fills updated, fp32 [rows, columns], "
        "zero "
        "where pruned, and kept [rows, columns], 0 or 1. Everything is contiguous.");

    module.def(
        "isa", [] { return msp::isa_name(msp::isa()); },
        "The instruction set in use: amx, avx512bf16, avx512, avx2 or scalar; MSP_ISA forces one.");
    module.def("features", &msp::cpu_features, "The vector extensions of this CPU.");
}
