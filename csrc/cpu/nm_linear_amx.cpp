// nm_linear in bf16 with AMX tiles, for several tokens: weights are expanded to tiles in the first cache and
// multiplied there.
#include "nm_linear_avx512.h"

namespace msp {
namespace {

// A tile is 16 rows of 64 bytes. A tile of weights holds 16 rows by the 32 columns of a chunk, a tile of
// tokens 16 pairs of columns by 16 tokens, and a tile of sums 16 rows by 16 tokens.
constexpr int kTile = 16;
constexpr int kTileBytes = 1024;
// Chunks that are expanded before any is multiplied: stored bytes must reach the cache before a tile can load
// them.
constexpr int kBatch = 8;

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

int64_t batch_bytes(const NmLinear& op) { return op.weight.chunks() * kTileBytes; }

// Sixteen tokens in the layout of a product's second operand: for each chunk 16 pairs of columns, each pair
// for 16 tokens. Missing tokens and columns are zero.
void prepare(const NmLinear& op, int64_t first, void* prepared) {
    const int64_t columns = op.weight.columns;
    const int64_t tokens = op.tokens - first < kTile ? op.tokens - first : kTile;
    const auto* x = static_cast<const uint16_t*>(op.x) + first * columns;
    auto* to = static_cast<uint8_t*>(prepared);
    alignas(64) uint16_t part[kTile][32];
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(kTile));
    for (int64_t chunk = 0; chunk < op.weight.chunks(); ++chunk, to += kTileBytes) {
        const int64_t left = columns - chunk * 32;
        const __mmask32 lanes = _bzhi_u32(~0u, static_cast<unsigned>(left < 32 ? left : 32));
        for (int64_t t = 0; t < kTile; ++t) {
            const __mmask32 there = t < tokens ? lanes : 0;
            _mm512_store_si512(part[t], _mm512_maskz_loadu_epi16(there, x + t * columns + chunk * 32));
        }
        for (int pair = 0; pair < kTile; ++pair) {
            _mm512_storeu_si512(
                to + pair * 64,
                _mm512_i32gather_epi32(rows, reinterpret_cast<const int*>(&part[0][2 * pair]), 4));
        }
    }
}

// Sums of 16 rows with one batch of tokens, rounded and stored; only `rows` and `tokens` of them exist.
MSP_HD void store_tile(const NmLinear& op, const float* sums, int64_t row, int64_t rows, int64_t token) {
    const int64_t tokens = op.tokens - token < kTile ? op.tokens - token : kTile;
    const __mmask16 lanes = static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(rows)));
    __m512 bias = _mm512_setzero_ps();
    if (op.bias) {
        const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(op.bias) + row);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    const __m512i stride = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(kTile));
    for (int64_t t = 0; t < tokens; ++t) {
        const __m512 of_token = _mm512_add_ps(_mm512_i32gather_ps(stride, sums + t, 4), bias);
        auto* y = static_cast<uint16_t*>(op.y) + (token + t) * op.weight.rows + row;
        _mm256_mask_storeu_epi16(y, lanes, (__m256i)_mm512_cvtneps_pbh(of_token));
    }
}

MSP_HD void fetch(const uint8_t* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T1);
    }
}

// Expands chunks [begin, end) of `rows` rows into tiles, one after the other; missing rows stay as they are.
template <class Load>
MSP_HD void expand_tiles(const Packed& weight, int64_t row, int64_t rows, int64_t begin, int64_t end,
                         uint8_t* tiles) {
    const int64_t mask_bytes = bitmask_row_bytes(weight.columns);
    const int64_t value_bytes = weight.row_values() * 2;
    const int64_t step = weight.chunk_values() * 2;
    const auto* values = static_cast<const uint8_t*>(weight.values) + row * value_bytes;
    const uint8_t* bits = weight.bitmask + row * mask_bytes;
    // The hardware recognises no stream in rows that are walked side by side, but 16 rows together are one
    // stretch of memory. So as many bytes of the next stretch are fetched as are used of this one.
    const uint8_t* next_values = values + kTile * value_bytes;
    const uint8_t* next_bits = bits + kTile * mask_bytes;
    for (int64_t r = 0; r < rows; ++r, values += value_bytes, bits += mask_bytes) {
        fetch(next_values + (begin * kTile + r * (end - begin)) * step, (end - begin) * step);
        fetch(next_bits + (begin * kTile + r * (end - begin)) * 4, (end - begin) * 4);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const uint32_t mask = chunk_mask(bits, mask_bytes, chunk);
            _mm512_store_si512(tiles + (chunk - begin) * kTileBytes + r * 64,
                               expand_chunk<Load>(mask, values + chunk * step));
        }
    }
}

