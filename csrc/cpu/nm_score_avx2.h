// Scores and ranks of 8 columns at a time. Only for files compiled for AVX2 with F16C: everything here has
// internal linkage or is inlined.
#pragma once

#include <immintrin.h>

#include "../nm_score.h"
#include "fetch_ahead.h"

namespace msp {
namespace {

constexpr int kLanes = 8;

// 8 weights as stored, and their values.
template <Dtype D>
struct Lanes;

template <>
struct Lanes<Dtype::kFloat32> {
    using Vector = __m256i;
    static MSP_HD Vector load(const uint32_t* from) {
        fetch_ahead(from);
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static MSP_HD __m256 to_float(Vector v) { return _mm256_castsi256_ps(v); }
};

struct Lanes16 {
    using Vector = __m128i;
    static MSP_HD Vector load(const uint16_t* from) {
        fetch_ahead(from);
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
};

template <>
struct Lanes<Dtype::kFloat16> : Lanes16 {
    static MSP_HD __m256 to_float(Vector v) { return _mm256_cvtph_ps(v); }
};

template <>
struct Lanes<Dtype::kBFloat16> : Lanes16 {
    static MSP_HD __m256 to_float(Vector v) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
};

MSP_HD unsigned bits_of(__m256i lanes) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}

MSP_HD unsigned not_finite(__m256 v) {
    const __m256i infinity = _mm256_set1_epi32(0x7f800000);
    const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(v), infinity);
    return bits_of(_mm256_cmpeq_epi32(exponent, infinity));
}

// The number of keys of its group of M that beat each key, ties to the lower column. A group, or two of 4, is
// in `count` vectors. Every column is compared with every other: with 8 lanes that costs no more than a sort.
template <int M, int count>
MSP_HD void rank(const __m256i (&keys)[count], __m256i (&ranks)[count]) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i group = M == 4 ? _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4) : _mm256_setzero_si256();
    for (int v = 0; v < count; ++v) ranks[v] = _mm256_setzero_si256();
    for (int column = 0; column < M; ++column) {
        const __m256i source = _mm256_add_epi32(group, _mm256_set1_epi32(column % kLanes));
        const __m256i other = _mm256_permutevar8x32_epi32(keys[column / kLanes], source);
        for (int v = 0; v < count; ++v) {
            // one less if the other is the lower column, so that "greater" is also true for equal keys
            const __m256i bound =
                v == column / kLanes
                    ? _mm256_add_epi32(keys[v], _mm256_cmpgt_epi32(lane, source))
                    : _mm256_sub_epi32(keys[v], _mm256_set1_epi32(v > column / kLanes ? 1 : 0));
            ranks[v] = _mm256_sub_epi32(ranks[v], _mm256_cmpgt_epi32(other, bound));
        }
    }
}

// The scores of 8 columns, `offset` weights from the first of all.
template <ScoreKind Kind>
MSP_HD __m256 score_of(const Scored& op, int64_t offset, float row_term, int64_t column, __m256 w) {
    __m256 score = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), w);
    if constexpr (Kind == ScoreKind::kRelative) {
        const __m256 column_term = _mm256_loadu_ps(op.column_term + column);
        score = _mm256_mul_ps(score, _mm256_add_ps(_mm256_set1_ps(row_term), column_term));
    }
    if constexpr (Kind == ScoreKind::kScaled || Kind == ScoreKind::kRelative) {
        if (Kind == ScoreKind::kScaled || op.column_scale != nullptr) {
            score = _mm256_mul_ps(score, _mm256_loadu_ps(op.column_scale + column));
        }
    }
    if constexpr (Kind == ScoreKind::kFisher || Kind == ScoreKind::kGiven) {
        fetch_ahead(op.matrix + offset);
        const __m256 entry = _mm256_loadu_ps(op.matrix + offset);
        score = Kind == ScoreKind::kGiven ? entry : _mm256_mul_ps(_mm256_mul_ps(w, w), entry);
    }
    return score;
}

// ordered_key() of each lane; adding zero turns -0 into +0.
MSP_HD __m256i ordered_keys(__m256 score) {
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(score, _mm256_setzero_ps()));
    return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
}

}  // namespace
}  // namespace msp
