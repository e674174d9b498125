// Compiled for AVX-512 (see CMakeLists.txt) and only called if the CPU has it.
#include "nm_keep.h"

namespace msp {

void nm_keep_range_avx512(const NmKeep& op, int64_t begin, int64_t end) { keep_range(op, begin, end); }

}  // namespace msp
