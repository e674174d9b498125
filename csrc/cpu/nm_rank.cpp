#include "nm_rank.h"

#include "nm_rank_scalar.h"
#include "scored_rows.h"
#include "specialise.h"

namespace msp {
namespace {

struct Scalar {
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t row(const NmRank& op, int64_t row) {
        return nm_rank_columns<D, M, Kind>(op, row, 0, op.columns);
    }
};

}  // namespace

int64_t nm_rank_rows_scalar(const NmRank& op, int64_t begin, int64_t end) {
    return specialise<RowByRow<Scalar>>(op, begin, end);
}

int64_t nm_rank(const NmRank& op, Isa isa, int threads) {
    return over_scored_rows(op, MSP_BEST(isa, nm_rank_rows), threads);
}

}  // namespace msp
