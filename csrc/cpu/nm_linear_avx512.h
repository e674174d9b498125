// Expands packed weights with AVX-512, for the files that multiply them. Everything has internal linkage or
// is inlined: code of a file for one instruction set must not serve another file.
#pragma once

#include <type_traits>

#include "expand_avx512.h"
#include "nm_linear.h"

namespace msp {
namespace {

// A weight is read in its order in memory, 32 columns of a row at a time: vpexpand spreads the values of a
// chunk by its 32 bits of mask. Every chunk has the same number of values, so the pointers advance by
// constants and nothing waits for a popcount.

// Loads the values for an expand. Plain: a fixed number of bytes, perhaps more than there are values; the
// excess is ignored. Exact: no byte more, for the end of the array.
template <int Bytes>
struct Plain {
    static MSP_HD __m512i load(const uint8_t* from, uint32_t) {
        if constexpr (Bytes == 16) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from));
        if constexpr (Bytes == 32) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_loadu_si512(from);
    }
};

// For 1:8 in 16 bits, whose chunks need no expand.
struct OneOfEight : Plain<16> {};

struct Exact {
    static MSP_HD __m512i load(const uint8_t* from, uint32_t bytes) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes), from);
    }
};

// How a dtype is expanded and multiplied, and the largest tile of rows by tokens whose sums, weights and
// tokens fit the registers. kAhead: the distance at which values are fetched, since the hardware prefetcher
// stops at every 4 KiB and restarts too late.
struct Float32 {
    using X = float;
    static constexpr int kBytes = 4;
    static constexpr int64_t kAhead = 2048;
    static constexpr int kRows = 4;
    static constexpr int kTokens = 4;
    struct Chunk {
        __m512 low, high;
    };

    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        const uint32_t low = _mm_popcnt_u32(mask & 0xffffu) * 4;
        const uint32_t high = _mm_popcnt_u32(mask >> 16) * 4;
        return {_mm512_castsi512_ps(expand_doubles(mask & 0xffffu, Load::load(values, low))),
                _mm512_castsi512_ps(expand_doubles(mask >> 16, Load::load(values + low, high)))};
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
MSP_HD __m512i expand_chunk(uint32_t mask, const uint8_t* values) {
    if constexpr (std::is_same_v<Load, OneOfEight>) {
        // a group fills a quarter of the vector, and its value may have any place in it
        const __m512i group = _mm512_setr_epi64(0, 0, 0x1000100010001, 0x1000100010001, 0x2000200020002,
                                                0x2000200020002, 0x3000300030003, 0x3000300030003);
        return _mm512_maskz_permutexvar_epi16(mask, group, Load::load(values, 0));
    }
    return expand_words(mask, Load::load(values, _mm_popcnt_u32(mask) * 2));
}

struct Float16 {
    using X = float;
    static constexpr int kBytes = 2;
    static constexpr int64_t kAhead = 2048;
    static constexpr int kRows = 4;
    static constexpr int kTokens = 4;
    using Chunk = Float32::Chunk;

    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        const __m512i words = expand_chunk<Load>(mask, values);
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
    }
    static MSP_HD void multiply(__m512& sum, const Chunk& w, const X* x) { Float32::multiply(sum, w, x); }
    static MSP_HD void prepare(const uint16_t* x, float* to) {
        _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)));
        _mm512_storeu_ps(to + 16, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + 16))));
    }
};

// A shift and a mask make fp32 of the even and odd columns of bf16; the tokens lie in the same order.
struct BFloat16 {
    using X = float;
    static constexpr int kBytes = 2;
    static constexpr int64_t kAhead = 2048;
    static constexpr int kRows = 4;
    static constexpr int kTokens = 4;
    using Chunk = Float32::Chunk;

