// Conversions and byte permutations as single instructions, on the device and on the host.
#pragma once

#include "../nm_score.h"

namespace msp {

// The number in the low half of `bits`.
template <Dtype D>
MSP_HD float widen(uint32_t bits) {
    if constexpr (D == Dtype::kBFloat16) {
        return float_from_bits(bits << 16);
    } else {
#if defined(__CUDA_ARCH__)
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
        return value;
#else
        return half_to_float(static_cast<uint16_t>(bits));
#endif
    }
}

// The number in the high half of `bits`.
template <Dtype D>
MSP_HD float widen_high(uint32_t bits) {
    if constexpr (D == Dtype::kBFloat16) {
        return float_from_bits(bits & 0xffff0000u);
    } else {
        return widen<D>(bits >> 16);
    }
}

// 9.7.9.7 prmt: byte i of the result is the byte of low (0-3) or high (4-7) that nibble i of `selector`
// names, whose highest bit must be 0. CUDA's own __byte_perm spends an instruction on clearing that bit.
MSP_HD uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
#else
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    }
    return result;
#endif
}

}  // namespace msp
