// nm_linear for the fewest tokens: for each kept weight, find its column in the bitmask, read that activation
// from shared memory, multiply. Serves every N:M.
#pragma once

#include "nm_linear_block.h"

namespace msp {

MSP_HD constexpr int gather_activation_bytes(int tiles, int tokens) {
    return gather_offset(tiles * (kTileColumns / kBlockColumns), 0, 0, 0, tokens);
}

// The values of a lane's words, `Step` at a time: a divisor of 8 and of the values of a word.
template <int Step>
class ValueSteps {
  public:
    __device__ explicit ValueSteps(const ValueRing& ring) : ring_(ring) {}

    __device__ void take(uint32_t (&pairs)[Step / 2]) {
        if (left_ == 0) {
            const uint4 chunk = ring_.take();
            chunk_[0] = chunk.x;
            chunk_[1] = chunk.y;
            chunk_[2] = chunk.z;
            chunk_[3] = chunk.w;
            left_ = kChunkValues;
        }
        MSP_UNROLL
        for (int i = 0; i < Step / 2; ++i) pairs[i] = chunk_[i];
        MSP_UNROLL
        for (int i = 0; i + Step / 2 < 4; ++i) chunk_[i] = chunk_[i + Step / 2];
        left_ -= Step;
    }

  private:
    ValueRing ring_;
    uint32_t chunk_[4] = {};
    int left_ = 0;
};

// Adds the products of `Step` kept weights of one word. `bits` is the word's bitmask, first column highest;
// `x` the activations of its columns.
template <Dtype D, int Step, int Tokens>
__device__ void add_products(const uint32_t (&pairs)[Step / 2], uint32_t& bits, const unsigned char* x,
                             float (&sums)[Tokens]) {
    MSP_UNROLL
    for (int i = 0; i < Step; ++i) {
        const uint32_t pair = pairs[i / 2];
        const float weight = i % 2 == 0 ? widen<D>(pair & 0xffffu) : widen_high<D>(pair);
        const int column = __clz(static_cast<int>(bits));
        bits &= ~(0x80000000u >> column);
        MSP_UNROLL
        for (int token = 0; token < Tokens; ++token) {
            const auto* at = x + 2 * column + gather_offset(0, token, 0, 0, Tokens);
            const uint32_t activation = *reinterpret_cast<const uint16_t*>(at);
            sums[token] = __fmaf_rn(weight, widen<D>(activation), sums[token]);
        }
    }
}

// The values that the gather takes at a time.
MSP_HD constexpr int gather_step(int group_size, int n) {
    const int per_word = 32 / group_size * n;
    return per_word % 8 == 0 ? 8 : per_word % 4 == 0 ? 4 : 2;
}

template <Dtype D, int Step, int Tokens>
__device__ void gather(const NmLinear& op, int block) {
    unsigned char* shared = ptx::dynamic_shared();
    const unsigned char* activations = shared + kRingBytes;
    const LinearPart part(op, block);
    const int per_word = op.per_word;
    stage_activations<Tokens>(op, part, ptx::shared_address(activations),
                              [](int block, int token, int word, int byte) {
                                  return gather_offset(block, token, word, 8 * byte, Tokens);
                              });
    ValueSteps<Step> values(ValueRing(op, part, ptx::shared_address(shared), per_word));
    MaskStream masks(op, part);
    wait_for_activations();

    float sums[2][Tokens] = {};  // of rows lane/4 and lane/4 + 8
    const unsigned char* x = activations + gather_offset((part.first_tile - part.block_first_tile) * 2, 0,
                                                         part.lane % 4, 0, Tokens);
    for (int tile = 0; tile < part.tiles; ++tile) {
        uint32_t words[kLaneWords];
        masks.take(words);
        MSP_UNROLL
        for (int word = 0; word < kLaneWords; ++word) {
            uint32_t bits = __brev(words[word]);
            for (int i = 0; i < per_word; i += Step) {
                uint32_t pairs[Step / 2];
                values.take(pairs);
                add_products<D, Step, Tokens>(pairs, bits, x + gather_offset(word / 2, 0, 0, 0, Tokens),
                                              sums[word % 2]);
            }
        }
        x += gather_offset(2, 0, 0, 0, Tokens);
    }
    ptx::cp_async_wait<0>();

    __syncthreads();  // the ring is done with
    auto* warp_sums = reinterpret_cast<float*>(shared);
    MSP_UNROLL
    for (int half = 0; half < 2; ++half) {
        MSP_UNROLL
        for (int token = 0; token < Tokens; ++token) {
            float sum = sums[half][token];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (part.lane % 4 == 0) {
                warp_sums[sum_place(part.warp, Tokens, token, part.lane / 4 + 8 * half)] = sum;
            }
        }
    }
    finish<D, Tokens>(op, part, reinterpret_cast<const float*>(shared));
}

template <Dtype D, int Step, int Tokens>
__global__ void __launch_bounds__(kLinearThreads, 3)
    nm_linear_gather_kernel(const __grid_constant__ NmLinear op) {
    gather<D, Step, Tokens>(op, static_cast<int>(blockIdx.x));
}

// A block works on one of the weights, so all its threads take the same way.
template <Dtype D, int Tokens>
__global__ void __launch_bounds__(kLinearThreads, 3)
    nm_linear_group_kernel(const __grid_constant__ NmLinearGroup group) {
    int block = static_cast<int>(blockIdx.x), at = 0;
    while (block >= group.blocks[at]) block -= group.blocks[at++];
    const NmLinear& op = group.linears[at];
    switch (gather_step(op.group_size, op.n)) {
        case 8:
            return gather<D, 8, Tokens>(op, block);
        case 4:
            return gather<D, 4, Tokens>(op, block);
        default:
            return gather<D, 2, Tokens>(op, block);
    }
}

}  // namespace msp
