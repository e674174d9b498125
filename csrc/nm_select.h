// What nm_select works on. The caller has checked everything; pointers are to contiguous row-major data.
#pragma once

#include "nm_format.h"
#include "nm_score.h"

namespace msp {

struct NmSelect {
    const void* weight;  // [rows, columns]
    Dtype dtype;
    int64_t rows;
    int64_t columns;  // a multiple of group_size
    int group_size;   // 4, 8, 16 or 32
    int n;            // kept of each group, 0 ... group_size
    bool compliant;   // at most 2 of each aligned 4; then n <= group_size / 2
    ScoreKind kind;
    const float* column_scale;  // [columns]; may be null for kRelative, where it then counts as 1
    const float* row_term;      // [rows]
    const float* column_term;   // [columns]
    const float* matrix;        // [rows, columns]
    void* values;
    uint8_t* bitmask;
};

}  // namespace msp
