// Shares out the rows of an op that scores weights and counts those that are not finite.
#pragma once

#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace msp {

// The least weights in a range of rows: small enough to share the work evenly, and large enough that the cost
// of sharing is negligible.
constexpr int64_t kGrainWeights = 1 << 16;

// The sum of the results of `rows` for ranges that cover the rows of `op`.
template <class Op>
int64_t over_scored_rows(const Op& op, int64_t (*rows)(const Op& op, int64_t begin, int64_t end),
                         int threads) {
    if (op.columns == 0) return 0;
    std::atomic<int64_t> not_finite{0};
    parallel_for(op.rows, kGrainWeights / op.columns, threads, [&](int64_t begin, int64_t end) {
        not_finite.fetch_add(rows(op, begin, end), std::memory_order_relaxed);
    });
    return not_finite.load();
}

}  // namespace msp
