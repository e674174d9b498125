#include <cuda.h>
#include <cuda_runtime.h>

#include "nm_spmm_kernels.h"
#include "nm_spmm_tile.h"

namespace msp {
namespace {

// One block a multiprocessor, three warpgroups. The first copies x to shared memory (TMA, in the 128-byte
// swizzle that wgmma reads); the other two multiply 64 rows each with all tokens of the tile. Their weights
// and metadata come from global memory straight into registers, four blocks ahead: wgmma reads x at the full
// bandwidth of shared memory, so the weight must not take any of it. Blocks of a cluster work on neighbouring
// row tiles and the same tokens; each block copies its part of them to all. A block takes tile after tile, so
// that copies for the next tile run during the epilogue.
constexpr int kStages = 4;
constexpr int kConsumers = 256;
constexpr int kSm90Threads = 128 + kConsumers;

template <int Tokens>
struct Sm90Layout {
    using Epilogue = SpmmEpilogue<SpmmWgmmaShape<Tokens>>;
    static constexpr int kStageBytes = Tokens * 128;
    static constexpr int kEpilogue = kStages * kStageBytes;
    static constexpr int kFull = kEpilogue + Epilogue::kSharedBytes;  // a barrier a stage: x has come
    static constexpr int kEmpty = kFull + kStages * 8;                // and all of the cluster have used it
    static constexpr int kSharedBytes = kEmpty + kStages * 8;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kConsumerBarrier = 1;
// Blocks of the weight that a lane has registers for: one half is loaded while the other is multiplied.
constexpr int kRing = 2 * kStages;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// The tiles of a block: the first by its cluster's index, the others at a distance of the number of clusters.
struct Sm90Walk {
    int index, step, end;

    static __device__ __forceinline__ Sm90Walk of(const SpmmTask& task) {
        const int cluster = task.plan.cluster;
        return {static_cast<int>(blockIdx.x) / cluster, static_cast<int>(gridDim.x) / cluster,
                task.plan.tiles() / cluster * task.plan.splits};
    }
};

struct BlockRange {
    int begin, end;  // a multiple of kStages apart

    static __device__ __forceinline__ BlockRange of(const SpmmTask& task, const SpmmTile& tile) {
        const int begin = tile.split * task.plan.split_blocks, end = begin + task.plan.split_blocks;
        const auto all = static_cast<int>(spmm_blocks_per_slab(task.op.columns));
        return {begin, end < all ? end : all};
    }
};

// One thread of each block of the cluster.
template <int Tokens>
__device__ __forceinline__ void produce(const SpmmTask& task, const CUtensorMap& x, uint32_t shared,
                                        int rank) {
    using Layout = Sm90Layout<Tokens>;
    const int part = Tokens / task.plan.cluster;
    const auto everyone = static_cast<uint16_t>((1 << task.plan.cluster) - 1);
    uint32_t parity = 1;  // an untouched barrier counts as having finished the phase before
    for (Sm90Walk walk = Sm90Walk::of(task); walk.index < walk.end; walk.index += walk.step) {
        const SpmmTile tile = spmm_tile(task.plan, walk.index, rank);
        const BlockRange range = BlockRange::of(task, tile);
        const int token = tile.token * Tokens + rank * part;
        for (int block = range.begin; block < range.end; block += kStages) {
#pragma unroll
            for (int j = 0; j < kStages; ++j) {
                const uint32_t full = shared + static_cast<uint32_t>(Layout::kFull + 8 * j);
                ptx::mbarrier_wait(shared + static_cast<uint32_t>(Layout::kEmpty + 8 * j), parity);
                ptx::mbarrier_arrive_expect(full, Layout::kStageBytes);
                const uint32_t to =
                    shared + static_cast<uint32_t>(j * Layout::kStageBytes + rank * part * 128);
                const int column = (block + j) * kSpmmBlockColumns;
                if (task.plan.cluster == 1) {
                    ptx::tma_load_2d(to, &x, full, column, token);
                } else {
                    ptx::tma_load_2d(to, &x, full, column, token, everyone);
                }
            }
            parity ^= 1;
        }
    }
}

// A lane's part of a block of the weight.
struct Fragments {
    uint4 values[2];
    uint32_t metadata;

