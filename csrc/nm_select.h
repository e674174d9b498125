// The arguments of nm_select.
#pragma once

#include "nm_format.h"
#include "nm_score.h"

namespace msp {

struct NmSelect : Scored {
    int n;           // kept of each group, 0 ... group_size
    bool compliant;  // at most 2 of each aligned 4; then n <= group_size / 2
    void* values;
    uint8_t* bitmask;
};

}  // namespace msp