    static MSP_HD Chunk split(__m512i words) {
        return {
            _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    template <class Load>
    static MSP_HD Chunk expand(uint32_t mask, const uint8_t* values) {
        return split(expand_chunk<Load>(mask, values));
    }
    static MSP_HD void multiply(__m512& sum, const Chunk& w, const X* x) { Float32::multiply(sum, w, x); }
    static MSP_HD void prepare(const uint16_t* x, float* to) {
        const Chunk both = split(_mm512_loadu_si512(x));
        _mm512_storeu_ps(to, both.low);
        _mm512_storeu_ps(to + 16, both.high);
    }
};

// The bytes of tokens that stay in the first cache while row after row is multiplied with them.
constexpr int64_t kTokenBytes = 32 << 10;

// Rows, in tiles, that are multiplied with one part of the tokens before the next part begins, and whose
// outputs are stored together.
constexpr int kRowsAbreast = 16;

// The sums of the lanes of four vectors. All four are added in the same order.
MSP_HD __m128 sums_of_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(quarters),
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quarters), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// round_to_bfloat16 of each lane.
MSP_HD __m256i round_to_bfloat16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(1 << 22)), 16));
}

// Outputs of one token for `rows` rows, at most kRowsAbreast, as store_output stores one.
MSP_HD void store_outputs(const NmLinear& op, int64_t token, int64_t row, int64_t rows, const float* sums) {
    const auto lanes = static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(rows)));
    const int64_t index = token * op.weight.rows + row;
    __m512 sum = _mm512_maskz_loadu_ps(lanes, sums);
    if (op.weight.dtype == Dtype::kFloat32) {
        if (op.bias) {
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(op.bias) + row));
        }
        _mm512_mask_storeu_ps(static_cast<float*>(op.y) + index, lanes, sum);
        return;
    }
    const bool half = op.weight.dtype == Dtype::kFloat16;
    if (op.bias) {
        const __m256i bias = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(op.bias) + row);
        sum = _mm512_add_ps(sum,
                            half ? _mm512_cvtph_ps(bias)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(op.y) + index, lanes,
                             half ? _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT) : round_to_bfloat16(sum));
}

// Tokens lie Width at a time, 32 columns of one token after 32 of the one before, so a tile reads one stretch
// of memory. At the strides of whole tokens it would use few sets of the cache.

// The weight from a row on, in chunks.
template <class F, class Load>
struct RowsOf {
    int64_t mask_bytes, value_bytes, step;
    const uint8_t* values;
    const uint8_t* bits;

    MSP_HD RowsOf(const Packed& weight, int64_t row)
        : mask_bytes(bitmask_row_bytes(weight.columns)),
          value_bytes(weight.row_values() * F::kBytes),
          step(weight.chunk_values() * F::kBytes),
          values(static_cast<const uint8_t*>(weight.values) + row * value_bytes),
          bits(weight.bitmask + row * mask_bytes) {}

    MSP_HD typename F::Chunk whole_chunk(int64_t row, int64_t chunk) const {
        uint32_t mask;
        std::memcpy(&mask, bits + row * mask_bytes + 4 * chunk, 4);
        return F::template expand<Load>(mask, values + row * value_bytes + chunk * step);
    }

    // The last chunk of a row may be incomplete.
    MSP_HD typename F::Chunk chunk(int64_t row, int64_t chunk) const {
        const uint32_t mask = chunk_mask(bits + row * mask_bytes, mask_bytes, chunk);
        return F::template expand<Load>(mask, values + row * value_bytes + chunk * step);
    }

    // The position F::kAhead after `count` chunks of the first row.
    MSP_HD void fetch_ahead(int64_t chunk, int64_t count) const {
        const char* ahead = reinterpret_cast<const char*>(values + chunk * step) + F::kAhead;
        for (int64_t line = 0; line < count * step; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(bits + 4 * chunk) + F::kAhead / 4, _MM_HINT_T0);
    }

    // A chunk of rows [begin, end): the hardware recognises no stream in rows that are walked side by side.
    MSP_HD void fetch_rows(int64_t begin, int64_t end, int64_t chunk) const {
        for (int64_t row = begin; row < end; ++row) {
            _mm_prefetch(reinterpret_cast<const char*>(values + row * value_bytes + chunk * step),
                         _MM_HINT_T1);
            if (chunk % 16 != 0) continue;
            _mm_prefetch(reinterpret_cast<const char*>(bits + row * mask_bytes + 4 * chunk), _MM_HINT_T1);
        }
    }
};

// Rows rows with Tokens tokens. If they are few, Unroll chunks at a time hide each other's latency.
template <class F, class Load, int Rows, int Tokens, int Unroll, int Width>
struct Tile {
    static constexpr int64_t kStep = Width * 32;

