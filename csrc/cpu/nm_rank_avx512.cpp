// Compiled for AVX-512 with VBMI2 (see CMakeLists.txt) and only called if the CPU has it. Everything here has
// internal linkage or is inlined: no other file may use the code of this one.
//
// 16 groups are ranked at once, and a vector holds one column of all of them. Every pair of columns is
// compared once, and the lower column wins a tie.
#include "nm_rank.h"
#include "nm_rank_scalar.h"
#include "nm_score_avx512.h"
#include "specialise.h"
#include "transpose_avx512.h"

namespace msp {
namespace {

// Not std::clamp, which could become a symbol that the linker gives to other files.
MSP_HD int64_t at_most(int64_t count, int64_t most) { return count < 0 ? 0 : count > most ? most : count; }

// Turns vectors of 16 consecutive columns into vectors of one column of 16 groups, and dwords of four ranks
// for each group and four columns into bytes in their order in memory.
template <int M>
struct Columns;

template <>
struct Columns<4> {
    static MSP_HD void gather(__m512i (&v)[4]) { transpose_dwords(v[0], v[1], v[2], v[3]); }
    static MSP_HD void scatter(__m512i (&ranks)[1]) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        ranks[0] = _mm512_permutexvar_epi32(order, ranks[0]);
    }
};

template <>
struct Columns<8> {
    static MSP_HD void gather(__m512i (&v)[8]) {
        transpose_dwords(v[0], v[1], v[2], v[3]);
        transpose_dwords(v[4], v[5], v[6], v[7]);
        for (int c = 0; c < 4; ++c) {
            const __m512i first = v[c], second = v[c + 4];
            v[c] = _mm512_shuffle_i32x4(first, second, 0x88);
            v[c + 4] = _mm512_shuffle_i32x4(first, second, 0xdd);
        }
    }
    static MSP_HD void scatter(__m512i (&ranks)[2]) {
        // group 8 p + 2 v + h is in dword v of lane 2 p + h
        const __m512i order = _mm512_setr_epi32(0, 16, 4, 20, 1, 17, 5, 21, 2, 18, 6, 22, 3, 19, 7, 23);
        const __m512i rest = _mm512_add_epi32(order, _mm512_set1_epi32(8));
        const __m512i first = ranks[0];
        ranks[0] = _mm512_permutex2var_epi32(first, order, ranks[1]);
        ranks[1] = _mm512_permutex2var_epi32(first, rest, ranks[1]);
    }
};

template <>
struct Columns<16> {
    static MSP_HD void gather(__m512i (&v)[16]) { transpose(v); }
    static MSP_HD void scatter(__m512i (&ranks)[4]) {
        transpose_dwords(ranks[0], ranks[1], ranks[2], ranks[3]);
        transpose_lanes(ranks[0], ranks[1], ranks[2], ranks[3]);
    }
};

template <>
struct Columns<32> {
    static MSP_HD void gather(__m512i (&v)[32]) {
        __m512i halves[2][16];
        for (int i = 0; i < 32; ++i) halves[i % 2][i / 2] = v[i];
        for (int half = 0; half < 2; ++half) {
            Columns<16>::gather(halves[half]);
            for (int c = 0; c < 16; ++c) v[half * 16 + c] = halves[half][c];
        }
    }
    static MSP_HD void scatter(__m512i (&ranks)[8]) {
        const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i rest = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        __m512i first[4] = {ranks[0], ranks[1], ranks[2], ranks[3]};
        __m512i second[4] = {ranks[4], ranks[5], ranks[6], ranks[7]};
        Columns<16>::scatter(first);
        Columns<16>::scatter(second);
        for (int q = 0; q < 4; ++q) {
            ranks[2 * q] = _mm512_permutex2var_epi64(first[q], order, second[q]);
            ranks[2 * q + 1] = _mm512_permutex2var_epi64(first[q], rest, second[q]);
        }
    }
};

// Bits of magnitudes order as integers, for any treatment of subnormal floats by the processor.
template <bool Magnitude>
MSP_HD __mmask16 not_less(__m512i a, __m512i b) {
    if constexpr (Magnitude) return _mm512_cmpge_epi32_mask(a, b);
    return _mm512_cmp_ps_mask(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _CMP_GE_OQ);
}

// For 16 groups, the ranks of four columns in the bytes of each dword. At first all later columns count as
// better; each comparison with the opposite result moves one place from the earlier to the later column.
template <bool Magnitude, int M>
MSP_HD void rank_pairs(const __m512i (&keys)[M], __m512i (&ranks)[M / 4]) {
    const auto at = [](int column) { return 1 << 8 * column; };
    for (int p = 0; p < M / 4; ++p) {
        const int last = M - 1 - 4 * p;
        ranks[p] =
            _mm512_set1_epi32(last * at(0) + (last - 1) * at(1) + (last - 2) * at(2) + (last - 3) * at(3));
    }
    for (int p = 0; p < M / 4; ++p) {
        __m512i earlier = ranks[p];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) {
#pragma GCC unroll 4
            for (int b = a + 1; b < 4; ++b) {
                const __mmask16 better = not_less<Magnitude>(keys[4 * p + a], keys[4 * p + b]);
                earlier = _mm512_mask_add_epi32(earlier, better, earlier, _mm512_set1_epi32(at(b) - at(a)));
            }
        }
        for (int q = p + 1; q < M / 4; ++q) {
            __m512i later = ranks[q];
#pragma GCC unroll 4
            for (int a = 0; a < 4; ++a) {
#pragma GCC unroll 4
                for (int b = 0; b < 4; ++b) {
                    const __mmask16 better = not_less<Magnitude>(keys[4 * p + a], keys[4 * q + b]);
                    earlier = _mm512_mask_sub_epi32(earlier, better, earlier, _mm512_set1_epi32(at(a)));
                    later = _mm512_mask_add_epi32(later, better, later, _mm512_set1_epi32(at(b)));
                }
            }
            ranks[q] = later;
        }
        ranks[p] = earlier;
    }
}

