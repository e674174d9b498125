// Compiled for AVX-512 (see CMakeLists.txt) and only called if the CPU has it.
#include <immintrin.h>

#include "obs_prune_tile.h"

namespace msp {
namespace {

struct Avx512 {
    using Float = __m512;
    using Int = __m512i;
    static constexpr int kLanes = 16;
    static constexpr int kPanelVectors =
        4;  // 24 sums, 4 vectors of the factor and an error: 29 of 32 registers

    static MSP_HD Float load(const float* from) { return _mm512_loadu_ps(from); }
    static MSP_HD void store(float* to, Float v) { _mm512_storeu_ps(to, v); }
    static MSP_HD Float broadcast(float v) { return _mm512_set1_ps(v); }
    static MSP_HD Int broadcast_int(int v) { return _mm512_set1_epi32(v); }
    static MSP_HD Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
    static MSP_HD Float minus_product(Float c, Float a, Float b) { return _mm512_fnmadd_ps(a, b, c); }
    static MSP_HD Int magnitude_bits(Float v) { return _mm512_castps_si512(_mm512_abs_ps(v)); }
    static MSP_HD __mmask16 greater(Int a, Int b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static MSP_HD Int increment(Int v, __mmask16 where) {
        return _mm512_mask_add_epi32(v, where, v, _mm512_set1_epi32(1));
    }
    static MSP_HD Int decrement(Int v, __mmask16 where) {
        return _mm512_mask_sub_epi32(v, where, v, _mm512_set1_epi32(1));
    }
    static MSP_HD Float choose(__mmask16 where, Float yes, Float no) {
        return _mm512_mask_blend_ps(where, no, yes);
    }
    static MSP_HD __mmask16 equal_bits(Float v, uint32_t bits) {
        return _mm512_cmpeq_epi32_mask(_mm512_castps_si512(v), _mm512_set1_epi32(static_cast<int>(bits)));
    }
    // A byte a lane: 0 where true, else 1.
    static MSP_HD void store_inverted(uint8_t* to, __mmask16 where) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_set1_epi8(_knot_mask16(where), 1));
    }

    static MSP_HD void transpose(Float (&rows)[16]) {
        Float pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        }
        // fours[4 i + c]: in its 128-bit quarter q, column 4 q + c of rows 4 i ... 4 i + 3
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            const __m512d low0 = _mm512_castps_pd(pairs[i]), low1 = _mm512_castps_pd(pairs[i + 2]);
            const __m512d high0 = _mm512_castps_pd(pairs[i + 1]), high1 = _mm512_castps_pd(pairs[i + 3]);
            fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
            fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
            fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
            fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            eights[c] = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
            eights[4 + c] = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
            eights[8 + c] = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
            eights[12 + c] = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            rows[c] = _mm512_shuffle_f32x4(eights[c], eights[8 + c], 0x88);
            rows[8 + c] = _mm512_shuffle_f32x4(eights[c], eights[8 + c], 0xdd);
            rows[4 + c] = _mm512_shuffle_f32x4(eights[4 + c], eights[12 + c], 0x88);
            rows[12 + c] = _mm512_shuffle_f32x4(eights[4 + c], eights[12 + c], 0xdd);
        }
    }
};

}  // namespace

const ObsPath obs_path_avx512{ObsTile<Avx512>::kPanel, ObsTile<Avx512>::run};

}  // namespace msp