    __m512 sums[Unroll][Rows][Tokens];

    MSP_HD void clear() {
        for (auto& unrolled : sums) {
            for (auto& of_row : unrolled) {
                for (auto& sum : of_row) sum = _mm512_setzero_ps();
            }
        }
    }

    // Adds chunks [begin, end) to the sums, expanding them on the way; of two calls for a row, the first
    // takes a multiple of Unroll.
    MSP_HD void take(const NmLinear& op, const typename F::X* x, int64_t row, int64_t token, int64_t begin,
                     int64_t end) {
        const RowsOf<F, Load> weight(op.weight, row);
        const int64_t whole = end < op.weight.columns / 32 ? end : op.weight.columns / 32;
        auto add = [&](int64_t chunk, int u) __attribute__((always_inline)) {
            typename F::Chunk w[Rows];
            for (int r = 0; r < Rows; ++r) w[r] = weight.whole_chunk(r, chunk);
            multiply(w, x + chunk * kStep, u);
        };
        int64_t chunk = begin;
        for (; chunk + Unroll <= whole; chunk += Unroll) {
            if constexpr (Rows == 1) {
                weight.fetch_ahead(chunk, Unroll);
            } else if (token == 0) {
                weight.fetch_rows(Rows, 2 * Rows, chunk);
            }
            for (int u = 0; u < Unroll; ++u) add(chunk + u, u);
        }
        for (; chunk < whole; ++chunk) add(chunk, 0);
        if (chunk < end) {
            typename F::Chunk w[Rows];
            for (int r = 0; r < Rows; ++r) w[r] = weight.chunk(r, chunk);
            multiply(w, x + chunk * kStep, 0);
        }
    }

    MSP_HD void multiply(const typename F::Chunk (&w)[Rows], const typename F::X* x, int u) {
        for (int t = 0; t < Tokens; ++t) {
            for (int r = 0; r < Rows; ++r) F::multiply(sums[u][r][t], w[r], x + t * 32);
        }
    }

    // The sums of row r with token t go to to[t][r].
    MSP_HD void finish(float (*to)[kRowsAbreast]) {
        constexpr int kCount = Rows * Tokens;
        __m512 totals[(kCount + 3) / 4 * 4];
        for (auto& total : totals) total = _mm512_setzero_ps();
        for (int i = 0; i < kCount; ++i) {
            totals[i] = sums[0][i / Tokens][i % Tokens];
            for (int u = 1; u < Unroll; ++u) {
                totals[i] = _mm512_add_ps(totals[i], sums[u][i / Tokens][i % Tokens]);
            }
        }
        alignas(16) float four[4];
        for (int i = 0; i < kCount; i += 4) {
            _mm_store_ps(four, sums_of_lanes(totals[i], totals[i + 1], totals[i + 2], totals[i + 3]));
            for (int k = 0; k < 4 && i + k < kCount; ++k) to[(i + k) % Tokens][(i + k) / Tokens] = four[k];
        }
    }
};

// Rows [begin, end), at most kRowsAbreast and a multiple of Rows, with Tokens tokens.
template <class F, class Load, int Rows, int Tokens, int Unroll, int Width>
MSP_HD void tiles(const NmLinear& op, const typename F::X* x, int64_t begin, int64_t end, int64_t token) {
    const int64_t chunks = op.weight.chunks();
    int64_t part = kTokenBytes / (Width * 32 * static_cast<int64_t>(sizeof(typename F::X)));
    if (chunks <= part + part / 2) part = chunks;
    Tile<F, Load, Rows, Tokens, Unroll, Width> waiting[kRowsAbreast / Rows];
    float done[Tokens][kRowsAbreast];
    x += token / Width * chunks * Width * 32 + token % Width * 32;
    for (int64_t chunk = 0; chunk < chunks; chunk += part) {
        const int64_t stop = chunk + part < chunks ? chunk + part : chunks;
        for (int64_t row = begin; row < end; row += Rows) {
            Tile<F, Load, Rows, Tokens, Unroll, Width> tile;
            if (chunk == 0) {
                tile.clear();
            } else {
                tile = waiting[(row - begin) / Rows];
            }
            tile.take(op, x, row, token, chunk, stop);
            if (stop == chunks) {
                float (*to)[kRowsAbreast] = reinterpret_cast<float (*)[kRowsAbreast]>(&done[0][row - begin]);
                tile.finish(to);
            } else {
                waiting[(row - begin) / Rows] = tile;
            }
        }
    }
    for (int t = 0; t < Tokens; ++t) store_outputs(op, token + t, begin, end - begin, done[t]);
}

