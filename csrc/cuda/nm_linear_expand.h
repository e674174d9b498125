// nm_linear for up to a few dozen tokens: the kept weights of a tile become A fragments of mma.m16n8k16 in
// registers, tokens are the N side. Serves groups whose values a byte permutation can place: M = 4 and 8, and
// up to four of 16 or 32.
#pragma once

#include "nm_linear_block.h"

namespace msp {

MSP_HD constexpr int expand_activation_bytes(int tiles, int tokens) {
    return fragment_offset(tiles * (kTileColumns / kBlockColumns), 0, 0, 0, tokens);
}

// Turns a byte of the bitmask and the values it names into the weights of 8 columns. A unit is as many
// columns as keep `PerUnit` values for certain: 8, or a group of more.
template <int Unit, int PerUnit>
struct Expander {
    static constexpr bool kWithKeep = PerUnit >= 4;
    static constexpr int kPerWord = 32 / Unit * PerUnit;
    static_assert(Unit == 8 || PerUnit <= 4, "a window is four values wide");

    // Fills the table; entry after entry, copies turned so that a warp's stores meet in no bank.
    static __device__ void build(unsigned char* table) {
        const auto byte = static_cast<uint32_t>(threadIdx.x);
        const ExpandEntry entry = expand_entry(byte);
        MSP_UNROLL
        for (int i = 0; i < (kWithKeep ? 8 : 16); ++i) {
            unsigned char* at = table + expand_offset(byte, static_cast<int>(byte) + i, kWithKeep);
            if constexpr (kWithKeep) {
                *reinterpret_cast<uint4*>(at) =
                    make_uint4(entry.selectors[0], entry.selectors[1], entry.keep[0], entry.keep[1]);
            } else {
                *reinterpret_cast<uint2*>(at) = make_uint2(entry.selectors[0], entry.selectors[1]);
            }
        }
    }

    // Values `first` and `first` + 1 of the pairs in `values`.
    template <int Count>
    static __device__ uint32_t window(const uint32_t (&values)[Count], int first) {
        const uint32_t low = values[first / 2];
        if (first % 2 == 0) return low;
        return permute_bytes(low, first / 2 + 1 < Count ? values[first / 2 + 1] : 0u, 0x5432);
    }

