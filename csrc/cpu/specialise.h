// Selects the code that is compiled for the parameters of an op.
#pragma once

#include "../nm_score.h"

namespace msp {

// For `specialise`: a range is rows that F::row<Dtype, group size, ScoreKind> takes one at a time.
template <class F>
struct RowByRow {
    template <Dtype D, int M, ScoreKind Kind, class Op>
    static int64_t run(const Op& op, int64_t begin, int64_t end) {
        int64_t not_finite = 0;
        for (int64_t row = begin; row < end; ++row) not_finite += F::template row<D, M, Kind>(op, row);
        return not_finite;
    }
};

// Calls F::run<Dtype, group size, ScoreKind> for the parameters of `op`.
template <class F, Dtype D, int M, class Op>
int64_t specialise_kind(const Op& op, int64_t begin, int64_t end) {
    switch (op.kind) {
        case ScoreKind::kMagnitude:
            return F::template run<D, M, ScoreKind::kMagnitude>(op, begin, end);
        case ScoreKind::kScaled:
            return F::template run<D, M, ScoreKind::kScaled>(op, begin, end);
        case ScoreKind::kRelative:
            return F::template run<D, M, ScoreKind::kRelative>(op, begin, end);
        case ScoreKind::kFisher:
            return F::template run<D, M, ScoreKind::kFisher>(op, begin, end);
        default:
            return F::template run<D, M, ScoreKind::kGiven>(op, begin, end);
    }
}

template <class F, Dtype D, class Op>
int64_t specialise_group(const Op& op, int64_t begin, int64_t end) {
    switch (op.group_size) {
        case 4:
            return specialise_kind<F, D, 4>(op, begin, end);
        case 8:
            return specialise_kind<F, D, 8>(op, begin, end);
        case 16:
            return specialise_kind<F, D, 16>(op, begin, end);
        default:
            return specialise_kind<F, D, 32>(op, begin, end);
    }
}

template <class F, class Op>
int64_t specialise(const Op& op, int64_t begin, int64_t end) {
    switch (op.dtype) {
        case Dtype::kFloat32:
            return specialise_group<F, Dtype::kFloat32>(op, begin, end);
        case Dtype::kFloat16:
            return specialise_group<F, Dtype::kFloat16>(op, begin, end);
        default:
            return specialise_group<F, Dtype::kBFloat16>(op, begin, end);
    }
}

}  // namespace msp
