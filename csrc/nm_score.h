// Scores of single weights, in fp32 and in one fixed order of operations, so that every backend keeps the
// same weights bit for bit. Files that include this are compiled without contraction to FMA.
#pragma once

#include <cstring>

#include "nm_format.h"

namespace msp {

// The score: |w|; |w| s_j; (|w| (r_i + c_j)) s_j; (w w) F_ij; given. The numbers are those of the binding.
enum class ScoreKind : int { kMagnitude = 0, kScaled = 1, kRelative = 2, kFisher = 3, kGiven = 4 };

MSP_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

MSP_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

MSP_HD float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    // Exponent and mantissa shifted into place are exactly 2^-112 of the value, also for subnormals; infinity
    // and NaN would come out finite.
    if (rest >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | rest << 13);
    return float_from_bits(sign | float_bits(float_from_bits(rest << 13) * 0x1p112f));
}

// A weight as it is stored, by dtype, and its value in fp32.
template <Dtype D>
struct Stored;

template <>
struct Stored<Dtype::kFloat32> {
    using Bits = uint32_t;
    static MSP_HD float to_float(uint32_t bits) { return float_from_bits(bits); }
};

template <>
struct Stored<Dtype::kFloat16> {
    using Bits = uint16_t;
    static MSP_HD float to_float(uint16_t bits) { return half_to_float(bits); }
};

template <>
struct Stored<Dtype::kBFloat16> {
    using Bits = uint16_t;
    static MSP_HD float to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

// A weight and the terms of its scores. The caller has checked everything; pointers are to contiguous
// row-major data.
struct Scored {
    const void* weight;  // [rows, columns]
    Dtype dtype;
    int64_t rows;
    int64_t columns;  // a multiple of group_size
    int group_size;   // 4, 8, 16 or 32
    ScoreKind kind;
    const float* column_scale;  // [columns]; may be null for kRelative, which then takes 1
    const float* row_term;      // [rows]
    const float* column_term;   // [columns]
    const float* matrix;        // [rows, columns]
};

// A kind ignores the terms that it does not use.
template <ScoreKind Kind>
MSP_HD float score(float w, float column_scale, float row_term, float column_term, float matrix) {
    const float magnitude = float_from_bits(float_bits(w) & 0x7fffffffu);
    if constexpr (Kind == ScoreKind::kMagnitude) return magnitude;
    if constexpr (Kind == ScoreKind::kScaled) return magnitude * column_scale;
    if constexpr (Kind == ScoreKind::kRelative) return (magnitude * (row_term + column_term)) * column_scale;
    if constexpr (Kind == ScoreKind::kFisher) return (w * w) * matrix;
    return matrix;
}

}  // namespace msp
