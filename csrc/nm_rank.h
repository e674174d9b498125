// The arguments of nm_rank.
#pragma once

#include "nm_score.h"

namespace msp {

struct NmRank : Scored {
    uint8_t* rank;  // [rows, columns]
};

}  // namespace msp
