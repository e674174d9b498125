// The common parts of the kernels of nm_spmm: the order of the tiles, the thread that holds each sum, and the
// way of the sums to y.
#pragma once

#include <cuda_runtime.h>

#include "../nm_score.h"
#include "device.h"
#include "nm_spmm.h"
#include "nm_spmm_fragment.h"
#include "nm_spmm_kernels.h"
#include "ptx.h"

namespace msp {

// A tile of kSpmmTileRows x kTokens, computed by kThreads threads: warp w has the rows of its Slabs slabs and
// the tokens of its Octets groups of 8, as accumulators of m16n8 products: sums[slab][octet][i] is row lane /
// 4 (+ 8 for i >= 2), token lane % 4 * 2 + i % 2.
template <int RowWarps, int TokenWarps, int Slabs, int Octets>
struct SpmmShape {
    static constexpr int kThreads = RowWarps * TokenWarps * 32;
    static constexpr int kTokens = TokenWarps * Octets * 8;
    static constexpr int kSlabs = Slabs;
    static constexpr int kOctets = Octets;
    static_assert(RowWarps * Slabs * kSpmmSlabRows == kSpmmTileRows, "a tile has kSpmmTileRows rows");

    static __device__ __forceinline__ int first_slab(int warp) { return warp % RowWarps * Slabs; }
    static __device__ __forceinline__ int first_token(int warp) { return warp / RowWarps * Octets * 8; }

    using Sums = float[Slabs][Octets][4];
};

// By the tokens of a tile: warps that each multiply a square, which takes the fewest reads of shared memory,
// and for wgmma the two warpgroups of 64 rows.
using SpmmShape16 = SpmmShape<4, 1, 2, 2>;
using SpmmShape64 = SpmmShape<2, 2, 4, 4>;
using SpmmShape128 = SpmmShape<2, 2, 4, 8>;
template <int Tokens>
using SpmmWgmmaShape = SpmmShape<8, 1, 1, Tokens / 8>;

struct SpmmTile {
    int row, token, split;  // in tiles

    __device__ __forceinline__ int64_t first_row() const { return int64_t{row} * kSpmmTileRows; }
    // Tiles of a split are numbered for the workspace.
    __device__ __forceinline__ int64_t number(const SpmmPlan& plan) const {
        return (int64_t{split} * plan.token_tiles + token) * plan.row_tiles + row;
    }
};

// Tiles in the order of time. All token tiles of a row tile follow each other, so that a weight comes from
// memory once. They go in bands, whose part of x stays in the L2 cache from one row tile to the next. Blocks
// of a cluster have consecutive row tiles.
constexpr unsigned kSpmmBandTokens = 2048;

__device__ __forceinline__ SpmmTile spmm_tile(const SpmmPlan& plan, int index, int rank) {
    // unsigned, since the chip divides those faster
    const auto row_groups = static_cast<unsigned>(plan.row_tiles / plan.cluster);
    const auto token_tiles = static_cast<unsigned>(plan.token_tiles);
    const unsigned tiles = row_groups * token_tiles,
                   band_tiles = kSpmmBandTokens / static_cast<unsigned>(plan.tokens);
    const unsigned split = static_cast<unsigned>(index) / tiles,
                   in_split = static_cast<unsigned>(index) % tiles;
    const unsigned band = in_split / (band_tiles * row_groups),
                   in_band = in_split % (band_tiles * row_groups);
    const unsigned left = token_tiles - band * band_tiles;
    const unsigned width = left < band_tiles ? left : band_tiles;
    return {static_cast<int>(in_band / width) * plan.cluster + rank,
            static_cast<int>(band * band_tiles + in_band % width), static_cast<int>(split)};
}

template <class Shape>
struct SpmmEpilogue {
    // A row of shared memory is a token; 8 more elements than rows keep stores and loads free of bank
    // conflicts.
    static constexpr int kStride = (kSpmmTileRows + 8) * 2;
    static constexpr int kSharedBytes = Shape::kTokens * kStride;

    // Sums of one split, in the order of the threads: coalesced, and read back by the same thread of
    // nm_spmm_sum.
    static __device__ __forceinline__ float4* partial(const SpmmTask& task, const SpmmTile& tile,
                                                      int thread) {
        constexpr int64_t kPerThread = Shape::kSlabs * Shape::kOctets;
        return static_cast<float4*>(task.op.workspace) +
               tile.number(task.plan) * kPerThread * Shape::kThreads + thread;
    }

    static __device__ __forceinline__ void write_partial(const SpmmTask& task, const SpmmTile& tile,
                                                         int thread, const typename Shape::Sums& sums) {
        float4* to = partial(task, tile, thread);
#pragma unroll
        for (int s = 0; s < Shape::kSlabs; ++s) {
#pragma unroll
            for (int j = 0; j < Shape::kOctets; ++j) {
                const float (&four)[4] = sums[s][j];
                __stcg(to + (s * Shape::kOctets + j) * Shape::kThreads,
                       make_float4(four[0], four[1], four[2], four[3]));
            }
        }
    }