// Large groups are not inlined: their code is long and the same for every dtype and most scores.
template <bool Magnitude, int M>
__attribute__((noinline)) void rank_pairs_apart(const __m512i (&keys)[M], __m512i (&ranks)[M / 4]) {
    rank_pairs<Magnitude, M>(keys, ranks);
}

struct Avx512 {
    // `op` is a copy of its own, so that stores through a byte pointer cannot change it.
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t row(const NmRank op, int64_t row) {
        constexpr int64_t kBlock = 16 * M;
        __m512 taint = _mm512_setzero_ps();
        int64_t column = 0;
        for (; column + kBlock <= op.columns; column += kBlock) {
            rank_block<D, M, Kind, true>(op, row, column, taint);
        }
        if (column < op.columns) rank_block<D, M, Kind, false>(op, row, column, taint);
        if (__builtin_expect(not_finite(taint) == 0, 1)) return 0;
        return count_not_finite<D, M, Kind>(op, row);
    }

    // 16 groups, or the rest of the row. NaN in `taint` marks a score or weight that is not finite: all other
    // products with zero are zero.
    template <Dtype D, int M, ScoreKind Kind, bool Whole>
    static MSP_HD void rank_block(const NmRank& op, int64_t row, int64_t column, __m512& taint) {
        constexpr bool kMagnitude = Kind == ScoreKind::kMagnitude;
        const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
        const int64_t left = op.columns - column;
        __m512i keys[M], ranks[M / 4];
        for (int v = 0; v < M; ++v) {
            const int64_t ahead = v * kLanes;
            const __mmask16 live = Whole ? 0xffff : first_lanes(at_most(left - ahead, kLanes));
            const ScoredLanes<D, Kind> lanes(op, row, row_term, column + ahead, live);
            taint = _mm512_fmadd_ps(lanes.score, _mm512_setzero_ps(), taint);
            if constexpr (Kind == ScoreKind::kGiven) {
                taint = _mm512_fmadd_ps(lanes.weight, _mm512_setzero_ps(), taint);
            }
            keys[v] = _mm512_castps_si512(lanes.score);
        }
        Columns<M>::gather(keys);
        if constexpr (M <= 8) {
            rank_pairs<kMagnitude, M>(keys, ranks);
        } else {
            rank_pairs_apart<kMagnitude, M>(keys, ranks);
        }
        Columns<M>::scatter(ranks);
        uint8_t* to = op.rank + row * op.columns + column;
        for (int i = 0; i < M / 4; ++i) {
            if constexpr (Whole) {
                _mm512_storeu_si512(to + 64 * i, ranks[i]);
            } else {
                const int64_t bytes = at_most(left - 64 * i, 64);
                _mm512_mask_storeu_epi8(to + 64 * i, bytes == 64 ? ~0ull : (1ull << bytes) - 1, ranks[i]);
            }
        }
    }

    template <Dtype D, int M, ScoreKind Kind>
    __attribute__((noinline)) static int64_t count_not_finite(const NmRank& op, int64_t row) {
        int64_t wrong = 0;
        for (int64_t column = 0; column < op.columns; column += M) {
            int32_t keys[M];
            wrong += group_keys<D, M, Kind>(op, row, column, keys);
        }
        return wrong;
    }
};

}  // namespace

int64_t nm_rank_rows_avx512(const NmRank& op, int64_t begin, int64_t end) {
    return specialise<RowByRow<Avx512>>(op, begin, end);
}

}  // namespace msp
