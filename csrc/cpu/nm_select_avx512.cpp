// Compiled for AVX-512 with VBMI2 (see CMakeLists.txt) and only called if the CPU has it. Everything here has
// internal linkage or is inlined: no other file may use the code of this one.
#include <cstring>

#include "expand_avx512.h"
#include "nm_score_avx512.h"
#include "nm_select.h"
#include "specialise.h"

namespace msp {
namespace {

// A compare-exchange of lanes i and i ^ Distance: lanes whose bit is set in `Low` keep the smaller key.
template <int Distance, __mmask16 Low>
MSP_HD __m512i exchange(__m512i keys) {
    __m512i partner;
    if constexpr (Distance == 1) partner = _mm512_shuffle_epi32(keys, _MM_PERM_CDAB);
    if constexpr (Distance == 2) partner = _mm512_shuffle_epi32(keys, _MM_PERM_BADC);
    if constexpr (Distance == 4) partner = _mm512_shuffle_i32x4(keys, keys, 0b10110001);
    if constexpr (Distance == 8) partner = _mm512_shuffle_i32x4(keys, keys, 0b01001110);
    return _mm512_mask_min_epi32(_mm512_max_epi32(keys, partner), Low, keys, partner);
}

constexpr __mmask16 low_lanes(int distance, int block) {
    unsigned low = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const bool descending = (lane & block) == 0;
        const bool second = (lane & distance) != 0;
        if (descending == second) low |= 1u << lane;
    }
    return static_cast<__mmask16>(low);
}

// Bitonic merges: sorts every Block lanes that are bitonic, descending in even blocks and, unless the block
// is a whole group (then Direction is 0), ascending in odd ones.
template <int Distance, int Direction>
MSP_HD __m512i merge(__m512i keys) {
    keys = exchange<Distance, low_lanes(Distance, Direction)>(keys);
    if constexpr (Distance > 1) keys = merge<Distance / 2, Direction>(keys);
    return keys;
}

// Sorts each group of M lanes, descending.
template <int M, int Block = 2>
MSP_HD __m512i sort_descending(__m512i keys) {
    keys = merge<Block / 2, Block == M ? 0 : Block>(keys);
    if constexpr (Block < M) keys = sort_descending<M, Block * 2>(keys);
    return keys;
}

// The bits of `above`, and the lowest bits of `equal` that bring their number to n.
MSP_HD uint32_t fill_up(uint32_t above, uint32_t equal, int n) {
    return above | _pdep_u32(_bzhi_u32(~0u, n - _mm_popcnt_u32(above)), equal);
}

// Bits of lanes whose key is not below the threshold, without all but the n best of each group of M. Ties at
// the threshold are rare, so this function stays outside the loops.
template <int M>
__attribute__((noinline)) __mmask16 settle_ties(__m512i keys, __m512i threshold, uint32_t kept, int n) {
    const uint32_t above = _mm512_cmpgt_epi32_mask(keys, threshold);
    uint32_t exact = 0;
    for (int lane = 0; lane < kLanes; lane += M) {
        const uint32_t group = ((1u << M) - 1) << lane;
        exact |= fill_up(above & group, kept & ~above & group, n);
    }
    return static_cast<__mmask16>(exact);
}

// For each group of M lanes its n largest keys, ties to the lower lane. `nth` holds in each lane the lane of
// the n-th key in the sorted group; Distinct: no group holds a key twice.
template <int M, bool Distinct>
MSP_HD __mmask16 select(__m512i keys, __m512i nth, int n) {
    const __m512i threshold = _mm512_permutexvar_epi32(nth, sort_descending<M>(keys));
    const __mmask16 kept = _mm512_cmpge_epi32_mask(keys, threshold);
    if (Distinct || __builtin_expect(_mm_popcnt_u32(kept) == n * (kLanes / M), 1)) return kept;
    return settle_ties<M>(keys, threshold, kept, n);
}

// The same for one group of 32 lanes, whose first half is `keys0`. `nth` is n - 1 mod 16.
template <bool Distinct>
MSP_HD uint32_t select32(__m512i keys0, __m512i keys1, __m512i nth, int n) {
    const __m512i reverse = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i sorted0 = sort_descending<16>(keys0);
    const __m512i sorted1 = _mm512_permutexvar_epi32(reverse, sort_descending<16>(keys1));
    // one half descending, one ascending: lane by lane, the maxima are the best 16 of all 32
    const __m512i half =
        n <= kLanes ? _mm512_max_epi32(sorted0, sorted1) : _mm512_min_epi32(sorted0, sorted1);
    const __m512i threshold = _mm512_permutexvar_epi32(nth, merge<8, 0>(half));
    const uint32_t kept0 = _mm512_cmpge_epi32_mask(keys0, threshold);
    const uint32_t kept1 = _mm512_cmpge_epi32_mask(keys1, threshold);
    const uint32_t kept = kept0 | kept1 << kLanes;
    if (Distinct || __builtin_expect(_mm_popcnt_u32(kept) == n, 1)) return kept;

    const uint32_t above0 = _mm512_cmpgt_epi32_mask(keys0, threshold);
    const uint32_t above1 = _mm512_cmpgt_epi32_mask(keys1, threshold);
    const uint32_t above = above0 | above1 << kLanes;
    return fill_up(above, kept & ~above, n);
}

// The place of the kept weights. They are compressed in a register and stored under a mask, because
// compressing into memory is slow on AMD.
MSP_HD void store_kept(uint32_t* to, __m512i v, __mmask16 kept, __mmask16 places) {
    _mm512_mask_storeu_epi32(to, places, compress_doubles(kept, v));
}

MSP_HD void store_kept(uint16_t* to, __m256i v, __mmask16 kept, __mmask16 places) {
    _mm256_mask_storeu_epi16(to, places, compress_words(kept, v));
}

struct Avx512 {
    // 16 columns of a row: their weights and the keys that rank them.
    template <Dtype D, int M, ScoreKind Kind>
    struct Chunk {
        typename Lanes<D>::Vector stored;
        __m512i keys;
        __mmask16 wrong;

