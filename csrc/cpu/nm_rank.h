// nm_rank on the CPU: one function for every instruction set, each in a file of its own.
#pragma once

#include "../nm_rank.h"
#include "isa.h"

namespace msp {

// Fills the ranks. Returns the number of weights that are not finite or have a score that is not; the ranks
// in their groups are unspecified.
int64_t nm_rank(const NmRank& op, Isa isa, int threads);

// Computes the rows [begin, end) on the calling thread.
int64_t nm_rank_rows_scalar(const NmRank& op, int64_t begin, int64_t end);
int64_t nm_rank_rows_avx2(const NmRank& op, int64_t begin, int64_t end);
int64_t nm_rank_rows_avx512(const NmRank& op, int64_t begin, int64_t end);

}  // namespace msp
