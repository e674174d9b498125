// nm_linear in bf16 for many tokens, with AVX-512's products of bf16 pairs: a matrix product in which the
// lanes of a vector are tokens. Weights are expanded into the first cache: while some rows are multiplied,
// the next ones are expanded.
#include "nm_linear_avx512.h"
#include "transpose_avx512.h"

namespace msp {
namespace {

constexpr int kLanes = 16;
constexpr int kTileVectors = 4;
constexpr int kTileTokens = kTileVectors * kLanes;
// The most tokens, left over after whole vectors, for which columns in the lanes are cheaper.
constexpr int kFewTokens = 4;
// The tokens for which the weight is expanded once; their sums stay in the second cache.
constexpr int64_t kMostTokens = 512;
// Rows that a thread takes together, and chunks of their columns that it expands at a time.
constexpr int kPanelRows = 48;
constexpr int kBlockChunks = 8;
constexpr int kChunkBytes = 64;
constexpr int kBlockBytes = kBlockChunks * kChunkBytes;

struct alignas(64) Work {
    uint8_t weights[kPanelRows][kBlockBytes];
    // for a row, with the tokens of a tile in turn; with few tokens, 16 sums each
    float sums[kMostTokens / kTileTokens + 1][kPanelRows][kTileTokens];
};

int64_t batch_bytes(const NmLinear& op) { return op.weight.chunks() * kLanes * kChunkBytes; }

// The layout of the tokens: in tiles of up to four vectors, pair of columns by pair of columns, and last a
// tile of few tokens, chunk by chunk.
struct Tokens {
    int64_t count, vectors, tiles, bytes_of_vector;

    MSP_HD explicit Tokens(const NmLinear& op)
        : count(op.tokens),
          vectors((count + kLanes - 1 - kFewTokens) / kLanes),
          tiles((vectors + kTileVectors - 1) / kTileVectors + (count > vectors * kLanes)),
          bytes_of_vector(batch_bytes(op)) {}

    // 0 for the tile of few tokens.
    MSP_HD int64_t vectors_of(int64_t tile) const {
        const int64_t left = vectors - tile * kTileVectors;
        return left < 0 ? 0 : left < kTileVectors ? left : kTileVectors;
    }
    MSP_HD int64_t chunk_bytes(int64_t tile) const {
        const int64_t of_tile = vectors_of(tile);
        return (of_tile > 0 ? of_tile * kLanes : kFewTokens) * kChunkBytes;
    }
    MSP_HD int64_t offset(int64_t tile) const {
        return (vectors_of(tile) > 0 ? tile * kTileVectors : vectors) * bytes_of_vector;
    }
};

// Sixteen tokens or, after the last whole vector, a few.
void prepare(const NmLinear& op, int64_t first, void* prepared) {
    const Tokens all(op);
    const int64_t columns = op.weight.columns, vector = first / kLanes;
    const int64_t tokens = op.tokens - first < kLanes ? op.tokens - first : kLanes;
    const int64_t tile = vector < all.vectors ? vector / kTileVectors : all.tiles - 1;
    const int64_t together = all.vectors_of(tile), chunk_bytes = all.chunk_bytes(tile);
    const auto* x = static_cast<const uint16_t*>(op.x) + first * columns;
    auto* to = static_cast<uint8_t*>(prepared) - vector * all.bytes_of_vector + all.offset(tile);
    for (int64_t chunk = 0; chunk < op.weight.chunks(); ++chunk, to += chunk_bytes) {
        const int64_t left = columns - chunk * 32;
        const __mmask32 there = _bzhi_u32(~0u, static_cast<unsigned>(left < 32 ? left : 32));
        __m512i rows[kLanes];
        for (int t = 0; t < kLanes; ++t) {
            rows[t] = _mm512_maskz_loadu_epi16(t < tokens ? there : 0, x + t * columns + chunk * 32);
        }
        if (together == 0) {
            for (int t = 0; t < kFewTokens; ++t) _mm512_store_si512(to + t * kChunkBytes, rows[t]);
            continue;
        }
        transpose(rows);
        for (int pair = 0; pair < kLanes; ++pair) {
            _mm512_store_si512(to + (pair * together + vector % kTileVectors) * 64, rows[pair]);
        }
    }
}

// Rows of the packed weight, and the place of their expanded form.
struct Expansion {
    int64_t rows, mask_bytes, value_bytes, step;
    const uint8_t* values;
    const uint8_t* bits;
    uint8_t* to;
    // the distance from the bytes that are read now to those of one block later
    int64_t values_ahead, bits_ahead;

    MSP_HD void expand(int64_t first, int64_t chunk) const {
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* of_row = values + r * value_bytes + chunk * step;
            const uint8_t* row_bits = bits + r * mask_bytes;
            const __m512i words = expand_chunk<Exact>(chunk_mask(row_bits, mask_bytes, chunk), of_row);
            _mm512_store_si512(to + r * kBlockBytes + (chunk - first) * kChunkBytes, words);
            _mm_prefetch(reinterpret_cast<const char*>(of_row + values_ahead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(row_bits + chunk * 4 + bits_ahead), _MM_HINT_T0);
        }
    }
};

// Adds chunks [begin, end) of Rows expanded rows to their sums with a tile of tokens: a pair of columns at a
// time with a vector of tokens or, for few tokens, a chunk with one token.
template <int Rows, int Vectors, bool Few>
void multiply(const uint8_t* weights, const uint8_t* x, int64_t begin, int64_t end, float* sums,
              const Expansion& meanwhile) {
    const Expansion next = meanwhile;
    __m512 total[Rows][Vectors];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) total[r][v] = _mm512_load_ps(sums + r * kTileTokens + v * kLanes);
    }
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        next.expand(begin, chunk);
        for (int i = 0; i < (Few ? 1 : kLanes); ++i) {
            __m512i tokens[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) tokens[v] = _mm512_load_si512(x + v * 64);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) {
                const uint8_t* of_row = weights + r * kBlockBytes;
                int32_t pair;
                std::memcpy(&pair, of_row, 4);
                const __m512i w = Few ? _mm512_load_si512(of_row) : _mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) {
                    total[r][v] = _mm512_dpbf16_ps(total[r][v], (__m512bh)w, (__m512bh)tokens[v]);
                }
            }
            x += Vectors * 64;
            weights += Few ? kChunkBytes : 4;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) _mm512_store_ps(sums + r * kTileTokens + v * kLanes, total[r][v]);
    }
}

