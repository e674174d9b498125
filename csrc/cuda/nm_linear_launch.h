// Which instance of the kernels of nm_linear serves a call, and its launch.
#pragma once

#include "device.h"
#include "nm_linear_expand.h"
#include "nm_linear_gather.h"

namespace msp {

// Values of `unit` columns that the expansion treats as one, as Expander's parameters.
struct ExpandUnit {
    int columns, values;
};

MSP_HD constexpr ExpandUnit expand_unit(int group_size, int n) {
    return group_size == 4 ? ExpandUnit{8, 2 * n} : ExpandUnit{group_size, n};
}

using LinearKernel = void (*)(NmLinear);

template <Dtype D, int Step>
LinearKernel gather_kernel(int tokens) {
    switch (tokens) {
        case 1:
            return nm_linear_gather_kernel<D, Step, 1>;
        case 2:
            return nm_linear_gather_kernel<D, Step, 2>;
        case 4:
            return nm_linear_gather_kernel<D, Step, 4>;
        default:
            return nullptr;
    }
}

template <Dtype D, int Unit, int PerUnit>
LinearKernel expand_kernel(int tokens) {
    switch (tokens) {
        case 8:
            return nm_linear_expand_kernel<D, Unit, PerUnit, 8>;
        case 16:
            return nm_linear_expand_kernel<D, Unit, PerUnit, 16>;
        case 32:
            return nm_linear_expand_kernel<D, Unit, PerUnit, 32>;
        default:
            return nullptr;
    }
}

// The kernels of one unit, by the number of tokens that they take at once.
struct ExpandKernels {
    ExpandUnit unit;
    LinearKernel (*of_tokens)(int tokens);
};

// Every unit that has kernels.
template <Dtype D>
constexpr ExpandKernels kExpandKernels[] = {
    {{8, 1}, expand_kernel<D, 8, 1>},   {{8, 2}, expand_kernel<D, 8, 2>},
    {{8, 3}, expand_kernel<D, 8, 3>},   {{8, 4}, expand_kernel<D, 8, 4>},
    {{8, 5}, expand_kernel<D, 8, 5>},   {{8, 6}, expand_kernel<D, 8, 6>},
    {{8, 7}, expand_kernel<D, 8, 7>},   {{16, 1}, expand_kernel<D, 16, 1>},
    {{16, 2}, expand_kernel<D, 16, 2>}, {{16, 3}, expand_kernel<D, 16, 3>},
    {{16, 4}, expand_kernel<D, 16, 4>}, {{32, 2}, expand_kernel<D, 32, 2>},
    {{32, 4}, expand_kernel<D, 32, 4>},
};

template <Dtype D>
LinearKernel expand_kernel(ExpandUnit unit, int tokens) {
    for (const ExpandKernels& kernels : kExpandKernels<D>) {
        if (kernels.unit.columns == unit.columns && kernels.unit.values == unit.values) {
            return kernels.of_tokens(tokens);
        }
    }
    return nullptr;
}

template <Dtype D>
LinearKernel linear_kernel(const NmLinear& op) {
    if (op.form == LinearForm::kExpand) {
        return expand_kernel<D>(expand_unit(op.group_size, op.n), op.tokens_at_once);
    }
    switch (gather_step(op.group_size, op.n)) {
        case 8:
            return gather_kernel<D, 8>(op.tokens_at_once);
        case 4:
            return gather_kernel<D, 4>(op.tokens_at_once);
        default:
            return gather_kernel<D, 2>(op.tokens_at_once);
    }
}

template <Dtype D>
auto group_kernel(int tokens) -> void (*)(NmLinearGroup) {
    switch (tokens) {
        case 1:
            return nm_linear_group_kernel<D, 1>;
        case 2:
            return nm_linear_group_kernel<D, 2>;
        default:
            return nullptr;
    }
}

template <class Work>
cudaError_t launch(void (*kernel)(Work), const Work& work, dim3 grid, int64_t shared_bytes,
                   cudaStream_t stream) {
    const cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kLinearThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, work);
}

inline unsigned over(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

// Blocks of each split.
inline unsigned linear_blocks(const NmLinear& op) {
    return over(op.tokens, op.tokens_at_once) * over(op.rows, op.stripes * kTileRows);
}

template <Dtype D>
cudaError_t launch_sum(const NmLinear& op, cudaStream_t stream) {
    if (op.splits == 1) return cudaSuccess;
    const int64_t outputs = static_cast<int64_t>(op.tokens) * op.rows;
    return launch(nm_linear_sum_kernel<D>, op, dim3(over(outputs, kLinearThreads)), 0, stream);
}

// What the kernels would have to divide for.
inline NmLinear filled(NmLinear op) {
    const int tiles = op.columns / kTileColumns;
    while (op.stripes >> op.log_stripes > 1) ++op.log_stripes;
    op.chunks = static_cast<int>(over(op.tokens, op.tokens_at_once));
    op.split_tiles = tiles / op.splits;
    op.split_extra = tiles % op.splits;
    op.per_word = 32 / op.group_size * op.n;
    return op;
}

template <Dtype D>
cudaError_t launch_linear(const NmLinear& given, cudaStream_t stream) {
    const NmLinear op = filled(given);
    const LinearKernel kernel = linear_kernel<D>(op);
    if (kernel == nullptr) return cudaErrorInvalidValue;
    const dim3 grid(linear_blocks(op), static_cast<unsigned>(op.splits));
    const cudaError_t error = launch(kernel, op, grid, nm_linear_shared_bytes(op.columns, op), stream);
    return error == cudaSuccess ? launch_sum<D>(op, stream) : error;
}

template <Dtype D>
cudaError_t launch_group(NmLinearGroup group, cudaStream_t stream) {
    const NmLinear& first = group.linears[0];
    const auto kernel = group_kernel<D>(first.tokens_at_once);
    if (kernel == nullptr) return cudaErrorInvalidValue;
    unsigned blocks = 0;
    for (int i = 0; i < group.count; ++i) {
        group.linears[i] = filled(group.linears[i]);
        group.blocks[i] = static_cast<int>(linear_blocks(group.linears[i]));
        blocks += linear_blocks(group.linears[i]);
    }
    const dim3 grid(blocks, static_cast<unsigned>(first.splits));
    cudaError_t error = launch(kernel, group, grid, nm_linear_shared_bytes(first.columns, first), stream);
    for (int i = 0; i < group.count && error == cudaSuccess; ++i) {
        error = launch_sum<D>(group.linears[i], stream);
    }
    return error;
}

// In a file of its own for each dtype, which compile side by side.
cudaError_t launch_linear_bf16(const NmLinear& op, cudaStream_t stream);
cudaError_t launch_linear_fp16(const NmLinear& op, cudaStream_t stream);
cudaError_t launch_group_bf16(const NmLinearGroup& group, cudaStream_t stream);
cudaError_t launch_group_fp16(const NmLinearGroup& group, cudaStream_t stream);

}  // namespace msp
