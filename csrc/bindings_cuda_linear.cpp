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

LinearForm require_form(const std::string& form) {
    require(form == "gather" || form == "expand", "form '" + form + "' is not one of gather, expand");
    return form == "gather" ? LinearForm::kGather : LinearForm::kExpand;
}

const void* in_sixteens(uintptr_t address, const char* name, bool needed) {
    require(address % 16 == 0, std::string(name) + "_ptr is not a multiple of 16");
    return pointer<const uint64_t>(address, name, needed);
}

TiledWeight tiled_weight(uintptr_t values, uintptr_t bitmask, int dtype_code, int rows, int columns,
                         int group_size, int n) {
    const Dtype dtype = require_dtype(dtype_code);
    require(dtype != Dtype::kFloat32, "dtype_code 0 (float32) has no kernel");
    require_format(dtype_code, rows, columns, group_size);
    require(rows % kTileRows == 0 && columns % kTileColumns == 0 && columns > 0,
            "shape [" + std::to_string(rows) + ", " + std::to_string(columns) +
                "] is not made of tiles of 16 x 256");
    return {in_sixteens(values, "values", rows > 0),
            in_sixteens(bitmask, "bitmask", rows > 0),
            dtype,
            rows,
            columns,
            group_size,
            n};
}

LinearCut linear_cut(const std::string& form, int tokens_at_once, int stripes, int splits) {
    require(stripes == 1 || stripes == 2 || stripes == 4 || stripes == 8,
            "stripes " + std::to_string(stripes) + " is not one of 1, 2, 4, 8");
    require(splits >= 1, "splits " + std::to_string(splits) + " is not positive");
    return {require_form(form), tokens_at_once, stripes, splits};
}

NmLinear linear_arguments(const TiledWeight& weight, const LinearCut& cut, uintptr_t x, uintptr_t bias,
                          uintptr_t y, uintptr_t partials, int tokens) {
    require(nm_linear_has(cut.form, weight.group_size, weight.n, cut.tokens_at_once),
            std::string(cut.form == LinearForm::kGather ? "gather" : "expand") + " has no kernel for " +
                std::to_string(weight.n) + ":" + std::to_string(weight.group_size) + " and " +
                std::to_string(cut.tokens_at_once) + " tokens at once");
    require(tokens >= 0, "tokens " + std::to_string(tokens) + " is negative");
    const int tiles = weight.columns / kTileColumns;
    require(cut.splits <= tiles,
            "splits " + std::to_string(cut.splits) + " is outside 1 ... " + std::to_string(tiles));
    const bool any = tokens > 0 && weight.rows > 0;
    return {weight,
            cut,
            in_sixteens(x, "x", any),
            elements(bias, weight.dtype, "bias", false),
            elements(y, weight.dtype, "y", any),
            pointer<float>(partials, "partials", any && cut.splits > 1),
            tokens};
}

void linear(const TiledWeight& weight, const LinearCut& cut, uintptr_t x, uintptr_t bias, uintptr_t y,
            uintptr_t partials, int tokens, uintptr_t stream) {
    const NmLinear op = linear_arguments(weight, cut, x, bias, y, partials, tokens);
    std::string error;
    {
        py::gil_scoped_release without_gil;
        error = nm_linear_cuda(op, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error("nm_linear: " + error);
}

// A weight of a group, and what the group has for it alone: pointers of bias, y and partial sums.
using OwnArguments = std::tuple<const TiledWeight*, uintptr_t, uintptr_t, uintptr_t>;

void linear_group(const std::vector<OwnArguments>& own, const LinearCut& cut, uintptr_t x, int tokens,
                  uintptr_t stream) {
    require(!own.empty() && own.size() <= NmLinearGroup::kMost,
            std::to_string(own.size()) + " weights are not 1 ... " + std::to_string(NmLinearGroup::kMost));
    require(tokens == 1 || tokens == 2, "tokens " + std::to_string(tokens) + " is not one of 1, 2");
    require(cut.form == LinearForm::kGather && cut.tokens_at_once == tokens,
            "the cut of a group must gather " + std::to_string(tokens) + " tokens at once");
    NmLinearGroup group{};
    for (const auto& [weight, bias, y, partials] : own) {
        require(weight != nullptr, "a weight of the group is None");
        require(weight->rows > 0, "rows " + std::to_string(weight->rows) + " is not positive");
        const TiledWeight& first = *std::get<0>(own[0]);
        require(weight->columns == first.columns && weight->dtype == first.dtype,
                "the weights of a group differ in columns or dtype");
        group.linears[group.count++] = linear_arguments(*weight, cut, x, bias, y, partials, tokens);
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
    py::class_<TiledWeight>(
        module, "TiledWeight", py::module_local(),
        "A weight [rows, columns] in the order of msp/ops/linear/tile_order.py, which keeps n of "
        "every group_size. It holds addresses, not tensors. dtype_code: 1 float16, 2 bfloat16.")
        .def(py::init(&tiled_weight), py::kw_only(), "values_ptr"_a, "bitmask_ptr"_a, "dtype_code"_a,
             "rows"_a, "columns"_a, "group_size"_a, "n"_a);

    py::class_<LinearCut>(
        module, "LinearCut", py::module_local(),
        "Which kernel computes a product, and how its work is cut.\n\n"
        "form: 'gather' gathers activations on CUDA cores, 1 or 2 or 4 tokens at once; 'expand' expands "
        "weights for tensor cores, 8, 16 or 32. stripes: groups of 16 rows of a block. splits: parts of the "
        "columns.")
        .def(py::init(&linear_cut), py::kw_only(), "form"_a, "tokens_at_once"_a, "stripes"_a, "splits"_a);

    module.def(
        "nm_linear", linear, "weight"_a, "cut"_a, "x_ptr"_a, "bias_ptr"_a, "y_ptr"_a, "partials_ptr"_a,
        "tokens"_a, "stream"_a,
        "y [tokens, rows] = x [tokens, columns] W^T + bias, in order on a stream of the current device, "
        "which "
        "must hold them all.\n\n"
        "If the columns are split, partials [splits, tokens, rows] fp32 is scratch memory. A null bias is "
        "none. Allocates nothing, waits for nothing, and adds up in an order that these sizes fix.");

    module.def(
        "nm_linear_group", linear_group, "own"_a, "cut"_a, "x_ptr"_a, "tokens"_a, "stream"_a,
        "What nm_linear gathers for 1 or 2 tokens, to the last bit, of up to four weights in one launch.\n\n"
        "own: of each weight (TiledWeight, bias_ptr, y_ptr, partials_ptr).");

    module.def("nm_linear_shared_bytes", &nm_linear_shared_bytes, "columns"_a, "cut"_a,
               "Bytes of shared memory a block needs.");

    module.def(
        "nm_linear_has",
        [](const std::string& form, int group_size, int n, int tokens_at_once) {
            return nm_linear_has(require_form(form), group_size, n, tokens_at_once);
        },
        "form"_a, "group_size"_a, "n"_a, "tokens_at_once"_a, "Whether a kernel for these exists.");
}

}  // namespace msp