    static __device__ __forceinline__ void add_partial(const SpmmTask& task, const SpmmTile& tile, int thread,
                                                       typename Shape::Sums& sums) {
        const float4* from = partial(task, tile, thread);
#pragma unroll
        for (int s = 0; s < Shape::kSlabs; ++s) {
#pragma unroll
            for (int j = 0; j < Shape::kOctets; ++j) {
                const float4 four = __ldcg(from + (s * Shape::kOctets + j) * Shape::kThreads);
                float (&to)[4] = sums[s][j];
                to[0] += four.x;
                to[1] += four.y;
                to[2] += four.z;
                to[3] += four.w;
            }
        }
    }

    template <Dtype D>
    static __device__ __forceinline__ float bias_of(const NmSpmm& op, int64_t row) {
        if (op.bias == nullptr || row >= op.rows) return 0.0f;
        return Stored<D>::to_float(__ldg(static_cast<const uint16_t*>(op.bias) + row));
    }

    // Adds the bias, rounds, and transposes the tile in shared memory: [token][row].
    template <Dtype D, bool Stmatrix>
    static __device__ __forceinline__ void stage(const SpmmTask& task, const SpmmTile& tile, int thread,
                                                 const typename Shape::Sums& sums, uint32_t shared) {
        const int lane = thread % 32, warp = thread / 32;
        // lane i of stmatrix has token i % 8 of octet i / 16 and rows 8 (i / 8 % 2); for single words the
        // lane has a token and two rows
        const int token = Stmatrix ? lane % 8 + lane / 16 * 8 : lane / 4;
        const int row = Stmatrix ? lane / 8 % 2 * 8 : lane % 4 * 2;
        const uint32_t place =
            shared + static_cast<uint32_t>((Shape::first_token(warp) + token) * kStride +
                                           (Shape::first_slab(warp) * kSpmmSlabRows + row) * 2);
#pragma unroll
        for (int s = 0; s < Shape::kSlabs; ++s) {
            const int64_t first = tile.first_row() + (Shape::first_slab(warp) + s) * kSpmmSlabRows + lane / 4;
            const float low = bias_of<D>(task.op, first), high = bias_of<D>(task.op, first + 8);
#pragma unroll
            for (int j = 0; j < Shape::kOctets; j += 2) {
                const float (&a)[4] = sums[s][j];
                const float (&b)[4] = sums[s][j + 1];
                const uint32_t words[4] = {
                    ptx::pack2<D>(a[0] + low, a[1] + low), ptx::pack2<D>(a[2] + high, a[3] + high),
                    ptx::pack2<D>(b[0] + low, b[1] + low), ptx::pack2<D>(b[2] + high, b[3] + high)};
                const uint32_t at = place + static_cast<uint32_t>(j * 8 * kStride + s * kSpmmSlabRows * 2);
                if constexpr (Stmatrix) {
                    ptx::stmatrix_x4_trans(at, words);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        ptx::store_shared4(at + static_cast<uint32_t>(i / 2 * 8 * kStride + i % 2 * 16),
                                           ptx::movmatrix_trans(words[i]));
                    }
                }
            }
        }
    }

    // Shared memory to y, 16 bytes a thread if y's rows allow it.
    static __device__ __forceinline__ void write(const SpmmTask& task, const SpmmTile& tile, int thread,
                                                 uint32_t shared) {
        constexpr int kChunks = kSpmmTileRows / 8;
        const NmSpmm& op = task.op;
        const int64_t first_token = int64_t{tile.token} * Shape::kTokens;
        const int chunk = thread % kChunks;
        const int64_t row = tile.first_row() + chunk * 8;
        const bool whole = op.rows % 8 == 0 && reinterpret_cast<uintptr_t>(op.y) % 16 == 0;
        for (int i = thread / kChunks; i < Shape::kTokens; i += Shape::kThreads / kChunks) {
            if (first_token + i >= op.tokens || row >= op.rows) break;
            uint16_t* to = static_cast<uint16_t*>(op.y) + (first_token + i) * op.rows + row;
            const uint32_t from = shared + static_cast<uint32_t>(i * kStride + chunk * 16);
            if (whole) {
                ptx::store16(to, ptx::load_shared16(from));
            } else {
                const int count = op.rows - row < 8 ? static_cast<int>(op.rows - row) : 8;
                for (int k = 0; k < count; ++k) {
                    to[k] = static_cast<uint16_t>(
                        ptx::load_shared4(from + static_cast<uint32_t>(k / 2 * 4)) >> (k % 2 * 16));
                }
            }
        }
    }
};

template <class... Arguments>
cudaError_t spmm_launch(void (*kernel)(SpmmTask, Arguments...), const SpmmTask& task, int grid, int threads,
                        int shared_bytes, int cluster, cudaStream_t stream, const Arguments&... arguments) {
    const cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, task, arguments...);
}

}  // namespace msp
