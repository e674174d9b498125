// 16-bit numbers to fp32, on the device and on the host.
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

}  // namespace msp