    // The weights of the 8 columns of byte `byte` of `word`, whose values start at value `first`.
    template <int Count>
    static __device__ void expand(const unsigned char* lane_table, const uint32_t (&values)[Count], int first,
                                  uint32_t word, int byte, uint32_t (&weights)[4]) {
        first += byte / (Unit / 8) * PerUnit;
        uint32_t low = window(values, first);
        uint32_t high = PerUnit > 2 ? window(values, first + 2) : 0u;
        // what is no value of this unit must read as 0
        if (PerUnit == 1 && Unit > 8) low &= 0xffffu;
        if (PerUnit == 3) high &= 0xffffu;
        uint32_t last_low = low, last_high = high;
        if constexpr (PerUnit > 4) {
            last_low = window(values, first + PerUnit - 4);
            last_high = window(values, first + PerUnit - 2);
        }
        if (byte % (Unit / 8) != 0) {
            // values of the unit's lower bytes go past the end
            const uint32_t below = (1u << 8 * byte) - (1u << 8 * (byte - byte % (Unit / 8)));
            const int shift = 16 * __popc(word & below) & 48;  // 64 keeps nothing, so it may be 0
            const uint64_t shifted = (static_cast<uint64_t>(high) << 32 | low) >> shift;
            last_low = low = static_cast<uint32_t>(shifted);
            last_high = high = static_cast<uint32_t>(shifted >> 32);
        }
        // 128 bytes an entry: the byte's offset in the table comes with one shift
        const uint32_t offset = (byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80u;
        uint32_t selectors[2], keep[2] = {};
        if constexpr (kWithKeep) {
            const uint4 entry = *reinterpret_cast<const uint4*>(lane_table + offset);
            selectors[0] = entry.x, selectors[1] = entry.y, keep[0] = entry.z, keep[1] = entry.w;
        } else {
            const uint2 entry = *reinterpret_cast<const uint2*>(lane_table + offset);
            selectors[0] = entry.x, selectors[1] = entry.y;
        }
        MSP_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
            const uint32_t selector = selectors[pair / 2] >> (pair % 2 * 16);
            weights[pair] =
                pair < 2 ? permute_bytes(low, high, selector) : permute_bytes(last_low, last_high, selector);
            if (kWithKeep)
                weights[pair] &= permute_bytes(keep[pair / 2], 0u, pair % 2 == 0 ? 0x1100 : 0x3322);
        }
    }
};

template <Dtype D, int Unit, int PerUnit, int Tokens>
__global__ void __launch_bounds__(kLinearThreads, 2)
    nm_linear_expand_kernel(const __grid_constant__ NmLinear op) {
    using Expand = Expander<Unit, PerUnit>;
    constexpr int kPerWord = Expand::kPerWord;
    // blocks of 128 columns whose values are whole chunks
    constexpr int kBlocks = 2 * kPerWord % kChunkValues == 0 ? 1 : 2;
    constexpr int kPairs = kBlocks * 2 * kPerWord / 2;

    unsigned char* shared = ptx::dynamic_shared();
    unsigned char* table = shared + kRingBytes;
    const uint32_t activations = ptx::shared_address(table + kExpandTableBytes);
    const LinearPart part(op, static_cast<int>(blockIdx.x));
    stage_activations<Tokens>(op, part, activations, [](int block, int token, int word, int byte) {
        return fragment_offset(block, byte, token, word, Tokens);
    });
    ValueRing ring(op, part, ptx::shared_address(shared), kPerWord);
    MaskStream masks(op, part);
    Expand::build(table);
    wait_for_activations();

    float sums[Tokens / 8][4] = {};
    const unsigned char* lane_table = table + expand_offset(0, part.lane, Expand::kWithKeep);
    uint32_t x =
        activations + static_cast<uint32_t>(fragment_offset((part.first_tile - part.block_first_tile) * 2, 0,
                                                            part.lane / 4, part.lane % 4, Tokens));
    for (int tile = 0; tile < part.tiles; ++tile) {
        uint32_t words[kLaneWords];
        masks.take(words);
        MSP_UNROLL
        for (int first = 0; first < 2; first += kBlocks) {
            uint32_t values[kPairs];
            MSP_UNROLL
            for (int i = 0; i < kPairs / 4; ++i) {
                const uint4 chunk = ring.take();
                values[4 * i] = chunk.x;
                values[4 * i + 1] = chunk.y;
                values[4 * i + 2] = chunk.z;
                values[4 * i + 3] = chunk.w;
            }
            MSP_UNROLL
            for (int i = 0; i < kBlocks * 4; ++i) {
                const int block = first + i / 4, byte = i % 4;
                uint32_t upper[4], lower[4];
                Expand::expand(lane_table, values, i / 4 * 2 * kPerWord, words[2 * block], byte, upper);
                Expand::expand(lane_table, values, (i / 4 * 2 + 1) * kPerWord, words[2 * block + 1], byte,
                               lower);
                MSP_UNROLL
                for (int eight = 0; eight < Tokens / 8; ++eight) {
                    const int offset = fragment_offset(block, byte, 8 * eight, 0, Tokens);
                    const uint4 b = ptx::load_shared16(x + static_cast<uint32_t>(offset));
                    ptx::mma_m16n8k16<D>(sums[eight], {upper[0], lower[0], upper[1], lower[1]}, {b.x, b.y});
                    ptx::mma_m16n8k16<D>(sums[eight], {upper[2], lower[2], upper[3], lower[3]}, {b.z, b.w});
                }
            }
        }
        x += static_cast<uint32_t>(fragment_offset(2, 0, 0, 0, Tokens));
    }
    ptx::cp_async_wait<0>();

    __syncthreads();  // the ring is done with
    auto* warp_sums = reinterpret_cast<float*>(shared);
    MSP_UNROLL
    for (int i = 0; i < Tokens / 2; ++i) {
        const int token = i / 4 * 8 + part.lane % 4 * 2 + i % 2, row = part.lane / 4 + i / 2 % 2 * 8;
        warp_sums[sum_place(part.warp, Tokens, token, row)] = sums[i / 4][i % 4];
    }
    finish<D, Tokens>(op, part, reinterpret_cast<const float*>(shared));
}

}  // namespace msp
