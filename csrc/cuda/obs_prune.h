// obs_prune on a CUDA device, one block of columns at a time: SparseGPT's column sweep (arXiv 2301.00774,
// algorithm 1) with N:M selection. The update of the columns after a block is one GEMM, which the caller
// runs.
#pragma once

#include <cstdint>
#include <string>

namespace msp {

constexpr int kObsBlockColumns = 128;

struct ObsBlock {
    float*
        weight;  // [rows, columns]; only columns start ... start + width - 1 are touched, zero where pruned
    uint8_t* kept;        // [rows, columns]: 1 or 0, written in the same columns
    float* errors;        // [width, rows]: of the weights pruned, over the factor's diagonal; else zero
    const float* factor;  // [columns, columns] upper, H^-1 = U^T U; what lies below the diagonal is not used
    int64_t rows;
    int64_t columns;
    int64_t start;
    int width;       // at most kObsBlockColumns, a multiple of group_size
    int group_size;  // 4, 8, 16 or 32
    int n;           // kept of each group
};

// Runs in order on `stream` of the device that holds the weight; returns without waiting. Returns an error
// message, or an empty string.
std::string obs_prune_block_cuda(const ObsBlock& op, void* stream);

}  // namespace msp
