// Compiled for AVX2 with FMA and F16C (see CMakeLists.txt) and only called if the CPU has them. Everything
// here has internal linkage or is inlined: no other file may use the code of this one.
#include <immintrin.h>

#include <array>

#include "nm_linear.h"

namespace msp {
namespace {

// AVX2 has no expand: a byte of mask chooses a shuffle from a table, eight columns at a time.
struct Tables {
    // For 16-bit values: pshufb's byte indices; 0x80 gives zero.
    alignas(16) uint8_t words[256][16];
    // For 32-bit values: lane indices, negative for lanes that become zero.
    alignas(32) int32_t doubles[256][8];

    constexpr Tables() : words(), doubles() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int lane = 0; lane < 8; ++lane) {
                const bool kept = (mask >> lane & 1) != 0;
                words[mask][2 * lane] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
                words[mask][2 * lane + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
                doubles[mask][lane] = kept ? next : INT32_MIN;
                next += kept ? 1 : 0;
            }
        }
    }
};
constexpr Tables kTables;

MSP_HD __m256i spread_doubles(__m256i values, uint32_t mask) {
    const __m256i lanes = _mm256_load_si256((const __m256i*)kTables.doubles[mask]);
    const __m256 spread = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(values, lanes));
    return _mm256_castps_si256(_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes)));
}

MSP_HD __m128i spread_words(__m128i values, uint32_t mask) {
    return _mm_shuffle_epi8(values, _mm_load_si128((const __m128i*)kTables.words[mask]));
}

struct Float32 {
    static constexpr int kBytes = 4;
    static MSP_HD __m256 expand(const uint8_t* values, uint32_t mask) {
        return _mm256_castsi256_ps(spread_doubles(_mm256_loadu_si256((const __m256i*)values), mask));
    }
    static MSP_HD void store(void* out, const uint8_t* values, uint32_t mask) {
        _mm256_storeu_ps(static_cast<float*>(out), expand(values, mask));
    }
};

struct Words {
    static constexpr int kBytes = 2;
    static MSP_HD __m128i spread(const uint8_t* values, uint32_t mask) {
        return spread_words(_mm_loadu_si128((const __m128i*)values), mask);
    }
    static MSP_HD void store(void* out, const uint8_t* values, uint32_t mask) {
        _mm_storeu_si128(static_cast<__m128i*>(out), spread(values, mask));
    }
};

struct Float16 : Words {
    static MSP_HD __m256 expand(const uint8_t* values, uint32_t mask) {
        return _mm256_cvtph_ps(spread(values, mask));
    }
};

struct BFloat16 : Words {
    static MSP_HD __m256 expand(const uint8_t* values, uint32_t mask) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(spread(values, mask)), 16));
    }
};

