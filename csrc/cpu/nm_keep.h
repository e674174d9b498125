// nm_keep on the CPU: one loop, compiled for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../nm_format.h"
#include "isa.h"

namespace msp {

struct NmKeep {
    const void* weight;   // [count]
    const uint8_t* rank;  // [count]
    void* out;            // [count], memory of its own
    Dtype dtype;
    int64_t count;
    int n;  // at least 0
};

void nm_keep(const NmKeep& op, Isa isa, int threads);

// Computes the elements [begin, end) on the calling thread.
void nm_keep_range_scalar(const NmKeep& op, int64_t begin, int64_t end);
void nm_keep_range_avx2(const NmKeep& op, int64_t begin, int64_t end);
void nm_keep_range_avx512(const NmKeep& op, int64_t begin, int64_t end);

// The loop itself. A mask in place of a choice reads the weight in either case, so that compilers vectorise
// it for every instruction set.
template <class Bits>
MSP_HD void keep_up_to(const NmKeep& op, int64_t begin, int64_t end, uint8_t last) {
    const Bits* __restrict weight = static_cast<const Bits*>(op.weight);
    const uint8_t* __restrict rank = op.rank;
    Bits* __restrict out = static_cast<Bits*>(op.out);
    for (int64_t i = begin; i < end; ++i) {
        out[i] = static_cast<Bits>(weight[i] & -static_cast<Bits>(rank[i] <= last));
    }
}

MSP_HD void keep_range(const NmKeep& op, int64_t begin, int64_t end) {
    const auto size = static_cast<int64_t>(dtype_bytes(op.dtype));
    if (op.n == 0) {
        std::memset(static_cast<char*>(op.out) + begin * size, 0, static_cast<size_t>((end - begin) * size));
        return;
    }
    const auto last = static_cast<uint8_t>(op.n > 255 ? 255 : op.n - 1);
    if (size == 4) {
        keep_up_to<uint32_t>(op, begin, end, last);
    } else {
        keep_up_to<uint16_t>(op, begin, end, last);
    }
}

}  // namespace msp
