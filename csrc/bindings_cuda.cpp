#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>

#include "bindings.h"
#include "cuda/nm_select.h"
#include "cuda/usable.h"

namespace py = pybind11;
using namespace py::literals;

namespace msp {
void bind_linear(py::module_& module);
void bind_prune(py::module_& module);
void bind_spmm(py::module_& module);
}  // namespace msp

PYBIND11_MODULE(_cuda, module) {
    module.doc() =
        "CUDA kernels. Pointers are data_ptr() integers of device memory; sizes are the caller's word.";

    module.def(
        "nm_select",
        [](uintptr_t weight, int dtype_code, int64_t rows, int64_t columns, int group_size, int n,
           bool compliant, int score_kind, uintptr_t column_scale, uintptr_t row_term, uintptr_t column_term,
           uintptr_t matrix, uintptr_t values, uintptr_t bitmask, uintptr_t wrong, uintptr_t stream) {
            const msp::NmSelect op = msp::nm_select_arguments(weight, dtype_code, rows, columns, group_size,
                                                              n, compliant, score_kind, column_scale,
                                                              row_term, column_term, matrix, values, bitmask);
            msp::require(bitmask % 4 == 0, "bitmask_ptr is not a multiple of 4");
            auto* flag = msp::pointer<int32_t>(wrong, "wrong", rows > 0 && columns > 0);
            std::string error;
            {
                py::gil_scoped_release without_gil;
                error = msp::nm_select_cuda(op, flag, reinterpret_cast<void*>(stream));
            }
            if (!error.empty()) throw std::runtime_error("nm_select: " + error);
        },
        py::kw_only(), "weight_ptr"_a, "dtype_code"_a, "rows"_a, "columns"_a, "group_size"_a, "n"_a,
        "compliant"_a, "score_kind"_a, "column_scale_ptr"_a, "row_term_ptr"_a, "column_term_ptr"_a,
        "matrix_ptr"_a, "values_ptr"_a, "bitmask_ptr"_a, "wrong_ptr"_a, "stream"_a,
        "Keep the n best of every group_size columns and pack them, in order on a stream (a cudaStream_t as "
        "an "
        "integer, 0 for the default one) of the device that holds the weight.\n\n"
        "Arguments as in msp._cpu.nm_select; returns before the work is done. wrong_ptr: an int32 on the "
        "device, set "
        "to 1 if a weight or a score is NaN or infinite.");

    msp::bind_linear(module);
    msp::bind_prune(module);
    msp::bind_spmm(module);

    module.def(
        "usable",
        [] {
            static const bool usable = msp::cuda_usable();
            return usable;
        },
        "Whether every device here can run the kernels, by its compute capability and its driver.");

    module.def(
        "archs",
        [] {
            std::vector<std::string> archs;
            std::istringstream list(MSP_CUDA_ARCHS);
            for (std::string arch; std::getline(list, arch, ',');) archs.push_back(arch);
            return archs;
        },
        "The targets it was built for; PTX of the last one serves newer GPUs.");
}
