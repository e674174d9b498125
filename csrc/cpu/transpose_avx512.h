// Transposes for files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "../nm_format.h"

namespace msp {

// The 4x4 transpose of dwords in every 128-bit lane.
MSP_HD void transpose_dwords(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
    const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    a = _mm512_unpacklo_epi64(ab0, cd0);
    b = _mm512_unpackhi_epi64(ab0, cd0);
    c = _mm512_unpacklo_epi64(ab1, cd1);
    d = _mm512_unpackhi_epi64(ab1, cd1);
}

// The 4x4 transpose of 128-bit lanes.
MSP_HD void transpose_lanes(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
    const __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x44), ab1 = _mm512_shuffle_i32x4(a, b, 0xee);
    const __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xee);
    a = _mm512_shuffle_i32x4(ab0, cd0, 0x88);
    b = _mm512_shuffle_i32x4(ab0, cd0, 0xdd);
    c = _mm512_shuffle_i32x4(ab1, cd1, 0x88);
    d = _mm512_shuffle_i32x4(ab1, cd1, 0xdd);
}

// Sixteen rows of sixteen dwords become sixteen columns.
MSP_HD void transpose(__m512i (&v)[16]) {
    for (int q = 0; q < 16; q += 4) transpose_dwords(v[q], v[q + 1], v[q + 2], v[q + 3]);
    for (int c = 0; c < 4; ++c) transpose_lanes(v[c], v[c + 4], v[c + 8], v[c + 12]);
}

}  // namespace msp
