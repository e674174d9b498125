// Single groups in plain C++: the scalar path, and the columns that a vector path leaves at the end of a row.
#pragma once

#include "nm_score_scalar.h"
#include "nm_select.h"

namespace msp {

// The kept weights of a group. `static`, because each instruction set needs its own copy. Not inlined into
// every combination of dtype and score, because the compiler would take minutes.
template <int M>
__attribute__((noinline)) static uint32_t kept_of_group(int32_t (&keys)[M], int n, bool compliant) {
    if (compliant) rule_out_beyond_two_of_four<M>(keys);
    return select_group<M>(keys, n);
}

// Selects the groups of `row` in columns [begin, end), both multiples of M and `begin` also of 8. `value` is
// the place of the first kept weight and moves on. Returns the number of weights or scores that are not
// finite.
template <Dtype D, int M, ScoreKind Kind>
MSP_HD int64_t nm_select_columns(const NmSelect& op, int64_t row, int64_t begin, int64_t end,
                                 typename Stored<D>::Bits*& value) {
    using Bits = typename Stored<D>::Bits;
    const Bits* weight = static_cast<const Bits*>(op.weight) + row * op.columns;
    uint8_t* byte = op.bitmask + row * bitmask_row_bytes(op.columns) + begin / 8;
    int64_t not_finite = 0;
    for (int64_t first = begin; first < end; first += M) {
        int32_t keys[M];
        not_finite += group_keys<D, M, Kind>(op, row, first, keys);
        const uint32_t kept = kept_of_group<M>(keys, op.n, op.compliant);
        for (int c = 0; c < M; ++c) {
            if (kept >> c & 1) *value++ = weight[first + c];
        }
        if (M >= 8) {
            for (int b = 0; b < M / 8; ++b) *byte++ = static_cast<uint8_t>(kept >> 8 * b);
        } else if (first % 8 == 0) {
            *byte = static_cast<uint8_t>(kept);
        } else {
            *byte++ |= static_cast<uint8_t>(kept << 4);
        }
    }
    return not_finite;
}

}  // namespace msp
