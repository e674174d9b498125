// nm_linear in bf16 with AVX-512's products of bf16 pairs: one instruction for an expanded chunk, in place of
// a shift, a mask and two FMAs.
#include "nm_linear_avx512.h"

namespace msp {
namespace {

struct Pairs {
    using X = uint16_t;
    static constexpr int kBytes = 2;
    static constexpr int64_t kAhead = 4096;
    static constexpr int kRows = 3;
    static constexpr int kTokens = 8;
    using Chunk = __m512i;

    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        return expand_chunk<Load>(mask, values);
    }
    static MSP_HD void multiply(__m512& sum, Chunk w, const X* x) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
    }
    static MSP_HD void prepare(const uint16_t* x, X* to) { _mm512_storeu_si512(to, _mm512_loadu_si512(x)); }
};

}  // namespace

const LinearPath kLinearAvx512Bf16{
    Pairs::kTokens, kTokensInCache, 0, batch_bytes<Pairs>, prepare_as<Pairs, uint16_t>,
    rows_of<Pairs>, unpack_rows};

}  // namespace msp
