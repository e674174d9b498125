// nm_select on the CPU: one function for every instruction set, each in a file of its own.
#pragma once

#include "../nm_select.h"
#include "isa.h"

namespace msp {

// Fills values and bitmask. Returns how many weights are not finite or have a score that is not; where there
// are any, what was kept of their groups is unspecified.
int64_t nm_select(const NmSelect& op, Isa isa, int threads);

// The rows [begin, end) of it, on the calling thread.
int64_t nm_select_rows_scalar(const NmSelect& op, int64_t begin, int64_t end);
int64_t nm_select_rows_avx2(const NmSelect& op, int64_t begin, int64_t end);
int64_t nm_select_rows_avx512(const NmSelect& op, int64_t begin, int64_t end);

}  // namespace msp
