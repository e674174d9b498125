// Compiled for AVX2 with F16C (see CMakeLists.txt) and only called if the CPU has them. Everything here has
// internal linkage or is inlined: no other file may use the code of this one.
#include <immintrin.h>

#include <cstring>

#include "nm_score_avx2.h"
#include "nm_select_scalar.h"
#include "specialise.h"

namespace msp {
namespace {

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

// The weights in the mask, moved to the front, and a store of a whole vector.
MSP_HD __m256i compress(__m256i v, unsigned mask) {
    return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(compact_index(mask)));
}

MSP_HD __m128i compress(__m128i v, unsigned mask) {
    const __m128i lane = compact_index(mask);
    const __m128i byte = _mm_slli_epi16(_mm_unpacklo_epi8(lane, lane), 1);  // no carry: lanes are below 8
    return _mm_shuffle_epi8(v, _mm_add_epi8(byte, _mm_set1_epi16(0x0100)));
}

MSP_HD void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
MSP_HD void store(void* to, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(to), v); }

struct Avx2 {
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
                    const __m256 score = score_of<Kind>(op, offset, row_term, first, w);
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
                    const auto packed = compress(stored[v], kept);
                    const int count = __builtin_popcount(kept);
                    // the next store overwrites the part of a full store after the kept weights
                    if (values_end - value >= kLanes) {
                        store(value, packed);
                    } else {
                        Bits last[kLanes];
                        store(last, packed);
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
