// nm_select on the CPU: one function for every instruction set, each in a file of its own.
#pragma once

#include "../nm_select.h"
#include "isa.h"

namespace msp {

// Fills values and bitmask. Returns the number of weights that are not finite or have a score that is not;
// the selection in their groups is unspecified.
int64_t nm_select(const NmSelect& op, Isa isa, int threads);

// Computes the rows [begin, end) on the calling thread.
int64_t nm_select_rows_scalar(const NmSelect& op, int64_t begin, int64_t end);
int64_t nm_select_rows_avx2(const NmSelect& op, int64_t begin, int64_t end);
int64_t nm_select_rows_avx512(const NmSelect& op, int64_t begin, int64_t end);

}  // namespace msp
