#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bindings.h"
#include "cuda/obs_prune.h"

namespace py = pybind11;
using namespace py::literals;

namespace msp {
namespace {

void require_aligned(uintptr_t address, int64_t bytes, const char* name) {
    require(address % static_cast<uintptr_t>(bytes) == 0,
            std::string(name) + "_ptr is not a multiple of " + std::to_string(bytes));
}

ObsBlock obs_block_arguments(uintptr_t weight, uintptr_t factor, uintptr_t errors, uintptr_t kept,
                             int64_t rows, int64_t columns, int64_t start, int64_t width, int group_size,
                             int n) {
    require_format(0, rows, columns, group_size);
    require(n >= 0 && n <= group_size,
            "n " + std::to_string(n) + " is outside 0 ... " + std::to_string(group_size));
    require(width >= 0 && width <= kObsBlockColumns && width % group_size == 0,
            "width " + std::to_string(width) + " is not a multiple of " + std::to_string(group_size) +
                " up to " + std::to_string(kObsBlockColumns));
    require(start >= 0 && start % 4 == 0 && start <= columns - width,
            "columns " + std::to_string(start) + " ... " + std::to_string(start + width) +
                " are not all among " + std::to_string(columns) + ", from a multiple of 4 on");
    require_aligned(weight, 16, "weight");
    require_aligned(factor, 16, "factor");
    require_aligned(kept, 4, "kept");
    const bool any = rows > 0 && width > 0;
    return {pointer<float>(weight, "weight", any),
            pointer<uint8_t>(kept, "kept", any),
            pointer<float>(errors, "errors", any),
            pointer<const float>(factor, "factor", any),
            rows,
            columns,
            start,
            static_cast<int>(width),
            group_size,
            n};
}

}  // namespace

void bind_prune(py::module_& module) {
    module.def(
        "obs_prune_block",
        [](uintptr_t weight, uintptr_t factor, uintptr_t errors, uintptr_t kept, int64_t rows,
           int64_t columns, int64_t start, int64_t width, int group_size, int n, uintptr_t stream) {
            const ObsBlock op =
                obs_block_arguments(weight, factor, errors, kept, rows, columns, start, width, group_size, n);
            std::string error;
            {
                py::gil_scoped_release without_gil;
                error = obs_prune_block_cuda(op, reinterpret_cast<void*>(stream));
            }
            if (!error.empty()) throw std::runtime_error("obs_prune: " + error);
        },
        py::kw_only(), "weight_ptr"_a, "factor_ptr"_a, "errors_ptr"_a, "kept_ptr"_a, "rows"_a, "columns"_a,
        "start"_a, "width"_a, "group_size"_a, "n"_a, "stream"_a,
        "Sweep `width` columns of a weight from column `start` on, in order on a stream (a cudaStream_t as "
        "an "
        "integer, 0 for the default one) of the device that holds it.\n\n"
        "weight [rows, columns] fp32 is updated in those columns, kept [rows, columns] is filled there with "
        "1 or "
        "0; factor [columns, columns] fp32 upper; errors [width, rows] fp32 is filled: the columns behind "
        "lose "
        "errors^T factor[start : start + width, start + width :]. Returns before the work is done.");
    module.attr("obs_block_columns") = kObsBlockColumns;
}

}  // namespace msp
