// The CUDA nm_select on the CPU: every block, phase after phase, thread after thread, on the functions that
// the kernel is made of. A shared library for the tests.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/nm_select.h"
#include "cpu/specialise.h"
#include "cuda/nm_select_block.h"

namespace {

using namespace msp;

struct Emulated {
    // Threads of a phase run last to first: none may lean on what a lower one did.
    template <Dtype D, int M, ScoreKind Kind>
    static int64_t run(const NmSelect& op, int64_t, int64_t) {
        using Block = SelectBlock<D, M, Kind>;
        const int64_t count = (Block::units(op) + kSelectThreads - 1) / kSelectThreads;
        int32_t wrong = 0;
        const size_t bytes = static_cast<size_t>(Block::shared_bytes(op.n));
        for (int64_t block = 0; block < count; ++block) {
            std::vector<Bytes16> shared(bytes / 16 + 2);
            std::memset(shared.data(), 0xEE, shared.size() * 16);
            auto* values = reinterpret_cast<typename Block::Bits*>(shared.data());
            for (int t = kSelectThreads; t-- > 0;) Block::select(op, block, t, values, &wrong);
            const auto* end = reinterpret_cast<const unsigned char*>(shared.data()) + bytes;
            if (std::any_of(end, end + 16, [](unsigned char byte) { return byte != 0xEE; })) return -1;
            for (int t = kSelectThreads; t-- > 0;) Block::write(op, block, t, values);
        }
        return wrong ? -2 : Block::loads_vectors(op);
    }
};

}  // namespace

// Returns whether vector loads served the call, -2 when the kernel met NaN or infinity, or -1 when a thread
// wrote past the block's shared memory.
extern "C" int64_t nm_select_emulated(const void* weight, int dtype, int64_t rows, int64_t columns,
                                      int group_size, int n, int compliant, int kind,
                                      const float* column_scale, const float* row_term,
                                      const float* column_term, const float* matrix, void* values,
                                      uint8_t* bitmask) {
    const NmSelect op{{weight, static_cast<Dtype>(dtype), rows, columns, group_size,
                       static_cast<ScoreKind>(kind), column_scale, row_term, column_term, matrix},
                      n,
                      compliant != 0,
                      values,
                      bitmask};
    return specialise<Emulated>(op, 0, 0);
}