        MSP_HD Chunk(const NmSelect& op, int64_t row, float row_term, int64_t column, __mmask16 live) {
            const ScoredLanes<D, Kind> lanes(op, row, row_term, column, live);
            stored = lanes.stored;
            wrong = lanes.wrong();
            if constexpr (Kind == ScoreKind::kMagnitude) {
                keys = _mm512_castps_si512(lanes.score);
            } else {
                // ordered_key() of each lane; adding zero turns -0 into +0
                const __m512i bits = _mm512_castps_si512(_mm512_add_ps(lanes.score, _mm512_setzero_ps()));
                const __m512i sign = _mm512_srai_epi32(bits, 31);
                keys =
                    _mm512_ternarylogic_epi32(bits, sign, _mm512_set1_epi32(INT32_MAX), 0x78);  // a ^ (b & c)
            }
            if constexpr (distinct(D, Kind)) {
                // columns in descending order, in bits that are zero in a 16-bit float widened to 32
                const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                const __m512i above = _mm512_set1_epi32(M == 32 && column % 32 == 0 ? 31 : 15);
                keys = _mm512_add_epi32(keys, _mm512_sub_epi32(above, lane));
            }
            if (op.compliant) {
                const __m512i second = _mm512_setr_epi32(1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13);
                const __mmask16 kept = select<4, distinct(D, Kind)>(keys, second, 2);
                keys = _mm512_mask_mov_epi32(_mm512_set1_epi32(kRuledOut), kept, keys);
            }
        }
    };

    // Whether keys also carry the column, so that no two keys of a group are equal. The keys that `compliant`
    // excludes are equal, but never near the n-th.
    static constexpr bool distinct(Dtype dtype, ScoreKind kind) {
        return kind == ScoreKind::kMagnitude && dtype != Dtype::kFloat32;
    }

