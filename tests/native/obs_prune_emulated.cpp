// The CUDA obs_prune on the CPU: every thread block, step after step, thread after thread, on the functions
// that the kernel is made of. A shared library for the tests.
#include <cstring>
#include <memory>

#include "cuda/obs_prune_block.h"

namespace {

using namespace msp;

// Threads of a step run last to first: none may lean on what a lower one did.
struct AllThreads {
    template <class Step>
    void operator()(const Step& step) const {
        for (int thread = kObsThreads; thread-- > 0;) step(thread);
    }
};

template <int M>
void emulate(const ObsBlock& op) {
    const auto shared = std::make_unique<ObsShared>();
    for (int64_t first_row = 0; first_row < op.rows; first_row += kObsRows) {
        std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof(ObsShared));  // NaN
        ObsSweep<M>{op, first_row, *shared}.run(AllThreads{});
    }
}

}  // namespace

extern "C" void obs_prune_block_emulated(float* weight, const float* factor, float* errors, uint8_t* kept,
                                         int64_t rows, int64_t columns, int64_t start, int64_t width,
                                         int64_t group_size, int64_t n) {
    const ObsBlock op{weight,
                      kept,
                      errors,
                      factor,
                      rows,
                      columns,
                      start,
                      static_cast<int>(width),
                      static_cast<int>(group_size),
                      static_cast<int>(n)};
    switch (op.group_size) {
        case 4:
            return emulate<4>(op);
        case 8:
            return emulate<8>(op);
        case 16:
            return emulate<16>(op);
        default:
            return emulate<32>(op);
    }
}
