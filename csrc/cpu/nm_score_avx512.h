// Scores of 16 columns at a time. Only for files compiled for AVX-512 with VBMI2: everything here has
// internal linkage or is inlined.
#pragma once

#include <immintrin.h>

#include "../nm_score.h"
#include "fetch_ahead.h"

namespace msp {
namespace {

constexpr int kLanes = 16;

// 16 weights as stored, and their values. Lanes outside `live` are not touched in memory.
template <Dtype D>
struct Lanes;

template <>
struct Lanes<Dtype::kFloat32> {
    using Vector = __m512i;
    static MSP_HD Vector load(const uint32_t* from, __mmask16 live) {
        fetch_ahead(from);
        return _mm512_maskz_loadu_epi32(live, from);
    }
    static MSP_HD __m512 to_float(Vector v) { return _mm512_castsi512_ps(v); }
};

struct Lanes16 {
    using Vector = __m256i;
    static MSP_HD Vector load(const uint16_t* from, __mmask16 live) {
        fetch_ahead(from);
        return _mm256_maskz_loadu_epi16(live, from);
    }
};

template <>
struct Lanes<Dtype::kFloat16> : Lanes16 {
    static MSP_HD __m512 to_float(Vector v) { return _mm512_cvtph_ps(v); }
};

template <>
struct Lanes<Dtype::kBFloat16> : Lanes16 {
    static MSP_HD __m512 to_float(Vector v) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    }
};

MSP_HD __mmask16 not_finite(__m512 v) {
    return _mm512_fpclass_ps_mask(v, 0x99);
}  // quiet or signalling NaN, +-inf

MSP_HD __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(_bzhi_u32(0xffffu, count)); }

// 16 columns of a row: their weights and scores, zero in lanes outside `live`.
template <Dtype D, ScoreKind Kind>
struct ScoredLanes {
    typename Lanes<D>::Vector stored;
    __m512 weight;
    __m512 score;

    MSP_HD ScoredLanes(const Scored& op, int64_t row, float row_term, int64_t column, __mmask16 live) {
        const int64_t offset = row * op.columns + column;
        stored = Lanes<D>::load(static_cast<const typename Stored<D>::Bits*>(op.weight) + offset, live);
        weight = Lanes<D>::to_float(stored);
        score = _mm512_abs_ps(weight);
        if constexpr (Kind == ScoreKind::kRelative) {
            const __m512 column_term = _mm512_maskz_loadu_ps(live, op.column_term + column);
            score = _mm512_mul_ps(score, _mm512_add_ps(_mm512_set1_ps(row_term), column_term));
        }
        if constexpr (Kind == ScoreKind::kScaled || Kind == ScoreKind::kRelative) {
            if (Kind == ScoreKind::kScaled || op.column_scale != nullptr) {
                score = _mm512_mul_ps(score, _mm512_maskz_loadu_ps(live, op.column_scale + column));
            }
        }
        if constexpr (Kind == ScoreKind::kFisher || Kind == ScoreKind::kGiven) {
            fetch_ahead(op.matrix + offset);
            const __m512 entry = _mm512_maskz_loadu_ps(live, op.matrix + offset);
            score = Kind == ScoreKind::kGiven ? entry : _mm512_mul_ps(_mm512_mul_ps(weight, weight), entry);
        }
    }

    // Lanes whose weight or score is not finite; except for a given score, a wrong weight makes a wrong
    // score.
    MSP_HD __mmask16 wrong() const {
        return Kind == ScoreKind::kGiven ? not_finite(score) | not_finite(weight) : not_finite(score);
    }
};

}  // namespace
}  // namespace msp
