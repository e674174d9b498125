// What both kernels of nm_linear have in common: which work a warp has, the ring in which its values arrive,
// the activations in shared memory, and the sum over warps.
#pragma once

#include "nm_linear.h"
#include "nm_tiles.h"
#include "ptx.h"
#include "ptx_convert.h"

namespace msp {

constexpr int kLinearThreads = 32 * kLinearWarps;
// Chunks of 512 bytes that are on their way or wait to be used, for each warp.
constexpr int kRingDepth = 8;
constexpr int kRingBytes = kLinearWarps * kRingDepth * kWarpChunkBytes;

// Most tiles that a block, which has every part of one split, can have.
MSP_HD constexpr int most_block_tiles(int columns, int splits) {
    return (columns / kTileColumns + splits - 1) / splits;
}

// The part of the product that a thread works on.
struct LinearPart {
    int lane, warp;
    int first_token, split;
    int first_stripe;       // of the block
    int first_tile, tiles;  // of the warp
    int block_first_tile, block_tiles;
    int64_t weight_tile;  // index of the warp's first

    // `block` counts those of one split. Columns are dealt out in tiles, to the splits and then to a split's
    // slices as evenly as whole tiles allow, without a division: on the device these take as long as a tile.
    __device__ LinearPart(const NmLinear& op, int block) {
        lane = static_cast<int>(threadIdx.x % 32);
        warp = static_cast<int>(threadIdx.x / 32);
        // blocks that read the same weights run side by side, so that one of them finds these in L2
        int row_block = block, chunk = 0;
        if (op.chunks > 1) {
            row_block = static_cast<int>(static_cast<unsigned>(block) / static_cast<unsigned>(op.chunks));
            chunk = block - row_block * op.chunks;
        }
        first_token = chunk * op.tokens_at_once;
        first_stripe = row_block << op.log_stripes;
        split = static_cast<int>(blockIdx.y);
        const int tiles_across = static_cast<int>(static_cast<unsigned>(op.columns) / kTileColumns);
        block_first_tile = split * op.split_tiles + (split < op.split_extra ? split : op.split_extra);
        block_tiles = op.split_tiles + (split < op.split_extra ? 1 : 0);
        const int slice = warp >> op.log_stripes, log_slices = kLogLinearWarps - op.log_stripes;
        const int from = block_tiles * slice >> log_slices;
        first_tile = block_first_tile + from;
        const int stripe = first_stripe + (warp & (op.stripes - 1));
        tiles = stripe * kTileRows < op.rows ? (block_tiles * (slice + 1) >> log_slices) - from : 0;
        weight_tile = static_cast<int64_t>(stripe) * tiles_across + first_tile;
    }
};

// The values of a warp's tiles, which lie one after the other, on their way through shared memory. A lane
// reads only what it has fetched itself, so nothing but its own copies is waited for.
class ValueRing {
  public:
    __device__ ValueRing(const NmLinear& op, const LinearPart& part, uint32_t ring, int per_word)
        : next_(static_cast<const unsigned char*>(op.values) + part.weight_tile * tile_value_bytes(per_word) +
                part.lane * 16),
          slots_(ring + static_cast<uint32_t>(part.warp * kRingDepth * kWarpChunkBytes + part.lane * 16)),
          left_(part.tiles * (per_word * kLaneWords / kChunkValues)) {
        MSP_UNROLL
        for (int i = 0; i < kRingDepth - 1; ++i) fetch(i * kWarpChunkBytes);
    }

    // The next chunk. The slot that the last one came from is free by now and is filled again.
    __device__ uint4 take() {
        ptx::cp_async_wait<kRingDepth - 2>();
        const uint4 chunk = ptx::load_shared16(slots_ + static_cast<uint32_t>(at_));
        fetch(at_ == 0 ? (kRingDepth - 1) * kWarpChunkBytes : at_ - kWarpChunkBytes);
        at_ = at_ == (kRingDepth - 1) * kWarpChunkBytes ? 0 : at_ + kWarpChunkBytes;
        return chunk;
    }

  private:
    __device__ void fetch(int slot) {
        if (left_ > 0) ptx::cp_async16(slots_ + static_cast<uint32_t>(slot), next_, 16);
        ptx::cp_async_commit();
        next_ += kWarpChunkBytes;
        --left_;
    }

    const unsigned char* next_;
    uint32_t slots_;
    int left_;
    int at_ = 0;
};

// The bitmask of a warp's tiles, one tile ahead.
class MaskStream {
  public:
    __device__ MaskStream(const NmLinear& op, const LinearPart& part)
        : next_(static_cast<const unsigned char*>(op.bitmask) + part.weight_tile * kTileMaskBytes +
                part.lane * 16),
          left_(part.tiles) {
        fetch();
    }

    __device__ void take(uint32_t (&words)[kLaneWords]) {
        words[0] = ahead_.x;
        words[1] = ahead_.y;
        words[2] = ahead_.z;
        words[3] = ahead_.w;
        fetch();
    }

