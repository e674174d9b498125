// Expanding packed weights with AVX-512, for the files that multiply them. Everything has internal linkage or
// is inlined: no code of a file for one instruction set may serve another.
#pragma once

#include <immintrin.h>

#include "nm_linear.h"

namespace msp {
namespace {

// A weight is read as it lies in memory, 32 columns of a row at a time: vpexpand spreads the values of a
// chunk by its 32 bits of mask. Every chunk has equally many values, so the pointers advance by constants and
// nothing waits for a popcount.

// Loads what an expand needs. Plain: a fixed number of bytes, perhaps more than there are values; Exact: no
// byte more, for the end of the array. What is too much is not looked at.
template <int Bytes>
struct Plain {
    static MSP_HD __m512i load(const uint8_t* from, uint32_t) {
        if constexpr (Bytes == 16) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from));
        if constexpr (Bytes == 32) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_loadu_si512(from);
    }
};

struct Exact {
    static MSP_HD __m512i load(const uint8_t* from, uint32_t bytes) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes), from);
    }
};

// How a dtype is expanded and multiplied: kLoad is the most bytes of values that one load of a full chunk
// wants.
struct Float32 {
    using X = float;
    static constexpr int kBytes = 4;
    static constexpr int kLoad = 64;
    struct Chunk {
        __m512 low, high;
    };

    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        const uint32_t low = _mm_popcnt_u32(mask & 0xffffu) * 4;
        const uint32_t high = _mm_popcnt_u32(mask >> 16) * 4;
        return {_mm512_castsi512_ps(_mm512_maskz_expand_epi32(mask & 0xffffu, Load::load(values, low))),
                _mm512_castsi512_ps(_mm512_maskz_expand_epi32(mask >> 16, Load::load(values + low, high)))};
    }
    static MSP_HD void multiply(__m512& sum, const Chunk& w, const X* x) {
        sum = _mm512_fmadd_ps(w.low, _mm512_loadu_ps(x), sum);
        sum = _mm512_fmadd_ps(w.high, _mm512_loadu_ps(x + 16), sum);
    }
    static MSP_HD void prepare(const float* x, float* to) {
        _mm512_storeu_ps(to, _mm512_loadu_ps(x));
        _mm512_storeu_ps(to + 16, _mm512_loadu_ps(x + 16));
    }
};

template <class Load>
MSP_HD __m512i expand_words(uint32_t mask, const uint8_t* values) {
    return _mm512_maskz_expand_epi16(mask, Load::load(values, _mm_popcnt_u32(mask) * 2));
}

struct Float16 {
    using X = float;
    static constexpr int kBytes = 2;
    using Chunk = Float32::Chunk;

    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        const __m512i words = expand_words<Load>(mask, values);
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
    }
    static MSP_HD void multiply(__m512& sum, const Chunk& w, const X* x) { Float32::multiply(sum, w, x); }
    static MSP_HD void prepare(const uint16_t* x, float* to) {
        _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)));
        _mm512_storeu_ps(to + 16, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + 16))));
    }
};

// Even and odd columns of bf16 are fp32 after a shift and a mask; the tokens lie in the same order.
struct BFloat16 {
    using X = float;
    static constexpr int kBytes = 2;
    using Chunk = Float32::Chunk;

