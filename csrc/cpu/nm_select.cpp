#include "nm_select.h"

#include <atomic>

#include "parallel.h"

namespace msp {
namespace {

struct Scalar {
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t run(const NmSelect& op, int64_t begin, int64_t end) {
        using Bits = typename Stored<D>::Bits;
        const int64_t row_bytes = bitmask_row_bytes(op.columns);
        Bits* value = static_cast<Bits*>(op.values) + begin * values_per_row(op.columns, M, op.n);
        int64_t not_finite = 0;
        for (int64_t row = begin; row < end; ++row) {
            const Bits* weight = static_cast<const Bits*>(op.weight) + row * op.columns;
            const float* matrix = op.matrix == nullptr ? nullptr : op.matrix + row * op.columns;
            uint8_t* byte = op.bitmask + row * row_bytes;
            const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
            for (int64_t first = 0; first < op.columns; first += M) {
                int32_t keys[M];
                for (int c = 0; c < M; ++c) {
                    const int64_t column = first + c;
                    const float w = Stored<D>::to_float(weight[column]);
                    const uint32_t bits = float_bits(
                        score<Kind>(w, op.column_scale == nullptr ? 1.0f : op.column_scale[column], row_term,
                                    Kind == ScoreKind::kRelative ? op.column_term[column] : 0.0f,
                                    matrix == nullptr ? 0.0f : matrix[column]));
                    not_finite += !is_finite(bits) || !is_finite(float_bits(w));
                    keys[c] = ordered_key(bits);
                }
                if (op.compliant) rule_out_beyond_two_of_four<M>(keys);
                const uint32_t kept = select_group<M>(keys, op.n);
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
    if (isa == Isa::kAvx2) rows = nm_select_rows_avx2;
    if (isa == Isa::kAvx512) rows = nm_select_rows_avx512;
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
