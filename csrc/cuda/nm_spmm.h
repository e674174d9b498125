// y = x W^T + b on 2:4 sparse tensor cores, for every weight whose aligned groups of 4 keep at most 2.
//
// nm_spmm_pack turns the packed form (nm_format.h) into fragment order (nm_spmm_fragment.h), and nm_spmm
// multiplies with that. Both run in order on `stream` of the current device and return without waiting,
// allocate nothing and may be captured in a CUDA graph. They return an error message, or an empty string.
#pragma once

#include <cstdint>
#include <string>

#include "../nm_format.h"

namespace msp {

struct NmSpmmPack {
    const uint16_t* values;  // [rows, columns / group_size * n], fp16 or bf16
    const uint8_t* bitmask;  // [rows, ceil(columns / 8)]
    void* fragments;         // nm_spmm_fragment_bytes(rows, columns), at a multiple of 16
    int64_t rows, columns;   // columns a multiple of group_size
    int group_size, n;
};

struct NmSpmm {
    const void* x;                  // [tokens, columns], at a multiple of 16
    const void* fragments;          // what nm_spmm_pack has written
    const void* bias;               // [rows], may be null
    void* y;                        // [tokens, rows]
    void* workspace;                // nm_spmm_workspace_bytes, at a multiple of 16; null if that is 0
    Dtype dtype;                    // fp16 or bf16
    int64_t tokens, rows, columns;  // columns a multiple of 8
};

int64_t nm_spmm_fragment_bytes(int64_t rows, int64_t columns);

// For the current device.
std::string nm_spmm_workspace_bytes(int64_t tokens, int64_t rows, int64_t columns, int64_t* bytes);

std::string nm_spmm_pack_cuda(const NmSpmmPack& op, void* stream);

std::string nm_spmm_cuda(const NmSpmm& op, void* stream);

}  // namespace msp