template <class F, class Load, int Rows>
MSP_HD void with_all_tokens(const NmLinear& op, const typename F::X* x, int64_t begin, int64_t end) {
    int64_t token = 0;
    for (; token + F::kTokens <= op.tokens; token += F::kTokens) {
        tiles<F, Load, Rows, F::kTokens, 1, F::kTokens>(op, x, begin, end, token);
    }
    if (F::kTokens > 4 && op.tokens - token >= 4) {
        tiles<F, Load, Rows, 4, 1, F::kTokens>(op, x, begin, end, token);
        token += 4;
    }
    if (op.tokens - token >= 2) {
        tiles<F, Load, Rows, 2, 1, F::kTokens>(op, x, begin, end, token);
        token += 2;
    }
    if (token < op.tokens) tiles<F, Load, Rows, 1, 2, F::kTokens>(op, x, begin, end, token);
}

// Calls run(from, to) on at most kRowsAbreast rows at a time, a multiple of Rows, and returns the first of
// the remaining rows.
template <int Rows, class Run>
MSP_HD int64_t abreast(int64_t begin, int64_t end, const Run& run) {
    constexpr int64_t kStep = kRowsAbreast / Rows * Rows;
    const int64_t stop = begin + (end - begin) / Rows * Rows;
    for (int64_t row = begin; row < stop; row += kStep) run(row, row + kStep < stop ? row + kStep : stop);
    return stop;
}

template <class F, class Load>
void rows_loading(const NmLinear& op, const typename F::X* x, int64_t begin, int64_t end) {
    if (op.tokens == 1) {
        abreast<1>(begin, end,
                   [&](int64_t from, int64_t to) { tiles<F, Load, 1, 1, 4, 1>(op, x, from, to, 0); });
        return;
    }
    begin = abreast<F::kRows>(
        begin, end, [&](int64_t from, int64_t to) { with_all_tokens<F, Load, F::kRows>(op, x, from, to); });
    abreast<1>(begin, end, [&](int64_t from, int64_t to) { with_all_tokens<F, Load, 1>(op, x, from, to); });
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
    // an expand of 32-bit values takes 16 columns, which in groups of 32 may hold all values of the chunk
    int64_t most = weight.chunk_values() * ValueBytes;
    if (ValueBytes == 4 && weight.group_size < 32) most /= 2;
    if (begin < plain_end) {
        if (ValueBytes == 2 && weight.group_size == 8 && weight.n == 1) {
            run(OneOfEight(), begin, plain_end);
        } else if (most <= 16) {
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

template <class F>
MSP_HD int64_t width(const NmLinear& op) {
    return op.tokens == 1 ? 1 : F::kTokens;
}

template <class F>
int64_t batch_bytes(const NmLinear& op) {
    return op.weight.chunks() * 32 * width<F>(op) * static_cast<int64_t>(sizeof(typename F::X));
}

// Tokens from `first` on, as many as lie together, padded with zeros to whole chunks.
template <class F, class Stored>
void prepare_as(const NmLinear& op, int64_t first, void* prepared) {
    const int64_t columns = op.weight.columns, whole = columns / 32, step = width<F>(op) * 32;
    for (int64_t t = 0; t < width<F>(op) && first + t < op.tokens; ++t) {
        const auto* x = static_cast<const Stored*>(op.x) + (first + t) * columns;
        auto* to = static_cast<typename F::X*>(prepared) + t * 32;
        for (int64_t chunk = 0; chunk < whole; ++chunk) F::prepare(x + chunk * 32, to + chunk * step);
        if (whole < op.weight.chunks()) {
            Stored rest[32] = {};
            std::memcpy(rest, x + whole * 32, static_cast<size_t>(columns - whole * 32) * sizeof(Stored));
            F::prepare(rest, to + whole * step);
        }
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
                                             expand_chunk<Load>(mask, values + chunk * step));
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
