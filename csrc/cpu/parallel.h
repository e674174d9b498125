// Loops that run on the threads of torch's own OpenMP runtime, which is found at run time. A runtime of msp's
// own would bring a second pool that competes with the first for the cores. Without torch's runtime, loops
// run on msp's own pool.
#pragma once

#include <cstdint>
#include <functional>

namespace msp {

// Calls body(begin, end) on disjoint ranges that cover [0, count), at most `threads` at a time, and returns
// when all have returned. Every range begins at a multiple of `grain`. The calling thread takes part; `body`
// must not throw. May be called from several threads at once, from inside a body, and in a child after fork.
void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace msp
