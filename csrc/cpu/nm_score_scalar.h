// Scores of single groups in plain C++.
#pragma once

#include "../nm_score.h"

namespace msp {

// The keys of the group of `row` whose first column is `first`: they order as the scores do. Returns the
// number of weights or scores that are not finite.
template <Dtype D, int M, ScoreKind Kind>
MSP_HD int64_t group_keys(const Scored& op, int64_t row, int64_t first, int32_t (&keys)[M]) {
    const int64_t offset = row * op.columns;
    const auto* weight = static_cast<const typename Stored<D>::Bits*>(op.weight) + offset;
    const float* matrix = op.matrix == nullptr ? nullptr : op.matrix + offset;
    const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
    int64_t not_finite = 0;
    for (int c = 0; c < M; ++c) {
        const int64_t column = first + c;
        const float w = Stored<D>::to_float(weight[column]);
        const float scale = op.column_scale == nullptr ? 1.0f : op.column_scale[column];
        const float column_term = Kind == ScoreKind::kRelative ? op.column_term[column] : 0.0f;
        const float entry = matrix == nullptr ? 0.0f : matrix[column];
        const uint32_t bits = float_bits(score<Kind>(w, scale, row_term, column_term, entry));
        not_finite += !is_finite(bits) || !is_finite(float_bits(w));
        keys[c] = ordered_key(bits);
    }
    return not_finite;
}

}  // namespace msp
