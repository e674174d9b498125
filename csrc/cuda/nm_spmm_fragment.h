// The weight in fragment order: the operands of a warp for a sparse tensor core instruction lie together, so
// that 16-byte loads of consecutive lanes read them and no shuffle is needed. One layout serves
// mma.sp.m16n8k32 and wgmma.sp.m64nNk32, whose four warps each take the operands of one mma.sp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../nm_format.h"

namespace msp {

constexpr int kSpmmSlabRows = 16;
constexpr int kSpmmBlockColumns = 64;
constexpr int kSpmmTileRows = 128;       // of every kernel; the weight is padded to it with zeros
constexpr int kSpmmColumnPadding = 256;  // four blocks, the sm_90a kernel's pipeline

// 16 rows x 64 columns. Row r of the first 8 belongs to lanes 4r ... 4r+3, with row r + 8.
//
//   values[h][lane]  column half h, t = lane % 4: the two kept weights of columns 32h + 4t ... + 3
//                    of row r (x) and of row r + 8 (y), then those of columns 32h + 16 + 4t ... + 3
//                    of both rows (z, w)
//   metadata[lane]   4-bit codes of the groups of columns 16t ... 16t + 15: of row r in bits 0-15, of row
//                    r + 8 above. Of each four lanes, selector 0 reads 0 and 1 for h = 0, selector 1 2 and 3.
struct SpmmBlock {
    uint4 values[2][32];
    uint32_t metadata[32];
};
static_assert(sizeof(SpmmBlock) == 1152, "9 bits a weight, without padding");

MSP_HD constexpr int64_t spmm_slabs(int64_t rows) {
    return (rows + kSpmmTileRows - 1) / kSpmmTileRows * (kSpmmTileRows / kSpmmSlabRows);
}

// Blocks in a row of blocks; those of a slab are consecutive.
MSP_HD constexpr int64_t spmm_blocks_per_slab(int64_t columns) {
    return (columns + kSpmmColumnPadding - 1) / kSpmmColumnPadding * (kSpmmColumnPadding / kSpmmBlockColumns);
}

// The two positions, in bits 0-1 and 2-3, of the kept weights of four: the lower two positions in `kept`. The
// instructions need two ascending positions even if fewer weights are kept.
MSP_HD constexpr uint32_t spmm_group_code(uint32_t kept) {
    // for kept = 0 ... 15: none -> (0,1), one -> (i,3) or (0,3), else the lower two
    constexpr uint64_t codes = 0x498e4dcc'498e4dc4;
    return static_cast<uint32_t>(codes >> (4 * kept)) & 15;
}

}  // namespace msp
