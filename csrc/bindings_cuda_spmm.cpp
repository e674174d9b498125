// The bindings of nm_spmm: argument checks, then one call.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bindings.h"
#include "cuda/nm_spmm.h"

namespace py = pybind11;
using namespace py::literals;

namespace msp {
namespace {

void require_shape(int64_t rows, int64_t columns) {
    require(rows >= 0 && columns >= 0,
            "shape [" + std::to_string(rows) + ", " + std::to_string(columns) + "] has a negative size");
    require(rows <= INT32_MAX && columns <= INT32_MAX,
            "shape [" + std::to_string(rows) + ", " + std::to_string(columns) + "] is beyond 32 bits");
}

void require_16_bytes(uintptr_t address, const char* name) {
    require(address % 16 == 0, std::string(name) + "_ptr is not a multiple of 16");
}

template <class Call>
void run(const char* name, Call call) {
    std::string error;
    {
        py::gil_scoped_release without_gil;
        error = call();
    }
    if (!error.empty()) throw std::runtime_error(std::string(name) + ": " + error);
}

void pack(uintptr_t values, uintptr_t bitmask, uintptr_t fragments, int64_t rows, int64_t columns,
          int group_size, int n, uintptr_t stream) {
    require_format(static_cast<int>(Dtype::kBFloat16), rows, columns, group_size);
    require_shape(rows, columns);
    require(n >= 0 && 2 * n <= group_size, "n " + std::to_string(n) + " is outside 0 ... " +
                                               std::to_string(group_size / 2) +
                                               ", all that groups of 4 with 2 kept can hold");
    const bool any = rows > 0 && columns > 0;
    require_16_bytes(fragments, "fragments");
    const NmSpmmPack op{pointer<const uint16_t>(values, "values", any && n > 0),
                        pointer<const uint8_t>(bitmask, "bitmask", any),
                        pointer<void*>(fragments, "fragments", any),
                        rows,
                        columns,
                        group_size,
                        n};
    run("nm_spmm_pack", [&] { return nm_spmm_pack_cuda(op, reinterpret_cast<void*>(stream)); });
}

void multiply(uintptr_t x, uintptr_t fragments, uintptr_t bias, uintptr_t y, uintptr_t workspace,
              int dtype_code, int64_t tokens, int64_t rows, int64_t columns, uintptr_t stream) {
    const Dtype dtype = require_dtype(dtype_code);
    require(dtype != Dtype::kFloat32, "dtype_code 0 (float32) has no sparse tensor cores of full precision");
    require_shape(rows, columns);
    require(tokens >= 0 && tokens <= INT32_MAX,
            std::to_string(tokens) + " tokens are outside 0 ... 2^31 - 1");
    require(columns % 8 == 0, std::to_string(columns) + " columns are not a multiple of 8");
    const bool any = tokens > 0 && rows > 0 && columns > 0;
    require_16_bytes(x, "x");
    require_16_bytes(fragments, "fragments");
    require_16_bytes(workspace, "workspace");
    const NmSpmm op{elements(x, dtype, "x", any),
                    elements(fragments, dtype, "fragments", any),
                    elements(bias, dtype, "bias", false),
                    elements(y, dtype, "y", any),
                    reinterpret_cast<void*>(workspace),
                    dtype,
                    tokens,
                    rows,
                    columns};
    run("nm_spmm", [&] { return nm_spmm_cuda(op, reinterpret_cast<void*>(stream)); });
}

}  // namespace

void bind_spmm(py::module_& module) {
    module.def(
        "nm_spmm_fragment_bytes",
        [](int64_t rows, int64_t columns) {
            require_shape(rows, columns);
            return nm_spmm_fragment_bytes(rows, columns);
        },
        "rows"_a, "columns"_a, "Bytes that nm_spmm_pack writes.");

    module.def(
        "nm_spmm_workspace_bytes",
        [](int64_t tokens, int64_t rows, int64_t columns) {
            require_shape(rows, columns);
            int64_t bytes = 0;
            run("nm_spmm_workspace_bytes",
                [&] { return nm_spmm_workspace_bytes(tokens, rows, columns, &bytes); });
            return bytes;
        },
        "tokens"_a, "rows"_a, "columns"_a,
        "Bytes of workspace that nm_spmm needs on the current device; may be 0.");

    module.def("nm_spmm_pack", &pack, py::kw_only(), "values_ptr"_a, "bitmask_ptr"_a, "fragments_ptr"_a,
               "rows"_a, "columns"_a, "group_size"_a, "n"_a, "stream"_a,
               "Turn a packed fp16 or bf16 weight whose aligned fours keep at most 2 into fragment order, in "
               "order on\n"
               "a stream (a cudaStream_t as an integer, 0 for the default one) of the current device; "
               "returns before\n"
               "the work is done.");

    module.def(
        "nm_spmm", &multiply, py::kw_only(), "x_ptr"_a, "fragments_ptr"_a, "bias_ptr"_a, "y_ptr"_a,
        "workspace_ptr"_a, "dtype_code"_a, "tokens"_a, "rows"_a, "columns"_a, "stream"_a,
        "y [tokens, rows] = x [tokens, columns] W^T + bias with W in fragment order, in order on a stream "
        "of\n"
        "the current device; returns before the work is done. bias may be null, workspace where\n"
        "nm_spmm_workspace_bytes is 0. x, fragments and workspace must be multiples of 16, columns of 8.");
}

}  // namespace msp
