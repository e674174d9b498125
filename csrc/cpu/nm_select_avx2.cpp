// Compiled for AVX2 with F16C (see CMakeLists.txt) and only called where the CPU has them. Everything here
// has internal linkage or is inlined: no code of this file may serve another.
#include <immintrin.h>

#include <cstring>

#include "nm_select_scalar.h"

namespace msp {
namespace {

constexpr int kLanes = 8;

// compact.index[mask][i] is the lane of the i-th bit set in the mask.
struct Compact {
    alignas(64) uint8_t index[256][8];
};

constexpr Compact make_compact() {
    Compact table{};
    for (int mask = 0; mask < 256; ++mask) {
        int place = 0;
        for (int lane = 0; lane < 8; ++lane) {
            if (mask >> lane & 1) table.index[mask][place++] = static_cast<uint8_t>(lane);
        }
    }
    return table;
}

constexpr Compact compact = make_compact();

MSP_HD __m128i compact_index(unsigned mask) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(compact.index[mask]));
}

// 8 weights as stored; `compress` moves those in the mask to the front.
template <Dtype D>
struct Lanes;

template <>
struct Lanes<Dtype::kFloat32> {
    using Vector = __m256i;
    static MSP_HD Vector load(const uint32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static MSP_HD __m256 to_float(Vector v) { return _mm256_castsi256_ps(v); }
    static MSP_HD Vector compress(Vector v, unsigned mask) {
        return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(compact_index(mask)));
    }
    static MSP_HD void store(uint32_t* to, Vector v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
    }
};

struct Lanes16 {
    using Vector = __m128i;
    static MSP_HD Vector load(const uint16_t* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static MSP_HD Vector compress(Vector v, unsigned mask) {
        const __m128i lane = compact_index(mask);
        const __m128i byte = _mm_slli_epi16(_mm_unpacklo_epi8(lane, lane), 1);  // no carry: lanes are below 8
        return _mm_shuffle_epi8(v, _mm_add_epi8(byte, _mm_set1_epi16(0x0100)));
    }
    static MSP_HD void store(uint16_t* to, Vector v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }
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

// How many keys of its group of M beat each key, ties to the lower column. A group, or two of 4, is in
// `count` vectors. Every column is held against every other: with 8 lanes that costs no more than a sort.
template <int M, int count>
MSP_HD void rank(const __m256i (&keys)[count], __m256i (&ranks)[count]) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i group = M == 4 ? _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4) : _mm256_setzero_si256();
    for (int v = 0; v < count; ++v) ranks[v] = _mm256_setzero_si256();
    for (int column = 0; column < M; ++column) {
        const __m256i source = _mm256_add_epi32(group, _mm256_set1_epi32(column % kLanes));
        const __m256i other = _mm256_permutevar8x32_epi32(keys[column / kLanes], source);
        for (int v = 0; v < count; ++v) {
            // one less where the other is the lower column, so that "greater" is true of equals too
            const __m256i bound =
                v == column / kLanes
                    ? _mm256_add_epi32(keys[v], _mm256_cmpgt_epi32(lane, source))
                    : _mm256_sub_epi32(keys[v], _mm256_set1_epi32(v > column / kLanes ? 1 : 0));
            ranks[v] = _mm256_sub_epi32(ranks[v], _mm256_cmpgt_epi32(other, bound));
        }
    }
}

struct Avx2 {
    template <Dtype D, ScoreKind Kind>
    static MSP_HD __m256 score_of(const NmSelect& op, int64_t offset, float row_term, int64_t column,
                                  __m256 w) {
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
            const __m256 entry = _mm256_loadu_ps(op.matrix + offset);
            score = Kind == ScoreKind::kGiven ? entry : _mm256_mul_ps(_mm256_mul_ps(w, w), entry);
        }
        return score;
    }

    // ordered_key() of each lane; adding zero turns -0 into +0.
    static MSP_HD __m256i ordered_keys(__m256 score) {
        const __m256i bits = _mm256_castps_si256(_mm256_add_ps(score, _mm256_setzero_ps()));
        return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
    }

    template <Dtype D, int M, ScoreKind Kind>
    static int64_t run(const NmSelect& op, int64_t begin, int64_t end) {
        using Bits = typename Stored<D>::Bits;
        constexpr int kVectors = unit_columns(M) / kLanes;
        const int64_t row_values = values_per_row(op.columns, M, op.n);
        Bits* value = static_cast<Bits*>(op.values) + begin * row_values;
        Bits* const values_end = static_cast<Bits*>(op.values) + end * row_values;
        const int64_t whole = op.columns / unit_columns(M) * unit_columns(M);
        const __m256i n = _mm256_set1_epi32(op.n);
        int64_t wrong = 0;
        for (int64_t row = begin; row < end; ++row) {
            const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
            uint8_t* byte = op.bitmask + row * bitmask_row_bytes(op.columns);
            for (int64_t column = 0; column < whole; column += unit_columns(M)) {
                typename Lanes<D>::Vector stored[kVectors];
                __m256i keys[kVectors], ranks[kVectors];
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t first = column + v * kLanes;
                    const int64_t offset = row * op.columns + first;
                    stored[v] = Lanes<D>::load(static_cast<const Bits*>(op.weight) + offset);
                    const __m256 w = Lanes<D>::to_float(stored[v]);
                    const __m256 score = score_of<D, Kind>(op, offset, row_term, first, w);
                    unsigned not_finite_here = not_finite(score);
                    if constexpr (Kind == ScoreKind::kGiven) not_finite_here |= not_finite(w);
                    wrong += __builtin_popcount(not_finite_here);
                    keys[v] = ordered_keys(score);
                    if (op.compliant) {
                        const __m256i all[1] = {keys[v]};
                        __m256i quad_rank[1];
                        rank<4>(all, quad_rank);
                        const __m256i out = _mm256_cmpgt_epi32(quad_rank[0], _mm256_set1_epi32(1));
                        keys[v] = _mm256_blendv_epi8(keys[v], _mm256_set1_epi32(kRuledOut), out);
                    }
                }
                rank<M>(keys, ranks);
                for (int v = 0; v < kVectors; ++v) {
                    const unsigned kept = bits_of(_mm256_cmpgt_epi32(n, ranks[v]));
                    const auto packed = Lanes<D>::compress(stored[v], kept);
                    const int count = __builtin_popcount(kept);
                    // what a full store leaves behind the kept ones is overwritten by the next
                    if (values_end - value >= kLanes) {
                        Lanes<D>::store(value, packed);
                    } else {
                        Bits last[kLanes];
                        Lanes<D>::store(last, packed);
                        std::memcpy(value, last, count * sizeof(Bits));
                    }
                    value += count;
                    *byte++ = static_cast<uint8_t>(kept);
                }
            }
            if constexpr (M == 4) wrong += nm_select_columns<D, M, Kind>(op, row, whole, op.columns, value);
        }
        return wrong;
    }
};

}  // namespace

int64_t nm_select_rows_avx2(const NmSelect& op, int64_t begin, int64_t end) {
    return specialise<Avx2>(op, begin, end);
}

}  // namespace msp
