// Single groups in plain C++: the scalar path, and the columns that a vector path leaves at the end of a row.
#pragma once

#include "../nm_rank.h"
#include "nm_score_scalar.h"

namespace msp {

// Each pair is compared once. `static`, because each instruction set needs its own copy. Not inlined into
// every combination of dtype and score, because the compiler would take minutes.
template <int M>
__attribute__((noinline)) static void rank_group(const int32_t (&keys)[M], uint8_t* rank) {
    uint8_t better[M] = {};
    for (int c = 0; c < M; ++c) {
        uint8_t later = 0;
        for (int d = c + 1; d < M; ++d) {
            const bool loses = keys[d] > keys[c];
            later += loses;
            better[d] += !loses;
        }
        better[c] += later;
    }
    for (int c = 0; c < M; ++c) rank[c] = better[c];
}

// Ranks the groups of `row` in columns [begin, end), both multiples of M. Returns the number of weights or
// scores that are not finite.
template <Dtype D, int M, ScoreKind Kind>
MSP_HD int64_t nm_rank_columns(const NmRank& op, int64_t row, int64_t begin, int64_t end) {
    int64_t not_finite = 0;
    for (int64_t first = begin; first < end; first += M) {
        int32_t keys[M];
        not_finite += group_keys<D, M, Kind>(op, row, first, keys);
        rank_group<M>(keys, op.rank + row * op.columns + first);
    }
    return not_finite;
}

}  // namespace msp
