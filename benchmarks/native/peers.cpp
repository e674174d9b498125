// Peers of the CPU kernels that no library offers: the read bandwidth of the machine, its fp32 products, and
// a dense GEMV in the same style. Compiled for the machine when a benchmark starts.
#include <immintrin.h>

#include <atomic>
#include <cstdint>

#include "../../csrc/cpu/parallel.h"

namespace {

uint64_t read(const uint64_t* words, int64_t begin, int64_t end) {
    uint64_t sum[32] = {};
    int64_t i = begin;
    for (; i + 32 <= end; i += 32) {
        for (int lane = 0; lane < 32; ++lane) sum[lane] ^= words[i + lane];
    }
    for (; i < end; ++i) sum[0] ^= words[i];
    for (int lane = 1; lane < 32; ++lane) sum[0] ^= sum[lane];
    return sum[0];
}

}  // namespace

// Exclusive or of all words: reads every byte once and does next to nothing with it.
extern "C" uint64_t read_words(const uint64_t* words, int64_t count, int threads) {
    std::atomic<uint64_t> all{0};
    msp::parallel_for(count, 1 << 17, threads,
                      [&](int64_t begin, int64_t end) { all ^= read(words, begin, end); });
    return all;
}

#if defined(__AVX512F__)
// `count` fused multiply-adds in fp32, in registers: enough chains to hide their latency.
extern "C" bool multiply_add(int64_t count, int threads) {
    const int64_t turns = count / (16 * 8);
    std::atomic<float> all{0};
    msp::parallel_for(turns, turns / (4 * threads) + 1, threads, [&](int64_t begin, int64_t end) {
        const __m512 a = _mm512_set1_ps(0.5f + 1e-9f * static_cast<float>(begin)), b = a;
        __m512 s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
        for (int64_t turn = begin; turn < end; ++turn) {
            s0 = _mm512_fmadd_ps(a, s0, b), s1 = _mm512_fmadd_ps(a, s1, b), s2 = _mm512_fmadd_ps(a, s2, b);
            s3 = _mm512_fmadd_ps(a, s3, b), s4 = _mm512_fmadd_ps(a, s4, b), s5 = _mm512_fmadd_ps(a, s5, b);
            s6 = _mm512_fmadd_ps(a, s6, b), s7 = _mm512_fmadd_ps(a, s7, b);
            // otherwise the compiler would merge eight equal chains
            asm("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7));
        }
        all = _mm512_reduce_add_ps(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7);
    });
    return true;
}
#else
extern "C" bool multiply_add(int64_t, int) { return false; }
#endif

#if defined(__AVX512BF16__)
extern "C" bool has_dense_gemv() { return true; }

// y = x W^T in bf16, one token, columns a multiple of 128.
extern "C" void dense_gemv(const uint16_t* x, const uint16_t* weight, float* y, int64_t rows, int64_t columns,
                           int threads) {
    msp::parallel_for(rows, 16, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const uint16_t* w = weight + row * columns;
            __m512 sums[4] = {};
            for (int64_t c = 0; c < columns; c += 128) {
                _mm_prefetch(reinterpret_cast<const char*>(w + c) + 2048, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(w + c) + 2112, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(w + c) + 2176, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(w + c) + 2240, _MM_HINT_T0);
                for (int i = 0; i < 4; ++i) {
                    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(w + c + 32 * i),
                                               (__m512bh)_mm512_loadu_si512(x + c + 32 * i));
                }
            }
            y[row] = _mm512_reduce_add_ps(
                _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
        }
    });
}
#else
extern "C" bool has_dense_gemv() { return false; }
extern "C" void dense_gemv(const uint16_t*, const uint16_t*, float*, int64_t, int64_t, int) {}
#endif