    static MSP_HD Chunk split(__m512i words) {
        return {
            _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        return split(expand_words<Load>(mask, values));
    }
    static MSP_HD void multiply(__m512& sum, const Chunk& w, const X* x) { Float32::multiply(sum, w, x); }
    static MSP_HD void prepare(const uint16_t* x, float* to) {
        const Chunk both = split(_mm512_loadu_si512(x));
        _mm512_storeu_ps(to, both.low);
        _mm512_storeu_ps(to + 16, both.high);
    }
};

// How far ahead the streams are fetched: the hardware stops at every 4 KiB, and starts again too late.
constexpr int64_t kAhead = 2048;

// The sums of Rows rows with Tokens tokens, over all chunks. With few of them in flight, Unroll chunks at a
// time give each other time to finish.
template <class F, class Load, int Rows, int Tokens, int Unroll>
MSP_HD void tile(const NmLinear& op, const typename F::X* x, int64_t row, int64_t token) {
    const Packed& weight = op.weight;
    const int64_t mask_bytes = bitmask_row_bytes(weight.columns);
    const int64_t value_bytes = weight.row_values() * F::kBytes;
    const int64_t step = weight.chunk_values() * F::kBytes;
    const int64_t whole = weight.columns / 32;
    const int64_t stride = weight.chunks() * 32;
    const auto* values = static_cast<const uint8_t*>(weight.values) + row * value_bytes;
    const uint8_t* bits = weight.bitmask + row * mask_bytes;
    x += token * stride;

    __m512 sums[Unroll][Rows][Tokens];
    for (auto& unrolled : sums) {
        for (auto& of_row : unrolled) {
            for (auto& sum : of_row) sum = _mm512_setzero_ps();
        }
    }
    int64_t chunk = 0;
    auto take = [&](int64_t c, int u) __attribute__((always_inline)) {
        typename F::Chunk w[Rows];
        for (int r = 0; r < Rows; ++r) {
            uint32_t mask;
            std::memcpy(&mask, bits + r * mask_bytes + 4 * c, 4);
            w[r] = F::template expand<Load>(mask, values + r * value_bytes + c * step);
        }
        for (int t = 0; t < Tokens; ++t) {
            for (int r = 0; r < Rows; ++r) F::multiply(sums[u][r][t], w[r], x + t * stride + c * 32);
        }
    };
    for (; chunk + Unroll <= whole; chunk += Unroll) {
        if constexpr (Unroll > 1) {
            const char* ahead = reinterpret_cast<const char*>(values + chunk * step) + kAhead;
            for (int64_t line = 0; line < Unroll * step; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(bits + 4 * chunk) + kAhead / 4, _MM_HINT_T0);
        }
        for (int u = 0; u < Unroll; ++u) take(chunk + u, u);
    }
    for (; chunk < whole; ++chunk) take(chunk, 0);
    if (weight.columns % 32 != 0) {
        for (int r = 0; r < Rows; ++r) {
            const uint32_t mask = chunk_mask(bits + r * mask_bytes, mask_bytes, whole);
            const auto w = F::template expand<Load>(mask, values + r * value_bytes + whole * step);
            for (int t = 0; t < Tokens; ++t) F::multiply(sums[0][r][t], w, x + t * stride + whole * 32);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int t = 0; t < Tokens; ++t) {
            __m512 sum = sums[0][r][t];
            for (int u = 1; u < Unroll; ++u) sum = _mm512_add_ps(sum, sums[u][r][t]);
            store_output(op, token + t, row + r, _mm512_reduce_add_ps(sum));
        }
    }
}

template <class F, class Load, int Rows>
MSP_HD void rows_with_all_tokens(const NmLinear& op, const typename F::X* x, int64_t row) {
    int64_t token = 0;
    for (; token + 4 <= op.tokens; token += 4) tile<F, Load, Rows, 4, 1>(op, x, row, token);
    if (op.tokens - token >= 2) {
        tile<F, Load, Rows, 2, 1>(op, x, row, token);
        token += 2;
    }
    if (token < op.tokens) tile<F, Load, Rows, 1, 2>(op, x, row, token);
}

template <class F, class Load>
void rows_loading(const NmLinear& op, const typename F::X* x, int64_t begin, int64_t end) {
    if (op.tokens == 1) {
        for (int64_t row = begin; row < end; ++row) tile<F, Load, 1, 1, 4>(op, x, row, 0);
        return;
    }
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) rows_with_all_tokens<F, Load, 4>(op, x, row);
    for (; row < end; ++row) rows_with_all_tokens<F, Load, 1>(op, x, row);
}

// The first row from which on a load of 64 bytes could reach past the end of the values.
MSP_HD int64_t first_exact_row(const Packed& weight) {
    const int64_t row_bytes = weight.row_values() * dtype_bytes(weight.dtype);
    const int64_t last = row_bytes > 0 ? (64 + row_bytes - 1) / row_bytes : weight.rows;
    return last < weight.rows ? weight.rows - last : 0;
}

