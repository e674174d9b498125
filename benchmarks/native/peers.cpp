// What the CPU kernels are measured against and no library offers: the read bandwidth of the machine, and a
// dense GEMV in the style of our own. Compiled for the machine it runs on when a benchmark starts.
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
