// Threads that all use parallel_for at once, nested and with more helpers than work, for the thread
// sanitizer. Exits 1 when an item was not run exactly once.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

bool covers_all(int64_t count, int64_t grain, int threads) {
    std::vector<int> runs(static_cast<size_t>(count), 0);  // plain: two bodies on one item would be a race
    msp::parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
    });
    for (int run : runs) {
        if (run != 1) return false;
    }
    return true;
}

bool nested() {
    std::atomic<int64_t> sum{0};
    msp::parallel_for(8, 1, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            msp::parallel_for(100, 7, 3, [&](int64_t b, int64_t e) { sum += e - b; });
        }
    });
    return sum == 800;
}

}  // namespace

int main() {
    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&right, caller] {
            for (int round = 0; round < 300; ++round) {
                if (!covers_all(1 + round % 67, 1 + round % 5, 1 + (round + caller) % 6)) right = false;
                if (round % 50 == 0 && !nested()) right = false;
            }
        });
    }
    for (auto& caller : callers) caller.join();
    std::printf("parallel_for: %s\n", right ? "every item ran once" : "an item was missed or ran twice");
    return right ? 0 : 1;
}
