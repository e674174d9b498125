#include "nm_keep.h"

#include "parallel.h"

namespace msp {

void nm_keep_range_scalar(const NmKeep& op, int64_t begin, int64_t end) { keep_range(op, begin, end); }

void nm_keep(const NmKeep& op, Isa isa, int threads) {
    auto* range = MSP_BEST(isa, nm_keep_range);
    // a range is 64 KiB of ranks: a multiple of every vector length, and a fraction of a cache
    parallel_for(op.count, 1 << 16, threads, [&](int64_t begin, int64_t end) { range(op, begin, end); });
}

}  // namespace msp
