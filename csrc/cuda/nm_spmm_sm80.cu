#include "nm_spmm_kernels.h"
#include "nm_spmm_tile.h"

namespace msp {
namespace {

// A pipeline of `Stages` blocks of 64 columns in shared memory, filled with cp.async. The weight's fragments
// keep their order in memory: a lane loads its own 16 bytes. x lies as [token][64 columns], 128 bytes a
// token, with the 16-byte chunk c of token i at place c ^ (i % 8), so that neither the copies nor ldmatrix
// have bank conflicts.
template <class Shape, int Stages>
struct SpmmPipeline {
    static constexpr int kTileSlabs = kSpmmTileRows / kSpmmSlabRows;
    static constexpr int kWeightBytes = kTileSlabs * static_cast<int>(sizeof(SpmmBlock));
    static constexpr int kStageBytes = kWeightBytes + Shape::kTokens * 128;
    static constexpr int kSharedBytes = Stages * kStageBytes;
    static_assert(kSharedBytes >= SpmmEpilogue<Shape>::kSharedBytes, "the epilogue uses the same memory");

    static __device__ __forceinline__ uint32_t token_place(int token, int chunk) {
        return static_cast<uint32_t>(kWeightBytes + token * 128 + (chunk ^ (token & 7)) * 16);
    }

    // Starts the copies of column block `block` to the stage at shared address `stage`.
    static __device__ __forceinline__ void load(const NmSpmm& op, const SpmmTile& tile, int64_t block,
                                                int thread, uint32_t stage) {
        // numbers of copies that the compiler knows, so that it unrolls all their loops
        constexpr int kChunks = static_cast<int>(sizeof(SpmmBlock)) / 16, kCopies = kTileSlabs * kChunks;
        constexpr int kTokensAtOnce = Shape::kThreads / 8;
        const int64_t per_slab = spmm_blocks_per_slab(op.columns);
        const auto* weight =
            static_cast<const SpmmBlock*>(op.fragments) + tile.row * kTileSlabs * per_slab + block;
#pragma unroll
        for (int c = 0; c < (kCopies + Shape::kThreads - 1) / Shape::kThreads; ++c) {
            const int i = thread + c * Shape::kThreads;
            if ((c + 1) * Shape::kThreads > kCopies && i >= kCopies) break;
            const auto* from = reinterpret_cast<const uint4*>(weight + i / kChunks * per_slab) + i % kChunks;
            ptx::cp_async16(stage + static_cast<uint32_t>(i) * 16, from, 16);
        }
        const int chunk = thread % 8;
        const int64_t column = block * kSpmmBlockColumns + chunk * 8;
        const int64_t first_token = int64_t{tile.token} * Shape::kTokens;
        const auto* x = static_cast<const uint16_t*>(op.x);
#pragma unroll
        for (int c = 0; c < Shape::kTokens / kTokensAtOnce; ++c) {
            const int i = thread / 8 + c * kTokensAtOnce;
            const bool inside = first_token + i < op.tokens && column < op.columns;
            const uint16_t* from = inside ? x + (first_token + i) * op.columns + column : x;
            ptx::cp_async16(stage + token_place(i, chunk), from, inside ? 16 : 0);
        }
    }

