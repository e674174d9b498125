// nm_select on the CPU: one function for every instruction set, each in a file of its own.
#pragma once

#include "../nm_select.h"
#include "isa.h"

namespace msp {

// Fills values and bitmask. Returns how many weights are not finite or have a score that is not; where there
// are any, what was kept of their groups is unspecified.
int64_t nm_select(const NmSelect& op, Isa isa, int threads);

// The rows [begin, end) of it, on the calling thread.
int64_t nm_select_rows_scalar(const NmSelect& op, int64_t begin, int64_t end);
int64_t nm_select_rows_avx2(const NmSelect& op, int64_t begin, int64_t end);
int64_t nm_select_rows_avx512(const NmSelect& op, int64_t begin, int64_t end);

// Calls F::run<Dtype, group size, ScoreKind> for what `op` asks.
template <class F, Dtype D, int M>
int64_t specialise_kind(const NmSelect& op, int64_t begin, int64_t end) {
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

template <class F, Dtype D>
int64_t specialise_group(const NmSelect& op, int64_t begin, int64_t end) {
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

template <class F>
int64_t specialise(const NmSelect& op, int64_t begin, int64_t end) {
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
