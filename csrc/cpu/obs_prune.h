// obs_prune on the CPU: SparseGPT's column sweep (arXiv 2301.00774, algorithm 1) with N:M selection.
#pragma once

#include <cstdint>

#include "isa.h"

namespace msp {

struct ObsPrune {
    const float* weight;  // [rows, columns]
    const float* factor;  // [columns, columns] upper, H^-1 = U^T U; entries below the diagonal are not read
    float* updated;       // [rows, columns]: zero if pruned
    uint8_t* kept;        // [rows, columns]: 1 or 0
    int64_t rows;
    int64_t columns;
    int group_size;
    int n;  // kept of each group
};

// On vector paths every product is fused into its sum, and a weight takes the errors of the columns before it
// in their order: the result depends neither on threads, tiles or blocks, nor on the vector path.
void obs_prune(const ObsPrune& op, Isa isa, int threads);

constexpr int kObsBlock = 128;  // columns swept between two updates of the later ones

// The most rows that a thread takes at a time, since the factor is read again for the next rows: a multiple
// of AVX-512's 16 lanes and of the update's 6 rows.
constexpr int64_t kObsTileRows = 288;

// The factor in the order in which every tile reads it. For each block of kObsBlock rows these are its corner
// [kObsBlock, kObsBlock], zero below the diagonal, then panels [rows of the block, panel_columns] of the
// columns to the right, zero past the last column. Rows of the factor itself, a power of two apart, would
// share a few sets of the caches.
struct ObsFactor {
    const float* entries;
    const int64_t* offsets;  // of each block
};

// The functions of an instruction set.
struct ObsPath {
    // The columns that the registers of the update cover.
    int panel_columns;
    // Computes the rows [begin, end), at most kObsTileRows of them, on the calling thread.
    void (*tile)(const ObsPrune& op, const ObsFactor& factor, int64_t begin, int64_t end);
};

extern const ObsPath obs_path_scalar;
extern const ObsPath obs_path_avx2;
extern const ObsPath obs_path_avx512;

}  // namespace msp
