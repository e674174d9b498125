// y = x W^T + b on a CUDA device, for few tokens and a packed weight in the order of nm_tiles.h.
#pragma once

#include <string>

#include "../nm_format.h"

namespace msp {

// Which kernel: one product a kept weight, or expansion into tensor core fragments.
enum class LinearForm : int { kGather = 0, kExpand = 1 };

// A weight [rows, columns] in tile order.
struct TiledWeight {
    const void* values;   // 16-byte aligned
    const void* bitmask;  // 16-byte aligned
    Dtype dtype;          // of values, x, bias and y: 16 bits wide
    int rows, columns;
    int group_size, n;
};

// Work is cut into `splits` x `slices` parts of the columns and blocks of `stripes` x 16 rows; a block of 8
// warps has slices = 8 / stripes of them. How it is cut decides the order of additions, so the same cut gives
// the same bits.
struct LinearCut {
    LinearForm form;
    int tokens_at_once;  // gather: 1, 2, 4; expand: 8, 16, 32
    int stripes;         // 1, 2, 4, 8
    int splits;
};

struct NmLinear : TiledWeight, LinearCut {
    const void* x;     // [tokens, columns], 16-byte aligned
    const void* bias;  // [rows] or null
    void* y;           // [tokens, rows]
    float* partials;   // [splits, tokens, rows], read and written where splits > 1
    int tokens;
    // Filled in by the launch, which divides once for all: chunks of tokens_at_once, tiles of a split (one
    // more in the first `split_extra`), values of a word of 32 columns.
    int log_stripes = 0, chunks = 0, split_tiles = 0, split_extra = 0, per_word = 0;
};

constexpr int kLinearWarps = 8, kLogLinearWarps = 3;

// Whether a kernel for these exists.
bool nm_linear_has(LinearForm form, int group_size, int n, int tokens_at_once);

// Dynamic shared memory of a block, to be held against the device's limit.
int64_t nm_linear_shared_bytes(int columns, const LinearCut& cut);

// Computes y in order on `stream` of the device that holds the weight; allocates nothing and returns without
// waiting. Returns what went wrong, or an empty string.
std::string nm_linear_cuda(const NmLinear& op, void* stream);

// Products of the same activations with several weights, which may differ in rows and pattern. `blocks` is
// how many blocks each takes: filled in by the launch.
struct NmLinearGroup {
    static constexpr int kMost = 4;
    NmLinear linears[kMost];
    int blocks[kMost];
    int count;
};

// The same as nm_linear_cuda of each, to the last bit, with one launch for all (and one for each that is
// split). All must have the same x, sizes but for rows, and cut, and the form must be kGather.
std::string nm_linear_group_cuda(const NmLinearGroup& group, void* stream);

}  // namespace msp
