#include "nm_select.h"

#include "nm_select_scalar.h"
#include "scored_rows.h"
#include "specialise.h"

namespace msp {
namespace {

struct Scalar {
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t run(const NmSelect& op, int64_t begin, int64_t end) {
        auto* value =
            static_cast<typename Stored<D>::Bits*>(op.values) + begin * values_per_row(op.columns, M, op.n);
        int64_t not_finite = 0;
        for (int64_t row = begin; row < end; ++row) {
            not_finite += nm_select_columns<D, M, Kind>(op, row, 0, op.columns, value);
        }
        return not_finite;
    }
};

}  // namespace

int64_t nm_select_rows_scalar(const NmSelect& op, int64_t begin, int64_t end) {
    return specialise<Scalar>(op, begin, end);
}

int64_t nm_select(const NmSelect& op, Isa isa, int threads) {
    return over_scored_rows(op, MSP_BEST(isa, nm_select_rows), threads);
}

}  // namespace msp
