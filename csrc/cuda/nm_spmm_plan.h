// How a product is cut into tiles: a table of token tiles, and the splits of K if there are too few tiles.
#pragma once

#include <cstdint>

#include "nm_spmm_fragment.h"

namespace msp {

struct SpmmPlan {
    bool wgmma;        // the sm_90a kernel
    int tokens;        // of a tile; its rows are kSpmmTileRows
    int cluster;       // blocks that share the tokens they read (sm_90a)
    int splits;        // of K, summed by a second kernel if there are several
    int split_blocks;  // of 64 columns in a split
    int row_tiles, token_tiles;
    int multiprocessors;

    MSP_HD int tiles() const { return row_tiles * token_tiles; }
};

struct SpmmTokenClass {
    int64_t tokens_at_most;
    int tile;
};
constexpr SpmmTokenClass kSpmmTilesSm80[] = {{16, 16}, {256, 64}, {INT64_MAX, 128}};
constexpr SpmmTokenClass kSpmmTilesSm90[] = {{128, 64}, {1024, 128}, {INT64_MAX, 256}};

constexpr int kSpmmMostSplits = 8;
constexpr int kSpmmMostSplitTokens = 64;  // larger tiles are made smaller before K is split
constexpr int kSpmmLeastSplitBlocks = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int Classes>
int spmm_token_tile(const SpmmTokenClass (&classes)[Classes], int64_t tokens) {
    for (const SpmmTokenClass& row : classes) {
        if (tokens <= row.tokens_at_most) return row.tile;
    }
    return classes[Classes - 1].tile;
}

// A device is full with one tile a multiprocessor; with fewer tiles K is split, down to 1024 columns.
inline SpmmPlan spmm_plan(int64_t tokens, int64_t rows, int64_t columns, bool wgmma, int multiprocessors) {
    SpmmPlan plan{};
    plan.wgmma = wgmma;
    plan.multiprocessors = multiprocessors;
    plan.tokens = wgmma ? spmm_token_tile(kSpmmTilesSm90, tokens) : spmm_token_tile(kSpmmTilesSm80, tokens);
    plan.row_tiles = static_cast<int>(ceil_div(rows, kSpmmTileRows));
    const auto tiles_of = [&](int tile) { return plan.row_tiles * ceil_div(tokens, tile); };
    while (plan.tokens > kSpmmMostSplitTokens && tiles_of(plan.tokens) < multiprocessors) plan.tokens /= 2;
    plan.token_tiles = static_cast<int>(ceil_div(tokens, plan.tokens));
    // two neighbouring multiprocessors always fit a cluster of two
    plan.cluster = wgmma && plan.row_tiles % 2 == 0 && multiprocessors >= 2 ? 2 : 1;
    const auto blocks = static_cast<int>(spmm_blocks_per_slab(columns));
    plan.splits = 1;
    while (plan.splits < kSpmmMostSplits && 2 * plan.splits * plan.tiles() <= multiprocessors &&
           blocks / (2 * plan.splits) >= kSpmmLeastSplitBlocks) {
        plan.splits *= 2;
    }
    // whole pipelines of four blocks
    plan.split_blocks = static_cast<int>(ceil_div(ceil_div(blocks, plan.splits), 4) * 4);
    plan.splits = static_cast<int>(ceil_div(blocks, plan.split_blocks));
    return plan;
}

// fp32 sums of every split, if there are several.
inline int64_t spmm_workspace_bytes(const SpmmPlan& plan) {
    if (plan.splits == 1) return 0;
    return int64_t{plan.splits} * plan.tiles() * plan.tokens * kSpmmTileRows *
           static_cast<int64_t>(sizeof(float));
}

}  // namespace msp
