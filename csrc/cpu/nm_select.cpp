#include "nm_select.h"

#include <atomic>

#include "nm_select_scalar.h"
#include "parallel.h"
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

// Weights that one range of rows holds at least: small enough to share the work evenly, large enough that
// handing it out costs nothing beside it.
constexpr int64_t kGrainWeights = 1 << 16;

}  // namespace

int64_t nm_select_rows_scalar(const NmSelect& op, int64_t begin, int64_t end) {
    return specialise<Scalar>(op, begin, end);
}

int64_t nm_select(const NmSelect& op, Isa isa, int threads) {
    auto* rows = nm_select_rows_scalar;
#if defined(MSP_X86)
    if (isa >= Isa::kAvx2) rows = nm_select_rows_avx2;
    if (isa >= Isa::kAvx512) rows = nm_select_rows_avx512;
#else
    (void)isa;
#endif
    if (op.columns == 0) return 0;
    std::atomic<int64_t> not_finite{0};
    parallel_for(op.rows, kGrainWeights / op.columns, threads, [&](int64_t begin, int64_t end) {
        not_finite.fetch_add(rows(op, begin, end), std::memory_order_relaxed);
    });
    return not_finite.load();
}

}  // namespace msp
