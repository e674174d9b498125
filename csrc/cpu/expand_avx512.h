// vpexpand and vpcompress for files compiled for AVX-512 with VBMI2.
//
// Zen 5 lets either wait for what its destination held before, even when nothing of it is kept: in a loop
// that goes round five cycles at a time, four times as long as the instruction itself takes. So the
// destination is written first, with zeros of which the compiler does not know that they are zeros; else it
// would go back to the form that waits. Elsewhere that is one move, which the renaming of registers does for
// nothing.
#pragma once

#include <immintrin.h>

#include "../nm_format.h"

namespace msp {

MSP_HD __m512i opaque_zero() {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    return zero;
}

// 32 columns of 16 bits: the next value where a bit is set, zero elsewhere.
MSP_HD __m512i expand_words(__mmask32 mask, __m512i values) {
    return _mm512_mask_expand_epi16(opaque_zero(), mask, values);
}

// The same for 16 columns of 32 bits.
MSP_HD __m512i expand_doubles(__mmask16 mask, __m512i values) {
    return _mm512_mask_expand_epi32(opaque_zero(), mask, values);
}

// The lanes whose bit is set, side by side from lane 0 on; zero behind them.
MSP_HD __m512i compress_doubles(__mmask16 mask, __m512i lanes) {
    return _mm512_mask_compress_epi32(opaque_zero(), mask, lanes);
}

MSP_HD __m256i compress_words(__mmask16 mask, __m256i lanes) {
    return _mm256_mask_compress_epi16(_mm512_castsi512_si256(opaque_zero()), mask, lanes);
}

}  // namespace msp