  private:
    __device__ void fetch() {
        if (left_ > 0) ahead_ = ptx::load_once16(next_);
        next_ += kTileMaskBytes;
        --left_;
    }

    const unsigned char* next_;
    int left_;
    uint4 ahead_{};
};

// Copies the activations of the block's columns to where `place(block, token, word, byte)` says, 8 columns at
// a time; zeros for tokens that there are not.
template <int Tokens, class Place>
__device__ void stage_activations(const NmLinear& op, const LinearPart& part, uint32_t shared, Place place) {
    // a warp copies one tile of one token at a time: 32 pieces of 8 columns
    constexpr int kTokenWarps = Tokens < kLinearWarps ? Tokens : kLinearWarps;
    constexpr int kTileWarps = kLinearWarps / kTokenWarps;
    const int lane = part.lane, first = part.warp / kTokenWarps;
    const int tile_bytes = place(2, 0, 0, 0), token_bytes = place(0, 1, 0, 0);
    const int in_tile = place(lane / 16, 0, lane / 4 % 4, lane % 4);
    const auto* x = static_cast<const uint16_t*>(op.x) + lane * 8;
    // unrolled it would take registers from what follows
    MSP_ROLLED
    for (int i = 0; i < Tokens / kTokenWarps; ++i) {
        const int token = i * kTokenWarps + part.warp % kTokenWarps;
        const bool live = part.first_token + token < op.tokens;
        const int64_t row = live ? part.first_token + token : 0;
        const uint16_t* from = x + row * op.columns + (part.block_first_tile + first) * kTileColumns;
        uint32_t to = shared + static_cast<uint32_t>(in_tile + token * token_bytes + first * tile_bytes);
        for (int tile = first; tile < part.block_tiles; tile += kTileWarps) {
            ptx::cp_async16(to, from, live ? 16 : 0);
            to += static_cast<uint32_t>(kTileWarps * tile_bytes);
            from += kTileWarps * kTileColumns;
        }
    }
    ptx::cp_async_commit();
}

// Waits for the activations, which were asked for before the ring's first chunks, and for the other threads.
__device__ inline void wait_for_activations() {
    ptx::cp_async_wait<kRingDepth - 1>();
    __syncthreads();
}

template <Dtype D>
__device__ void store_rounded(const NmLinear& op, int token, int row, float sum) {
    if (op.bias != nullptr) sum += widen<D>(static_cast<const uint16_t*>(op.bias)[row]);
    static_cast<uint16_t*>(op.y)[static_cast<int64_t>(token) * op.rows + row] =
        static_cast<uint16_t>(ptx::pack2<D>(sum, 0.0f));
}

// Where a warp's sum of a row of its 16 goes, for the block to add up: at this distance from token to token
// the lanes that hold an mma's results meet in no bank. All of it fits the ring, which is done with by then.
constexpr int kSumStride = kTileRows + 4;
static_assert(kLinearWarps * 32 * kSumStride * 4 <= kRingBytes,
              "the sums of 32 tokens lie where the ring was");

MSP_HD constexpr int sum_place(int warp, int tokens, int token, int row) {
    return (warp * tokens + token) * kSumStride + row;
}

// Adds up what the warps put into `sums`, in order, and stores it.
template <Dtype D, int Tokens>
__device__ void finish(const NmLinear& op, const LinearPart& part, const float* sums) {
    __syncthreads();
    const int log_rows = op.log_stripes + 4, block_rows = 1 << log_rows;
    for (int i = static_cast<int>(threadIdx.x); i < Tokens << log_rows; i += kLinearThreads) {
        const int in_tokens = i >> log_rows, token = part.first_token + in_tokens;
        const int in_block = i & (block_rows - 1), row = part.first_stripe * kTileRows + in_block;
        if (token >= op.tokens || row >= op.rows) continue;
        float sum = 0.0f;
        for (int warp = in_block / kTileRows; warp < kLinearWarps; warp += op.stripes) {
            sum += sums[sum_place(warp, Tokens, in_tokens, in_block % kTileRows)];
        }
        if (op.splits == 1) {
            store_rounded<D>(op, token, row, sum);
        } else {
            op.partials[(static_cast<int64_t>(part.split) * op.tokens + token) * op.rows + row] = sum;
        }
    }
}

// Adds up the splits, in order.
template <Dtype D>
__global__ void __launch_bounds__(kLinearThreads) nm_linear_sum_kernel(const __grid_constant__ NmLinear op) {
    const int64_t outputs = static_cast<int64_t>(op.tokens) * op.rows;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kLinearThreads + threadIdx.x;
    if (i >= outputs) return;
    float sum = 0.0f;
    for (int split = 0; split < op.splits; ++split) sum += op.partials[split * outputs + i];
    store_rounded<D>(op, static_cast<int>(i / op.rows), static_cast<int>(i % op.rows), sum);
}

}  // namespace msp
