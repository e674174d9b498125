#include <cuda_runtime.h>

#include "nm_spmm.h"
#include "nm_spmm_fragment.h"

namespace msp {
namespace {

constexpr int kPackThreads = 256;

// An aligned group of 4 of one row: the kept weights, and the place of the first of them in `values`.
struct Four {
    uint32_t kept;
    int64_t first;
};

template <int M>
__device__ __forceinline__ Four four_of(const NmSpmmPack& op, int64_t row, int64_t column) {
    if (row >= op.rows || column >= op.columns) return {0, 0};
    const int64_t group = column / M;
    const uint8_t* bytes = op.bitmask + row * bitmask_row_bytes(op.columns) + group * M / 8;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < (M + 7) / 8; ++i) bits |= static_cast<uint32_t>(__ldg(bytes + i)) << (8 * i);
    const int within = static_cast<int>(column - group * M);
    if constexpr (M == 4) bits >>= group % 2 * 4;
    const int before = __popc(bits & ((1u << within) - 1));
    return {bits >> within & 15, (row * (op.columns / M) + group) * op.n + before};
}

__device__ __forceinline__ uint32_t value_at(const NmSpmmPack& op, const Four& four, uint32_t position) {
    if ((four.kept >> position & 1) == 0) return 0;
    return __ldg(op.values + four.first + __popc(four.kept & ((1u << position) - 1)));
}

template <int M>
__device__ __forceinline__ uint32_t two_values(const NmSpmmPack& op, int64_t row, int64_t column) {
    const Four four = four_of<M>(op, row, column);
    const uint32_t code = spmm_group_code(four.kept);
    return value_at(op, four, code & 3) | value_at(op, four, code >> 2) << 16;
}

template <int M>
__device__ __forceinline__ uint32_t metadata_of(const NmSpmmPack& op, int64_t row, int64_t column) {
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= spmm_group_code(four_of<M>(op, row, column + 4 * i).kept) << (4 * i);
    return codes;
}

// A warp writes a block.
template <int M>
__global__ void __launch_bounds__(kPackThreads) nm_spmm_pack_kernel(const __grid_constant__ NmSpmmPack op) {
    const int64_t per_slab = spmm_blocks_per_slab(op.columns);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
    if (index >= spmm_slabs(op.rows) * per_slab) return;
    const int lane = static_cast<int>(threadIdx.x % 32), t = lane % 4;
    const int64_t row = index / per_slab * kSpmmSlabRows + lane / 4;
    const int64_t column = index % per_slab * kSpmmBlockColumns;
    SpmmBlock& block = static_cast<SpmmBlock*>(op.fragments)[index];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t first = column + 32 * half + 4 * t;
        block.values[half][lane] =
            make_uint4(two_values<M>(op, row, first), two_values<M>(op, row + 8, first),
                       two_values<M>(op, row, first + 16), two_values<M>(op, row + 8, first + 16));
    }
    block.metadata[lane] =
        metadata_of<M>(op, row, column + 16 * t) | metadata_of<M>(op, row + 8, column + 16 * t) << 16;
}

}  // namespace

int64_t nm_spmm_fragment_bytes(int64_t rows, int64_t columns) {
    return spmm_slabs(rows) * spmm_blocks_per_slab(columns) * static_cast<int64_t>(sizeof(SpmmBlock));
}

std::string nm_spmm_pack_cuda(const NmSpmmPack& op, void* stream) {
    const int64_t blocks = spmm_slabs(op.rows) * spmm_blocks_per_slab(op.columns);
    if (blocks == 0) return "";
    constexpr int kWarps = kPackThreads / 32;
    const int64_t grid = (blocks + kWarps - 1) / kWarps;
    if (grid > INT32_MAX) return "the weight is too large";
    void (*kernel)(NmSpmmPack) = op.group_size == 4    ? nm_spmm_pack_kernel<4>
                                 : op.group_size == 8  ? nm_spmm_pack_kernel<8>
                                 : op.group_size == 16 ? nm_spmm_pack_kernel<16>
                                                       : nm_spmm_pack_kernel<32>;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(kPackThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, op);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace msp