// 16 rows with 16, 32, 48 or 64 tokens. A product waits 52 cycles for the one before it on the same sums and
// takes 16 itself, so with few sums the chunks take turns on two sets of them.
template <class Load, int Batches>
MSP_HD void rows_with_tokens(const NmLinear& op, const uint8_t* x, int64_t row, int64_t rows) {
    const int64_t chunks = op.weight.chunks();
    const int64_t batch = chunks * kTileBytes;
    alignas(64) uint8_t tiles[kBatch * kTileBytes];
    if (rows < kTile) std::memset(tiles, 0, sizeof tiles);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t begin = 0; begin < chunks; begin += kBatch) {
        const int64_t end = begin + kBatch < chunks ? begin + kBatch : chunks;
        expand_tiles<Load>(op.weight, row, rows, begin, end, tiles);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const uint8_t* with = x + chunk * kTileBytes;
            _tile_loadd(4, tiles + (chunk - begin) * kTileBytes, 64);
            _tile_loadd(5, with, 64);
            if constexpr (Batches == 1) {
                if (chunk % 2 == 0) {
                    _tile_dpbf16ps(0, 4, 5);
                } else {
                    _tile_dpbf16ps(1, 4, 5);
                }
            } else if constexpr (Batches == 2) {
                _tile_loadd(6, with + batch, 64);
                if (chunk % 2 == 0) {
                    _tile_dpbf16ps(0, 4, 5);
                    _tile_dpbf16ps(1, 4, 6);
                } else {
                    _tile_dpbf16ps(2, 4, 5);
                    _tile_dpbf16ps(3, 4, 6);
                }
            } else {
                _tile_loadd(6, with + batch, 64);
                _tile_loadd(7, with + 2 * batch, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_dpbf16ps(1, 4, 6);
                _tile_dpbf16ps(2, 4, 7);
                if constexpr (Batches == 4) {
                    _tile_loadd(5, with + 3 * batch, 64);
                    _tile_dpbf16ps(3, 4, 5);
                }
            }
        }
    }
    alignas(64) float sums[4 * kTile * kTile];
    _tile_stored(0, sums + 0 * kTile * kTile, 64);
    _tile_stored(1, sums + 1 * kTile * kTile, 64);
    _tile_stored(2, sums + 2 * kTile * kTile, 64);
    _tile_stored(3, sums + 3 * kTile * kTile, 64);
    if constexpr (Batches <= 2) {
        for (int i = 0; i < Batches * kTile * kTile; ++i) sums[i] += sums[Batches * kTile * kTile + i];
    }
    for (int b = 0; b < Batches; ++b) store_tile(op, sums + b * kTile * kTile, row, rows, b * kTile);
}

template <class Load>
void rows_loading(const NmLinear& op, const uint8_t* x, int64_t begin, int64_t end) {
    const int64_t batches = (op.tokens + kTile - 1) / kTile;
    for (int64_t row = begin; row < end; row += kTile) {
        const int64_t rows = end - row < kTile ? end - row : kTile;
        if (batches == 1) {
            rows_with_tokens<Load, 1>(op, x, row, rows);
        } else if (batches == 2) {
            rows_with_tokens<Load, 2>(op, x, row, rows);
        } else if (batches == 3) {
            rows_with_tokens<Load, 3>(op, x, row, rows);
        } else {
            rows_with_tokens<Load, 4>(op, x, row, rows);
        }
    }
}

void rows(const NmLinear& op, const void* prepared, int64_t begin, int64_t end) {
    const TileConfig config;
    _tile_loadconfig(&config);
    choose_loads<2>(op.weight, begin, end, [&](auto load, int64_t from, int64_t to) {
        rows_loading<decltype(load)>(op, static_cast<const uint8_t*>(prepared), from, to);
    });
    _tile_release();
}

}  // namespace

const LinearPath kLinearAmx{kTile, kTokensInCache, 0, batch_bytes, prepare, rows, unpack_rows};

}  // namespace msp
