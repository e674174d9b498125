#include "nm_rank.h"

#include "nm_rank_scalar.h"
#include "scored_rows.h"
#include "specialise.h"

namespace msp {
namespace {

struct Scalar {
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t run(const NmRank& op, int64_t begin, int64_t end) {
        int64_t not_finite = 0;
        for (int64_t row = begin; row < end; ++row) {
            not_finite += nm_rank_columns<D, M, Kind>(op, row, 0, op.columns);
        }
        return not_finite;
    }
};

}  // namespace

int64_t nm_rank_rows_scalar(const NmRank& op, int64_t begin, int64_t end) {
    return specialise<Scalar>(op, begin, end);
}

int64_t nm_rank(const NmRank& op, Isa isa, int threads) {
    auto* rows = nm_rank_rows_scalar;
#if defined(MSP_X86)
    if (isa >= Isa::kAvx2) rows = nm_rank_rows_avx2;
    if (isa >= Isa::kAvx512) rows = nm_rank_rows_avx512;
#else
    (void)isa;
#endif
    return over_scored_rows(op, rows, threads);
}

}  // namespace msp
