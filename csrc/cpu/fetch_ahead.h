// Prefetching for the x86 files that read a weight once, from its first byte to its last.
#pragma once

#include <immintrin.h>

#include "../nm_format.h"

namespace msp {

// The hardware prefetcher stops at every page, and its restart costs more than the arithmetic.
MSP_HD void fetch_ahead(const void* from) {
    _mm_prefetch(static_cast<const char*>(from) + 2048, _MM_HINT_T0);
}

}  // namespace msp
