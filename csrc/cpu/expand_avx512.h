// vpexpand and vpcompress for files compiled for AVX-512 with VBMI2.
//
// On Zen 5 either instruction waits for the old content of its destination, even if nothing of it is kept. In
// a loop each iteration then takes five cycles, four times as long as the instruction itself. So the
// destination is written first, with zeros that the compiler does not recognise as zeros; otherwise it would
// generate the form that waits. Other processors execute one more move, which register renaming removes.
#pragma once

#include <immintrin.h>

#include "../nm_format.h"

namespace msp {

MSP_HD __m512i opaque_zero() {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    return zero;
}

// 32 columns of 16 bits: the next value for each set bit, zero elsewhere.
MSP_HD __m512i expand_words(__mmask32 mask, __m512i values) {
    return _mm512_mask_expand_epi16(opaque_zero(), mask, values);
}

// The same for 16 columns of 32 bits.
MSP_HD __m512i expand_doubles(__mmask16 mask, __m512i values) {
    return _mm512_mask_expand_epi32(opaque_zero(), mask, values);
}

// The lanes whose bit is set, side by side from lane 0 on; zero after them.
MSP_HD __m512i compress_doubles(__mmask16 mask, __m512i lanes) {
    return _mm512_mask_compress_epi32(opaque_zero(), mask, lanes);
}

MSP_HD __m256i compress_words(__mmask16 mask, __m256i lanes) {
    return _mm256_mask_compress_epi16(_mm512_castsi512_si256(opaque_zero()), mask, lanes);
}

}  // namespace msp
