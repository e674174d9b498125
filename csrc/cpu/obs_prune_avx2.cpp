// Compiled for AVX2 with FMA (see CMakeLists.txt) and only called if the CPU has them.
#include <immintrin.h>

#include "obs_prune_tile.h"

namespace msp {
namespace {

struct Avx2 {
    using Float = __m256;
    using Int = __m256i;
    static constexpr int kLanes = 8;
    static constexpr int kPanelVectors =
        2;  // 12 sums, 2 vectors of the factor and an error: 15 of 16 registers

    static MSP_HD Float load(const float* from) { return _mm256_loadu_ps(from); }
    static MSP_HD void store(float* to, Float v) { _mm256_storeu_ps(to, v); }
    static MSP_HD Float broadcast(float v) { return _mm256_set1_ps(v); }
    static MSP_HD Int broadcast_int(int v) { return _mm256_set1_epi32(v); }
    static MSP_HD Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
    static MSP_HD Float minus_product(Float c, Float a, Float b) { return _mm256_fnmadd_ps(a, b, c); }
    static MSP_HD Int magnitude_bits(Float v) {
        return _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
    }
    static MSP_HD Int greater(Int a, Int b) { return _mm256_cmpgt_epi32(a, b); }  // -1 where true
    static MSP_HD Int increment(Int v, Int where) { return _mm256_sub_epi32(v, where); }
    static MSP_HD Int decrement(Int v, Int where) { return _mm256_add_epi32(v, where); }
    static MSP_HD Float choose(Int where, Float yes, Float no) {
        return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(where));
    }
    static MSP_HD Int equal_bits(Float v, uint32_t bits) {
        return _mm256_cmpeq_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(static_cast<int>(bits)));
    }
    // A byte a lane: 0 where true, else 1.
    static MSP_HD void store_inverted(uint8_t* to, Int where) {
        const __m256i flags = _mm256_add_epi32(where, _mm256_set1_epi32(1));
        const __m128i words =
            _mm_packs_epi32(_mm256_castsi256_si128(flags), _mm256_extracti128_si256(flags, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
    }

    static MSP_HD void transpose(Float (&rows)[8]) {
        Float pairs[8], fours[8];
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        // fours[4 i + c]: in its 128-bit half h, column 4 h + c of rows 4 i ... 4 i + 3
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
            fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
            fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
            fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            rows[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
            rows[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
        }
    }
};

}  // namespace

const ObsPath obs_path_avx2{ObsTile<Avx2>::kPanel, ObsTile<Avx2>::run};

}  // namespace msp