// Calls run<Load>(begin, end) with the cheapest loads that are safe.
template <int ValueBytes, class Run>
MSP_HD void choose_loads(const Packed& weight, int64_t begin, int64_t end, const Run& run) {
    const int64_t exact = first_exact_row(weight);
    const int64_t plain_end = end < exact ? end : exact;
    // an expand of 32-bit values takes 16 columns, which in groups of 32 may hold all that the chunk keeps
    int64_t most = weight.chunk_values() * ValueBytes;
    if (ValueBytes == 4 && weight.group_size < 32) most /= 2;
    if (begin < plain_end) {
        if (most <= 16) {
            run(Plain<16>(), begin, plain_end);
        } else if (most <= 32) {
            run(Plain<32>(), begin, plain_end);
        } else {
            run(Plain<64>(), begin, plain_end);
        }
    }
    if (begin < exact) begin = exact;
    if (begin < end) run(Exact(), begin, end);
}

template <class F>
void rows_of(const NmLinear& op, const void* prepared, int64_t begin, int64_t end) {
    const auto* x = static_cast<const typename F::X*>(prepared);
    choose_loads<F::kBytes>(op.weight, begin, end, [&](auto load, int64_t from, int64_t to) {
        rows_loading<F, decltype(load)>(op, x, from, to);
    });
}

// One token, padded with zeros to whole chunks.
template <class F, class Stored>
void prepare_as(const NmLinear& op, int64_t token, void* prepared) {
    const int64_t columns = op.weight.columns;
    const auto* x = static_cast<const Stored*>(op.x) + token * columns;
    auto* to = static_cast<typename F::X*>(prepared);
    const int64_t whole = columns / 32 * 32;
    for (int64_t c = 0; c < whole; c += 32) F::prepare(x + c, to + c);
    if (whole < columns) {
        Stored rest[32] = {};
        std::memcpy(rest, x + whole, static_cast<size_t>(columns - whole) * sizeof(Stored));
        F::prepare(rest, to + whole);
    }
}

void unpack_rows(const Packed& weight, void* dense, int64_t begin, int64_t end) {
    const int bytes = dtype_bytes(weight.dtype);
    const int64_t mask_bytes = bitmask_row_bytes(weight.columns);
    const int64_t value_bytes = weight.row_values() * bytes;
    const int64_t step = weight.chunk_values() * bytes;
    auto rows = [&](auto load, auto wide, int64_t from, int64_t to) {
        using Load = decltype(load);
        for (int64_t row = from; row < to; ++row) {
            const auto* values = static_cast<const uint8_t*>(weight.values) + row * value_bytes;
            const uint8_t* bits = weight.bitmask + row * mask_bytes;
            auto* out = static_cast<uint8_t*>(dense) + row * weight.columns * bytes;
            for (int64_t chunk = 0; chunk < weight.chunks(); ++chunk) {
                const uint32_t mask = chunk_mask(bits, mask_bytes, chunk);
                const int64_t left = weight.columns - chunk * 32;
                const uint32_t lanes = _bzhi_u32(~0u, static_cast<unsigned>(left < 32 ? left : 32));
                if constexpr (decltype(wide)::value) {
                    const auto w = Float32::expand<Load>(mask, values + chunk * step);
                    auto* to_floats = reinterpret_cast<float*>(out) + chunk * 32;
                    _mm512_mask_storeu_ps(to_floats, lanes & 0xffffu, w.low);
                    _mm512_mask_storeu_ps(to_floats + 16, lanes >> 16, w.high);
                } else {
                    _mm512_mask_storeu_epi16(out + chunk * 64, lanes,
                                             expand_words<Load>(mask, values + chunk * step));
                }
            }
        }
    };
    if (bytes == 4) {
        choose_loads<4>(weight, begin, end,
                        [&](auto load, int64_t from, int64_t to) { rows(load, std::true_type(), from, to); });
    } else {
        choose_loads<2>(weight, begin, end, [&](auto load, int64_t from, int64_t to) {
            rows(load, std::false_type(), from, to);
        });
    }
}

}  // namespace
}  // namespace msp