// Stores the sums of sixteen rows from `row` of the panel on with sixteen tokens.
void store(const NmLinear& op, const Tokens& tokens, const Work& work, int64_t vector, int64_t begin,
           int64_t row, int64_t rows) {
    alignas(64) float done[kLanes][kLanes];
    if (vector < tokens.vectors) {
        __m512i square[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            square[r] =
                _mm512_load_si512(&work.sums[vector / kTileVectors][row + r][vector % kTileVectors * kLanes]);
        }
        transpose(square);
        for (int t = 0; t < kLanes; ++t) _mm512_store_si512(done[t], square[t]);
    } else {
        for (int r = 0; r < kLanes; ++r) {
            const float* of = work.sums[tokens.tiles - 1][row + r];
            alignas(16) float four[kFewTokens];
            _mm_store_ps(four, sums_of_lanes(_mm512_load_ps(of), _mm512_load_ps(of + 16),
                                             _mm512_load_ps(of + 32), _mm512_load_ps(of + 48)));
            for (int t = 0; t < kFewTokens; ++t) done[t][r] = four[t];
        }
    }
    for (int64_t t = 0; t < kLanes && vector * kLanes + t < tokens.count; ++t) {
        store_outputs(op, vector * kLanes + t, begin + row, rows, done[t]);
    }
}

// Rows [begin, begin + rows), at most kPanelRows. If there are fewer, the rest of the panel is multiplied
// too, but not stored.
void panel(const NmLinear& op, const uint8_t* x, Work& work, int64_t begin, int64_t rows) {
    const Packed& weight = op.weight;
    const Tokens tokens(op);
    const int64_t chunks = weight.chunks();
    Expansion next;
    next.mask_bytes = bitmask_row_bytes(weight.columns);
    next.value_bytes = weight.row_values() * 2;
    next.step = weight.chunk_values() * 2;
    std::memset(work.sums, 0, static_cast<size_t>(tokens.tiles) * sizeof work.sums[0]);
    for (int64_t block = 0; block < chunks; block += kBlockChunks) {
        const int64_t end = block + kBlockChunks < chunks ? block + kBlockChunks : chunks;
        // after the last block, the first one of the next panel
        next.values_ahead =
            end < chunks ? kBlockChunks * next.step : kPanelRows * next.value_bytes - block * next.step;
        next.bits_ahead = end < chunks ? kBlockChunks * 4 : kPanelRows * next.mask_bytes - block * 4;
        auto expand_next = [&](int64_t row, int64_t most) {
            next.rows = rows - row < most ? rows - row : most;
            next.values = static_cast<const uint8_t*>(weight.values) + (begin + row) * next.value_bytes;
            next.bits = weight.bitmask + (begin + row) * next.mask_bytes;
            next.to = work.weights[0] + row * kBlockBytes;
        };
        for (int64_t tile = 0; tile < tokens.tiles; ++tile) {
            const uint8_t* of_tile = x + tokens.offset(tile) + block * tokens.chunk_bytes(tile);
            auto all_rows = [&](auto kernel, int64_t step) {
                // when the first tile begins, only its first rows are expanded
                const int64_t expanded = tile == 0 ? step : 0;
                expand_next(0, expanded);
                for (int64_t chunk = block; chunk < end; ++chunk) next.expand(block, chunk);
                for (int64_t row = 0; row < rows; row += step) {
                    expand_next(row + step, expanded);
                    kernel(work.weights[row], of_tile, block, end, work.sums[tile][row], next);
                }
            };
            switch (tokens.vectors_of(tile)) {
                case 4:
                    all_rows(multiply<6, 4, false>, 6);
                    break;
                case 3:
                    all_rows(multiply<6, 3, false>, 6);
                    break;
                case 2:
                    all_rows(multiply<12, 2, false>, 12);
                    break;
                case 1:
                    all_rows(multiply<12, 1, false>, 12);
                    break;
                default:
                    all_rows(multiply<6, kFewTokens, true>, 6);
            }
        }
    }
    for (int64_t vector = 0; vector * kLanes < tokens.count; ++vector) {
        for (int64_t row = 0; row < rows; row += kLanes) {
            store(op, tokens, work, vector, begin, row, rows - row < kLanes ? rows - row : kLanes);
        }
    }
}

void rows(const NmLinear& op, const void* prepared, int64_t begin, int64_t end) {
    Work work;
    for (int64_t row = begin; row < end; row += kPanelRows) {
        const int64_t rows = end - row < kPanelRows ? end - row : kPanelRows;
        panel(op, static_cast<const uint8_t*>(prepared), work, row, rows);
    }
}

}  // namespace

const LinearPath kLinearManyAvx512Bf16{kLanes,  kMostTokens, kPanelRows, batch_bytes,
                                       prepare, rows,        unpack_rows};

}  // namespace msp