    template <Dtype D, int M, ScoreKind Kind>
    static int64_t run(const NmSelect& op, int64_t begin, int64_t end) {
        using Bits = typename Stored<D>::Bits;
        const int64_t row_values = values_per_row(op.columns, M, op.n);
        int64_t wrong = 0;
        for (int64_t row = begin; row < end; ++row) {
            Bits* value = static_cast<Bits*>(op.values) + row * row_values;
            const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
            uint8_t* byte = op.bitmask + row * bitmask_row_bytes(op.columns);
            if constexpr (M == 32) {
                wrong += row_of_pairs<D, Kind>(op, row, row_term, value, byte);
            } else {
                wrong += row_of_vectors<D, M, Kind>(op, row, row_term, value, byte);
            }
        }
        return wrong;
    }

    // `op` is a copy of its own: stores through a byte pointer could change a shared one, so the compiler
    // would read it again for every vector.
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t row_of_vectors(const NmSelect op, int64_t row, float row_term,
                                  typename Stored<D>::Bits* value, uint8_t* byte) {
        alignas(64) int32_t nth_lane[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) nth_lane[lane] = lane / M * M + (op.n > 0 ? op.n - 1 : 0);
        const __m512i nth = _mm512_load_si512(nth_lane);
        const int kept_of_all = op.n * (kLanes / M);
        const __mmask16 all_places = first_lanes(kept_of_all);
        const __mmask16 any = op.n > 0 ? 0xffff : 0;
        int64_t wrong = 0;
        int64_t column = 0;
        for (; column + kLanes <= op.columns; column += kLanes) {
            const Chunk<D, M, Kind> chunk(op, row, row_term, column, 0xffff);
            wrong += _mm_popcnt_u32(chunk.wrong);
            const uint16_t kept = select<M, distinct(D, Kind)>(chunk.keys, nth, op.n) & any;
            store_kept(value, chunk.stored, kept, all_places);
            value += kept_of_all;
            std::memcpy(byte, &kept, 2);
            byte += 2;
        }
        if (column < op.columns) {
            const int64_t left = op.columns - column;
            const __mmask16 live = first_lanes(left);
            const Chunk<D, M, Kind> chunk(op, row, row_term, column, live);
            wrong += _mm_popcnt_u32(chunk.wrong & live);
            const uint16_t kept = select<M, distinct(D, Kind)>(chunk.keys, nth, op.n) & any & live;
            const int64_t count = left / M * op.n;
            store_kept(value, chunk.stored, kept, first_lanes(count));
            value += count;
            std::memcpy(byte, &kept, static_cast<size_t>(bitmask_row_bytes(left)));
        }
        return wrong;
    }

    // Groups of 32 columns, two vectors each.
    template <Dtype D, ScoreKind Kind>
    static int64_t row_of_pairs(const NmSelect op, int64_t row, float row_term,
                                typename Stored<D>::Bits* value, uint8_t* byte) {
        const __m512i nth = _mm512_set1_epi32((op.n + 31) % kLanes);
        const uint32_t any = op.n > 0 ? ~0u : 0u;
        int64_t wrong = 0;
        for (int64_t column = 0; column < op.columns; column += 32) {
            const Chunk<D, 32, Kind> chunk0(op, row, row_term, column, 0xffff);
            const Chunk<D, 32, Kind> chunk1(op, row, row_term, column + kLanes, 0xffff);
            wrong += _mm_popcnt_u32(chunk0.wrong) + _mm_popcnt_u32(chunk1.wrong);
            const uint32_t kept = select32<distinct(D, Kind)>(chunk0.keys, chunk1.keys, nth, op.n) & any;
            const int count0 = _mm_popcnt_u32(kept & 0xffffu);
            store_kept(value, chunk0.stored, static_cast<__mmask16>(kept), first_lanes(count0));
            store_kept(value + count0, chunk1.stored, static_cast<__mmask16>(kept >> kLanes),
                       first_lanes(op.n - count0));
            value += op.n;
            std::memcpy(byte, &kept, 4);
            byte += 4;
        }
        return wrong;
    }
};

}  // namespace

int64_t nm_select_rows_avx512(const NmSelect& op, int64_t begin, int64_t end) {
    return specialise<Avx512>(op, begin, end);
}

}  // namespace msp
