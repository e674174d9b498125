// The order in which a GPU reads a packed weight. Any N:M keeps the same number of every 32 columns, so the
// order consists of words of 32 columns and does not depend on M. It is a permutation: values and bitmask
// keep their sizes.
//
//   tile   16 rows x 256 columns, read by one warp; tiles lie row of tiles after row of tiles
//   lane   l of the warp has 4 words: rows l/4 and l/4 + 8, columns 32 (l%4) + {0, 128} of the tile
//   bitmask of a tile  [lane][word] as it stands in the canonical form: 16 bytes a lane
//   values of a tile   a lane's 4 words in order, cut into chunks of 8 values: [chunk][lane][8]
//
// A warp reads each chunk with one 512-byte access, and the words have the places of A in mma.m16n8k16: there
// a lane has rows l/4 and l/4 + 8 too, and it may have any columns as long as B has the same.
// msp/ops/linear/tile_order.py makes the same order in torch.
#pragma once

#include "../nm_format.h"

namespace msp {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 256;
constexpr int kBlockColumns = 128;  // of the first or the last two words of the lanes
constexpr int kLaneWords = 4;
constexpr int kChunkValues = 8;
constexpr int kWarpChunkBytes = 512;
constexpr int kTileMaskBytes = 512;

// For values of 2 bytes.
MSP_HD constexpr int64_t tile_value_bytes(int per_word) {
    return static_cast<int64_t>(kTileRows) * kTileColumns / 32 * per_word * 2;
}

MSP_HD constexpr int word_row(int lane, int word) { return lane / 4 + 8 * (word % 2); }

MSP_HD constexpr int word_column(int lane, int word) { return 32 * (lane % 4) + kBlockColumns * (word / 2); }

// The layout of activations in shared memory for the gather: byte offset of a column of one token, counted
// from the first of the staged columns. Words of 32 columns lie 96 bytes apart: the four lanes that share a
// row work on the same group of their words at the same time, and at this distance groups of up to 16 columns
// (8 banks) of the four words never share a bank. Lanes of other rows read the same groups.
constexpr int kGatherWordBytes = 96;

MSP_HD constexpr int gather_offset(int block, int token, int lane_word, int column_in_word, int tokens) {
    return ((block * tokens + token) * 4 + lane_word) * kGatherWordBytes + 2 * column_in_word;
}

// The layout of activations for B fragments: offset of 8 columns (16 bytes). Eight tokens of the four words
// are 512 consecutive bytes, which a warp reads without a conflict.
MSP_HD constexpr int fragment_offset(int block, int byte_in_word, int token, int lane_word, int tokens) {
    return ((block * 4 + byte_in_word) * tokens + token) * 64 + lane_word * 16;
}

// The steps from the kept values of 8 columns to 4 registers of 2 columns each, by their byte of the bitmask.
// `selectors` picks, for each column, a value of a window of four (16 bits of a byte permutation for each two
// columns). The window starts at the byte's first value; if more than four are kept, the last four columns
// pick from the last four values. A column that is not kept picks the fourth value, which is 0 if at most
// three are kept; otherwise `keep`, a byte of ones for each kept column, clears it.
struct ExpandEntry {
    uint32_t selectors[2];
    uint32_t keep[2];
};

MSP_HD constexpr ExpandEntry expand_entry(uint32_t byte) {
    ExpandEntry entry{};
    const int kept = count_bits(byte);
    for (int column = 0; column < 8; ++column) {
        const bool is_kept = (byte >> column & 1) != 0;
        const int rank = count_bits(byte & ((1u << column) - 1));
        const int past = column >= 4 && kept > 4 ? kept - 4 : 0;
        const uint32_t value = static_cast<uint32_t>(is_kept ? rank - past : 3);
        const int place = 8 * (column % 4);
        entry.selectors[column / 4] |= (2 * value + 1) << (place + 4) | 2 * value << place;
        entry.keep[column / 4] |= (is_kept ? 0xffu : 0u) << place;
    }
    return entry;
}

// The table has a copy for each lane that reads at the same time, so that no two lanes use one bank: 16
// copies of 8 bytes, or 8 of 16 with `keep`. Either way 128 bytes an entry, 32 KiB in all.
constexpr int kExpandEntryBytes = 128;
constexpr int kExpandTableBytes = 256 * kExpandEntryBytes;

MSP_HD constexpr int expand_offset(uint32_t byte, int lane, bool with_keep) {
    return static_cast<int>(byte) * kExpandEntryBytes + (with_keep ? lane % 8 * 16 : lane % 16 * 8);
}

}  // namespace msp
