// Compiled for AVX2 with F16C (see CMakeLists.txt) and only called if the CPU has them. Everything here has
// internal linkage or is inlined: no other file may use the code of this one.
#include "nm_rank.h"
#include "nm_rank_scalar.h"
#include "nm_score_avx2.h"
#include "specialise.h"

namespace msp {
namespace {

MSP_HD void store_bytes(uint8_t* to, __m256i v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

struct Avx2 {
    // `op` is a copy of its own, so that stores through a byte pointer cannot change it.
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t row(const NmRank op, int64_t row) {
        constexpr int kVectors = unit_columns(M) / kLanes;
        const auto* weight = static_cast<const typename Stored<D>::Bits*>(op.weight);
        const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
        const int64_t whole = op.columns / unit_columns(M) * unit_columns(M);
        int64_t wrong = 0;
        for (int64_t column = 0; column < whole; column += unit_columns(M)) {
            __m256i keys[kVectors], ranks[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                const int64_t first = column + v * kLanes;
                const int64_t offset = row * op.columns + first;
                const __m256 w = Lanes<D>::to_float(Lanes<D>::load(weight + offset));
                const __m256 score = score_of<Kind>(op, offset, row_term, first, w);
                unsigned not_finite_here = not_finite(score);
                if constexpr (Kind == ScoreKind::kGiven) not_finite_here |= not_finite(w);
                wrong += __builtin_popcount(not_finite_here);
                keys[v] = ordered_keys(score);
            }
            rank<M>(keys, ranks);
            for (int v = 0; v < kVectors; ++v) {
                store_bytes(op.rank + row * op.columns + column + v * kLanes, ranks[v]);
            }
        }
        if constexpr (M == 4) wrong += nm_rank_columns<D, M, Kind>(op, row, whole, op.columns);
        return wrong;
    }
};

}  // namespace

int64_t nm_rank_rows_avx2(const NmRank& op, int64_t begin, int64_t end) {
    return specialise<RowByRow<Avx2>>(op, begin, end);
}

}  // namespace msp