MSP_HD float horizontal_sum(__m256 sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// The first value of each of the four bytes of a chunk, counted from the chunk's start so that the four do
// not wait for each other. Groups of 4 and 8 put the same number of values under every byte.
MSP_HD void chunk_offsets(const Packed& weight, uint32_t mask, int bytes, int64_t (&offsets)[4]) {
    if (weight.group_size <= 8) {
        const int64_t step = 8 / weight.group_size * weight.n * bytes;
        for (int i = 0; i < 4; ++i) offsets[i] = i * step;
    } else {
        offsets[0] = 0;
        offsets[1] = _mm_popcnt_u32(mask & 0xff) * bytes;
        offsets[2] = _mm_popcnt_u32(mask & 0xffff) * bytes;
        offsets[3] = _mm_popcnt_u32(mask & 0xffffff) * bytes;
    }
}

// Calls visit(column / 8, bytes of values, mask) for each eight columns of a row. A load takes eight values
// at any address; if it would reach past the array, the values are copied first.
template <class F, class Visit>
MSP_HD void for_each_eight(const Packed& weight, int64_t row, const Visit& visit) {
    constexpr int64_t kLoad = 8 * F::kBytes;
    const int64_t mask_bytes = bitmask_row_bytes(weight.columns);
    const uint8_t* bits = weight.bitmask + row * mask_bytes;
    const int64_t row_values = weight.row_values();
    const auto* values = static_cast<const uint8_t*>(weight.values) + row * row_values * F::kBytes;
    const auto* end = static_cast<const uint8_t*>(weight.values) + weight.rows * row_values * F::kBytes;
    const int64_t step = weight.chunk_values() * F::kBytes;
    const int64_t whole = weight.columns / 32;
    // from this chunk on, a load could reach past the end
    const int64_t room = step > 0 ? (end - values - kLoad) / step : 0;
    const int64_t safe = room < 0 ? 0 : room < whole ? room : whole;
    int64_t offsets[4];
    for (int64_t chunk = 0; chunk < safe; ++chunk, values += step) {
        uint32_t mask;
        std::memcpy(&mask, bits + 4 * chunk, 4);
        _mm_prefetch(reinterpret_cast<const char*>(values) + 1024, _MM_HINT_T0);
        chunk_offsets(weight, mask, F::kBytes, offsets);
        visit(4 * chunk, values, mask & 0xff);
        visit(4 * chunk + 1, values + offsets[1], mask >> 8 & 0xff);
        visit(4 * chunk + 2, values + offsets[2], mask >> 16 & 0xff);
        visit(4 * chunk + 3, values + offsets[3], mask >> 24);
    }
    for (int64_t byte = 4 * safe; byte < mask_bytes; ++byte) {
        if (end - values < kLoad) {
            alignas(32) uint8_t copy[kLoad] = {};
            if (values < end) std::memcpy(copy, values, static_cast<size_t>(end - values));
            visit(byte, copy, bits[byte]);
        } else {
            visit(byte, values, bits[byte]);
        }
        values += _mm_popcnt_u32(bits[byte]) * F::kBytes;
    }
}

template <class F, int Tokens>
MSP_HD void row_with_tokens(const NmLinear& op, const float* x, int64_t row, int64_t token) {
    const int64_t stride = op.weight.chunks() * 32;
    // an FMA waits four cycles for the one before it on the same sum, so a lone token has several sums
    constexpr int kSums = Tokens == 1 ? 4 : 2;
    __m256 sums[Tokens][kSums];
    for (auto& of_token : sums) {
        for (auto& sum : of_token) sum = _mm256_setzero_ps();
    }
    for_each_eight<F>(
        op.weight, row,
        [&](int64_t eight, const uint8_t* values, uint32_t mask) __attribute__((always_inline)) {
            const __m256 w = F::expand(values, mask);
            for (int t = 0; t < Tokens; ++t) {
                __m256& sum = sums[t][eight % kSums];
                sum = _mm256_fmadd_ps(w, _mm256_load_ps(x + (token + t) * stride + 8 * eight), sum);
            }
        });
    for (int t = 0; t < Tokens; ++t) {
        __m256 sum = _mm256_add_ps(sums[t][0], sums[t][1]);
        if constexpr (kSums == 4) sum = _mm256_add_ps(sum, _mm256_add_ps(sums[t][2], sums[t][3]));
        store_output(op, token + t, row, horizontal_sum(sum));
    }
}

template <class F>
void rows_of(const NmLinear& op, const float* x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        int64_t token = 0;
        for (; token + 4 <= op.tokens; token += 4) row_with_tokens<F, 4>(op, x, row, token);
        if (op.tokens - token >= 2) {
            row_with_tokens<F, 2>(op, x, row, token);
            token += 2;
        }
        if (token < op.tokens) row_with_tokens<F, 1>(op, x, row, token);
    }
}

template <class F>
void unpack_of(const Packed& weight, void* dense, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        auto* out = static_cast<uint8_t*>(dense) + row * weight.columns * F::kBytes;
        for_each_eight<F>(weight, row,
                          [&](int64_t eight, const uint8_t* values, uint32_t mask)
                              __attribute__((always_inline)) {
                                  const int64_t left = weight.columns - 8 * eight;
                                  uint8_t* to = out + 8 * eight * F::kBytes;
                                  if (left >= 8) return F::store(to, values, mask);
                                  uint8_t rest[8 * F::kBytes];
                                  F::store(rest, values, mask);
                                  std::memcpy(to, rest, static_cast<size_t>(left) * F::kBytes);
                              });
    }
}

int64_t batch_bytes(const NmLinear& op) { return op.weight.chunks() * 32 * 4; }

// One token in fp32, padded with zeros to whole chunks.
void prepare(const NmLinear& op, int64_t token, void* prepared) {
    const int64_t columns = op.weight.columns;
    auto* to = static_cast<float*>(prepared);
    for (int64_t c = 0; c < columns; ++c) to[c] = load_float(op.x, op.weight.dtype, token * columns + c);
    for (int64_t c = columns; c < op.weight.chunks() * 32; ++c) to[c] = 0;
}

void rows(const NmLinear& op, const void* prepared, int64_t begin, int64_t end) {
    const auto* x = static_cast<const float*>(prepared);
    switch (op.weight.dtype) {
        case Dtype::kFloat32:
            return rows_of<Float32>(op, x, begin, end);
        case Dtype::kFloat16:
            return rows_of<Float16>(op, x, begin, end);
        default:
            return rows_of<BFloat16>(op, x, begin, end);
    }
}

void unpack(const Packed& weight, void* dense, int64_t begin, int64_t end) {
    if (dtype_bytes(weight.dtype) == 4) {
        unpack_of<Float32>(weight, dense, begin, end);
    } else {
        unpack_of<Words>(weight, dense, begin, end);
    }
}

}  // namespace

const LinearPath kLinearAvx2{1, kTokensInCache, 0, batch_bytes, prepare, rows, unpack};

}  // namespace msp
