// The bindings of nm_linear: argument checks, then one call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cuda/nm_linear.h"
#include "cuda/nm_tiles.h"

namespace py = pybind11;
using namespace py::literals;

namespace msp {
namespace {

LinearForm require_form(int form, int group_size, int n, int tokens_at_once) {
    require(form == 0 || form == 1, "form " + std::to_string(form) + " is not one of 0 (gather), 1 (expand)");
    require(nm_linear_has(static_cast<LinearForm>(form), group_size, n, tokens_at_once),
            "form " + std::to_string(form) + " has no kernel for " + std::to_string(n) + ":" +
                std::to_string(group_size) + " and " + std::to_string(tokens_at_once) + " tokens at once");
    return static_cast<LinearForm>(form);
}

const void* in_sixteens(uintptr_t address, const char* name, bool needed) {
    require(address % 16 == 0, std::string(name) + "_ptr is not a multiple of 16");
    return pointer<const uint64_t>(address, name, needed);
}

NmLinear linear_arguments(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y,
                          uintptr_t partials, int dtype_code, int tokens, int rows, int columns,
                          int group_size, int n, int form, int tokens_at_once, int stripes, int splits) {
    const Dtype dtype = require_dtype(dtype_code);
    require(dtype != Dtype::kFloat32, "dtype_code 0 (float32) has no kernel");
    require_format(dtype_code, rows, columns, group_size);
    require(rows % kTileRows == 0 && columns % kTileColumns == 0 && columns > 0,
            "shape [" + std::to_string(rows) + ", " + std::to_string(columns) +
                "] is not made of tiles of 16 x 256");
    require(tokens >= 0, "tokens " + std::to_string(tokens) + " is negative");
    require(stripes == 1 || stripes == 2 || stripes == 4 || stripes == 8,
            "stripes " + std::to_string(stripes) + " is not one of 1, 2, 4, 8");
    require(
        splits >= 1 && splits <= columns / kTileColumns,
        "splits " + std::to_string(splits) + " is outside 1 ... " + std::to_string(columns / kTileColumns));
    const bool any = tokens > 0 && rows > 0;
    return NmLinear{in_sixteens(x, "x", any),
                    in_sixteens(values, "values", any),
                    in_sixteens(bitmask, "bitmask", any),
                    elements(bias, dtype, "bias", false),
                    elements(y, dtype, "y", any),
                    pointer<float>(partials, "partials", any && splits > 1),
                    dtype,
                    tokens,
                    rows,
                    columns,
                    group_size,
                    n,
                    require_form(form, group_size, n, tokens_at_once),
                    tokens_at_once,
                    stripes,
                    splits};
}

void linear(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y, uintptr_t partials,
            int dtype_code, int tokens, int rows, int columns, int group_size, int n, int form,
            int tokens_at_once, int stripes, int splits, uintptr_t stream) {
    const NmLinear op = linear_arguments(x, values, bitmask, bias, y, partials, dtype_code, tokens, rows,
                                         columns, group_size, n, form, tokens_at_once, stripes, splits);
    std::string error;
    {
        py::gil_scoped_release without_gil;
        error = nm_linear_cuda(op, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error("nm_linear: " + error);
}

// What each weight of a group has of its own: pointers of values, bitmask, bias, y and partial sums, rows,
// group size, n.
using OwnArguments = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, int, int>;

void linear_group(uintptr_t x, const std::vector<OwnArguments>& own, int dtype_code, int tokens, int columns,
                  int stripes, int splits, uintptr_t stream) {
    require(!own.empty() && own.size() <= NmLinearGroup::kMost,
            std::to_string(own.size()) + " weights are not 1 ... " + std::to_string(NmLinearGroup::kMost));
    require(tokens == 1 || tokens == 2, "tokens " + std::to_string(tokens) + " is not one of 1, 2");
    NmLinearGroup group{};
    for (const auto& [values, bitmask, bias, y, partials, rows, group_size, n] : own) {
        require(rows > 0, "rows " + std::to_string(rows) + " is not positive");
        group.linears[group.count++] =
            linear_arguments(x, values, bitmask, bias, y, partials, dtype_code, tokens, rows, columns,
                             group_size, n, static_cast<int>(LinearForm::kGather), tokens, stripes, splits);
    }
    std::string error;
    {
        py::gil_scoped_release without_gil;
        error = nm_linear_group_cuda(group, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error("nm_linear_group: " + error);
}

}  // namespace

void bind_linear(py::module_& module) {
    module.def(
        "nm_linear", linear, "x_ptr"_a, "values_ptr"_a, "bitmask_ptr"_a, "bias_ptr"_a, "y_ptr"_a,
        "partials_ptr"_a, "dtype_code"_a, "tokens"_a, "rows"_a, "columns"_a, "group_size"_a, "n"_a, "form"_a,
        "tokens_at_once"_a, "stripes"_a, "splits"_a, "stream"_a,
        "y [tokens, rows] = x [tokens, columns] W^T + bias, with values and bitmask in the order of "
        "msp/ops/layouts.py, in order on a stream of the current device, which must hold them all.\n\n"
        "form: 0 gathers activations on CUDA cores, 1 or 2 or 4 tokens at once; 1 expands weights for "
        "tensor cores, 8, 16 or 32. stripes: groups of 16 rows of a block. splits: parts of the columns; "
        "where more than 1, partials [splits, tokens, rows] fp32 is scratch memory. A null bias is none. "
        "Allocates nothing, waits for nothing, and adds up in an order that these sizes fix.");

    module.def(
        "nm_linear_group", linear_group, "x_ptr"_a, "own"_a, "dtype_code"_a, "tokens"_a, "columns"_a,
        "stripes"_a, "splits"_a, "stream"_a,
        "What nm_linear gathers for 1 or 2 tokens, to the last bit, of up to four weights in one launch.\n\n"
        "own: of each weight (values_ptr, bitmask_ptr, bias_ptr, y_ptr, partials_ptr, rows, group_size, n).");

    module.def(
        "nm_linear_shared_bytes",
        [](int columns, int form, int tokens_at_once, int splits) {
            NmLinear op{};
            op.columns = columns;
            op.form = static_cast<LinearForm>(form);
            op.tokens_at_once = tokens_at_once;
            op.splits = splits;
            return nm_linear_shared_bytes(op);
        },
        "columns"_a, "form"_a, "tokens_at_once"_a, "splits"_a, "Bytes of shared memory a block needs.");

    module.def(
        "nm_linear_has",
        [](int form, int group_size, int n, int tokens_at_once) {
            return nm_linear_has(static_cast<LinearForm>(form), group_size, n, tokens_at_once);
        },
        "form"_a, "group_size"_a, "n"_a, "tokens_at_once"_a, "Whether a kernel for these exists.");
}

}  // namespace msp