    template <Dtype D, int Half>
    static __device__ __forceinline__ void multiply_half(uint32_t stage, int warp, int lane,
                                                         const uint32_t (&metadata)[Shape::kSlabs],
                                                         typename Shape::Sums& sums) {
        uint32_t a[Shape::kSlabs][4];
#pragma unroll
        for (int s = 0; s < Shape::kSlabs; ++s) {
            const int at =
                (Shape::first_slab(warp) + s) * static_cast<int>(sizeof(SpmmBlock)) + Half * 512 + lane * 16;
            const uint4 v = ptx::load_shared16(stage + static_cast<uint32_t>(at));
            a[s][0] = v.x, a[s][1] = v.y, a[s][2] = v.z, a[s][3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < Shape::kOctets; ++j) {
            uint32_t b[4];
            const int token = Shape::first_token(warp) + j * 8 + lane % 8;
            ptx::ldmatrix_x4(b, stage + token_place(token, Half * 4 + lane / 8));
#pragma unroll
            for (int s = 0; s < Shape::kSlabs; ++s)
                ptx::mma_sp_m16n8k32<D, Half>(sums[s][j], a[s], b, metadata[s]);
        }
    }

    template <Dtype D>
    static __device__ __forceinline__ void multiply(uint32_t stage, int warp, int lane,
                                                    typename Shape::Sums& sums) {
        uint32_t metadata[Shape::kSlabs];
#pragma unroll
        for (int s = 0; s < Shape::kSlabs; ++s) {
            const int at =
                (Shape::first_slab(warp) + s) * static_cast<int>(sizeof(SpmmBlock)) + 1024 + lane * 4;
            metadata[s] = ptx::load_shared4(stage + static_cast<uint32_t>(at));
        }
        multiply_half<D, 0>(stage, warp, lane, metadata, sums);
        multiply_half<D, 1>(stage, warp, lane, metadata, sums);
    }
};

template <Dtype D, class Shape, int Stages>
__global__ void __launch_bounds__(Shape::kThreads)
    nm_spmm_sm80_kernel(const __grid_constant__ SpmmTask task) {
    using Pipeline = SpmmPipeline<Shape, Stages>;
    using Epilogue = SpmmEpilogue<Shape>;
    const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
    const int thread = static_cast<int>(threadIdx.x);
    const SpmmTile tile = spmm_tile(task.plan, static_cast<int>(blockIdx.x), 0);
    const int64_t blocks = (task.op.columns + kSpmmBlockColumns - 1) / kSpmmBlockColumns;
    const int64_t begin = int64_t{tile.split} * task.plan.split_blocks;
    const int64_t end = begin + task.plan.split_blocks < blocks ? begin + task.plan.split_blocks : blocks;

    for (int i = 0; i < Stages - 1; ++i) {
        if (begin + i < end) {
            Pipeline::load(task.op, tile, begin + i, thread,
                           shared + static_cast<uint32_t>(i * Pipeline::kStageBytes));
        }
        ptx::cp_async_commit();
    }
    typename Shape::Sums sums = {};
    int reads = 0, writes = Stages - 1;
    for (int64_t block = begin; block < end; ++block) {
        // the block is there for all threads, and all have finished with the stage that is filled next
        ptx::cp_async_wait<Stages - 2>();
        __syncthreads();
        if (block + Stages - 1 < end) {
            Pipeline::load(task.op, tile, block + Stages - 1, thread,
                           shared + static_cast<uint32_t>(writes * Pipeline::kStageBytes));
        }
        ptx::cp_async_commit();
        Pipeline::template multiply<D>(shared + static_cast<uint32_t>(reads * Pipeline::kStageBytes),
                                       thread / 32, thread % 32, sums);
        reads = reads + 1 == Stages ? 0 : reads + 1;
        writes = writes + 1 == Stages ? 0 : writes + 1;
    }
    ptx::cp_async_wait<0>();
    if constexpr (Shape::kTokens <= kSpmmMostSplitTokens) {
        if (task.plan.splits > 1) {
            Epilogue::write_partial(task, tile, thread, sums);
            return;
        }
    }
    __syncthreads();
    Epilogue::template stage<D, false>(task, tile, thread, sums, shared);
    __syncthreads();
    Epilogue::write(task, tile, thread, shared);
}

template <Dtype D, class Shape, int Stages>
cudaError_t run(const SpmmTask& task, cudaStream_t stream) {
    return spmm_launch(nm_spmm_sm80_kernel<D, Shape, Stages>, task, task.plan.tiles() * task.plan.splits,
                       Shape::kThreads, SpmmPipeline<Shape, Stages>::kSharedBytes, 1, stream);
}

template <Dtype D>
cudaError_t run(const SpmmTask& task, cudaStream_t stream) {
    switch (task.plan.tokens) {
        case 16:
            return run<D, SpmmShape16, 4>(task, stream);
        case 64:
            return run<D, SpmmShape64, 4>(task, stream);
        default:
            return run<D, SpmmShape128, 3>(task, stream);
    }
}

}  // namespace

cudaError_t nm_spmm_sm80(const SpmmTask& task, cudaStream_t stream) {
    return task.op.dtype == Dtype::kBFloat16 ? run<Dtype::kBFloat16>(task, stream)
                                             : run<Dtype::kFloat16>(task, stream);
}

}  // namespace msp