    __device__ __forceinline__ void load(const SpmmBlock* block, int lane) {
        values[0] = ptx::load_once16(&block->values[0][lane]);
        values[1] = ptx::load_once16(&block->values[1][lane]);
        metadata = ptx::load_once4(&block->metadata[lane]);
    }
};

template <Dtype D, int Tokens>
__device__ __forceinline__ void consume(const SpmmTask& task, uint32_t shared, int rank) {
    using Layout = Sm90Layout<Tokens>;
    using Epilogue = typename Layout::Epilogue;
    const int thread = static_cast<int>(threadIdx.x) - 128, lane = thread % 32;
    const int64_t per_slab = spmm_blocks_per_slab(task.op.columns);
    const auto weight_of = [&](const SpmmTile& tile) {
        const int64_t slab = tile.first_row() / kSpmmSlabRows + thread / 32;
        return static_cast<const SpmmBlock*>(task.op.fragments) + slab * per_slab;
    };
    Fragments ring[kRing];
    const auto load_half = [&](int first, const SpmmBlock* weight) {
#pragma unroll
        for (int j = 0; j < kStages; ++j) ring[first + j].load(weight + j, lane);
    };
    const auto prefetch = [&](const SpmmTile& tile) {
        load_half(0, weight_of(tile) + BlockRange::of(task, tile).begin);
    };
    // 9.7.15.5.1: address, 1 KiB from 8 tokens to the next 8, swizzle of 128 bytes
    const uint64_t descriptor =
        (shared & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;

    Sm90Walk walk = Sm90Walk::of(task);
    // a grid has no more blocks than there are tiles
    SpmmTile tile = spmm_tile(task.plan, walk.index, rank);
    prefetch(tile);
    uint32_t parity = 0;
    while (walk.index < walk.end) {
        const BlockRange range = BlockRange::of(task, tile);
        const SpmmBlock* weight = weight_of(tile);
        float sums[Tokens / 2];
#pragma unroll
        for (int i = 0; i < Tokens / 2; ++i) sums[i] = 0.0f;
        // each warp tells every block of the cluster that it has used a stage
        const auto release = [&](int stage) {
            if (lane < task.plan.cluster) {
                ptx::mbarrier_arrive_at(shared + static_cast<uint32_t>(Layout::kEmpty + 8 * stage),
                                        static_cast<uint32_t>(lane));
            }
        };
        for (int first = range.begin; first < range.end; first += kRing) {
#pragma unroll
            for (int i = 0; i < kRing; ++i) {
                const int stage = i % kStages, block = first + i;
                if (i == kStages && block >= range.end) break;
                ptx::mbarrier_wait(shared + static_cast<uint32_t>(Layout::kFull + 8 * stage), parity);
                ptx::wgmma_fence();
                const uint64_t tokens =
                    descriptor + static_cast<uint64_t>(stage * (Layout::kStageBytes >> 4));
                ptx::wgmma_sp<D, Tokens, 0>(sums, ring[i].values[0], tokens, ring[i].metadata);
                ptx::wgmma_sp<D, Tokens, 1>(sums, ring[i].values[1], tokens + (64 >> 4), ring[i].metadata);
                ptx::wgmma_commit();
                // the products of the block before are done: its stage and its registers are free
                ptx::wgmma_wait<1>();
                if (block > range.begin) release((stage + kStages - 1) % kStages);
                // Half a ring at once: a wait for one of these loads waits for all loads in flight, so a load
                // in every stage would be waited for in the next stage.
                if (stage == 0 && block + kStages < range.end) {
                    load_half((i + kStages) % kRing, weight + block + kStages);
                }
                if (stage == kStages - 1) parity ^= 1;
            }
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_done(sums);
        release(kStages - 1);

        const SpmmTile finished = tile;
        walk.index += walk.step;
        if (walk.index < walk.end) {
            tile = spmm_tile(task.plan, walk.index, rank);
            prefetch(tile);
        }
        const auto& fragments = reinterpret_cast<const typename SpmmWgmmaShape<Tokens>::Sums&>(sums);
        if constexpr (Tokens <= kSpmmMostSplitTokens) {
            if (task.plan.splits > 1) {
                Epilogue::write_partial(task, finished, thread, fragments);
                continue;
            }
        }
        ptx::named_barrier(kConsumerBarrier, kConsumers);  // the tile before has left shared memory
        Epilogue::template stage<D, true>(task, finished, thread, fragments, shared + Layout::kEpilogue);
        ptx::named_barrier(kConsumerBarrier, kConsumers);
        Epilogue::write(task, finished, thread, shared + Layout::kEpilogue);
    }
}

#endif

template <Dtype D, int Tokens>
__global__ void __launch_bounds__(kSm90Threads, 1)
    nm_spmm_sm90_kernel(const __grid_constant__ SpmmTask task, const __grid_constant__ CUtensorMap x) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Layout = Sm90Layout<Tokens>;
    const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
    const auto rank = static_cast<int>(ptx::cluster_rank());
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&x);
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(shared + static_cast<uint32_t>(Layout::kFull + 8 * i), 1);
            ptx::mbarrier_init(shared + static_cast<uint32_t>(Layout::kEmpty + 8 * i),
                               static_cast<uint32_t>(kConsumers / 32 * task.plan.cluster));
        }
        ptx::mbarrier_init_fence();
    }
    // no block copies into another block before that block exists
    ptx::cluster_sync();
    if (threadIdx.x < 128) {
        ptx::give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce<Tokens>(task, x, shared, rank);
    } else {
        ptx::take_registers<kConsumerRegisters>();
        consume<D, Tokens>(task, shared, rank);
    }
    // and none signals a block that has ended
    __syncwarp();
    ptx::cluster_sync();
#else
    __trap();  // the host chose a body that this chip's code does not have
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// Looked up at run time, since the module must load on machines without a driver; null if there is none.
Encode tensor_map_encoder() {
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(encode)
                                                                        : nullptr;
}

// Boxes of 64 columns x part of a tile's tokens; elements outside of x are read as zeros.
std::string make_tensor_map(const SpmmTask& task, CUtensorMap* map) {
    static const Encode encode = tensor_map_encoder();
    if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
    // a driver call needs a context, which a thread has from its first work on the device, or from this call
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const NmSpmm& op = task.op;
    const auto type =
        op.dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(op.columns), static_cast<cuuint64_t>(op.tokens)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(op.columns) * 2};
    const cuuint32_t box[2] = {kSpmmBlockColumns,
                               static_cast<cuuint32_t>(task.plan.tokens / task.plan.cluster)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = encode(map, type, 2, const_cast<void*>(op.x), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled failed with " + std::to_string(result);
}

template <Dtype D, int Tokens>
cudaError_t run(const SpmmTask& task, const CUtensorMap& x, cudaStream_t stream) {
    const int cluster = task.plan.cluster, tiles = task.plan.tiles() * task.plan.splits;
    const int resident = task.plan.multiprocessors / cluster * cluster;
    return spmm_launch(nm_spmm_sm90_kernel<D, Tokens>, task, tiles < resident ? tiles : resident,
                       kSm90Threads, Sm90Layout<Tokens>::kSharedBytes, cluster, stream, x);
}

template <Dtype D>
cudaError_t run(const SpmmTask& task, const CUtensorMap& x, cudaStream_t stream) {
    switch (task.plan.tokens) {
        case 64:
            return run<D, 64>(task, x, stream);
        case 128:
            return run<D, 128>(task, x, stream);
        default:
            return run<D, 256>(task, x, stream);
    }
}

}  // namespace

std::string nm_spmm_sm90(const SpmmTask& task, cudaStream_t stream) {
    CUtensorMap x{};
    const std::string failed = make_tensor_map(task, &x);
    if (!failed.empty()) return failed;
    const cudaError_t error = task.op.dtype == Dtype::kBFloat16 ? run<Dtype::kBFloat16>(task, x, stream)
                                                                : run<Dtype::kFloat16>(task, x, stream);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace msp
