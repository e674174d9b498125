#include "obs_prune.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "obs_prune_tile.h"
#include "parallel.h"

namespace msp {
namespace {

// Four lanes with the instructions of every compiler target: SSE2 or NEON, or plain registers.
struct Portable {
    using Float = float __attribute__((vector_size(16)));
    using Int = int32_t __attribute__((vector_size(16)));
    static constexpr int kLanes = 4;
    static constexpr int kPanelVectors = 2;

    static MSP_HD Float load(const float* from) {
        Float v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static MSP_HD void store(float* to, Float v) { std::memcpy(to, &v, sizeof v); }
    static MSP_HD Float broadcast(float v) { return Float{v, v, v, v}; }
    static MSP_HD Int broadcast_int(int v) { return Int{v, v, v, v}; }
    static MSP_HD Float divide(Float a, Float b) { return a / b; }
    static MSP_HD Float minus_product(Float c, Float a, Float b) {
#if defined(FP_FAST_FMAF)
        for (int lane = 0; lane < kLanes; ++lane) c[lane] = std::fma(-a[lane], b[lane], c[lane]);
        return c;
#else
        return c - a * b;
#endif
    }
    static MSP_HD Int magnitude_bits(Float v) { return reinterpret_cast<Int>(v) & 0x7fffffff; }
    static MSP_HD Int greater(Int a, Int b) { return a > b; }  // -1 where true
    static MSP_HD Int increment(Int v, Int where) { return v - where; }
    static MSP_HD Int decrement(Int v, Int where) { return v + where; }
    static MSP_HD Float choose(Int where, Float yes, Float no) { return where ? yes : no; }
    static MSP_HD Int equal_bits(Float v, uint32_t bits) {
        return reinterpret_cast<Int>(v) == static_cast<int32_t>(bits);
    }
    // A byte a lane: 0 where true, else 1.
    static MSP_HD void store_inverted(uint8_t* to, Int where) {
        for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<uint8_t>(where[lane] + 1);
    }
    static MSP_HD void transpose(Float (&rows)[kLanes]) {
        for (int i = 0; i < kLanes; ++i) {
            for (int j = 0; j < i; ++j) {
                const float above = rows[j][i];
                rows[j][i] = rows[i][j];
                rows[i][j] = above;
            }
        }
    }
};

// One block of the packed factor.
void pack_block(const ObsPrune& op, int64_t start, int panel_columns, float* to) {
    const int64_t width = std::min<int64_t>(kObsBlock, op.columns - start);
    std::fill_n(to, kObsBlock * kObsBlock, 0.0f);
    for (int64_t k = 0; k < width; ++k) {
        std::copy_n(op.factor + (start + k) * (op.columns + 1), width - k, to + k * (kObsBlock + 1));
    }
    to += kObsBlock * kObsBlock;
    for (int64_t first = start + width; first < op.columns; first += panel_columns) {
        const int64_t live = std::min<int64_t>(panel_columns, op.columns - first);
        for (int64_t k = 0; k < width; ++k, to += panel_columns) {
            std::copy_n(op.factor + (start + k) * op.columns + first, live, to);
            std::fill(to + live, to + panel_columns, 0.0f);
        }
    }
}

}  // namespace

const ObsPath obs_path_scalar{ObsTile<Portable>::kPanel, ObsTile<Portable>::run};

void obs_prune(const ObsPrune& op, Isa isa, int threads) {
    const ObsPath path = MSP_BEST(isa, obs_path);
    const int panel_columns = path.panel_columns;
    if (op.rows == 0 || op.columns == 0) return;

    std::vector<int64_t> offsets = {0};
    for (int64_t start = 0; start < op.columns; start += kObsBlock) {
        const int64_t behind = std::max<int64_t>(0, op.columns - start - kObsBlock);
        const int64_t panels = (behind + panel_columns - 1) / panel_columns;
        offsets.push_back(offsets.back() + kObsBlock * (kObsBlock + panels * panel_columns));
    }
    // not a std::vector, which would write zeros first; aligned, so that no vector straddles two cache lines
    constexpr std::align_val_t kCacheLine{64};
    const auto free_entries = [=](float* entries) { operator delete[](entries, kCacheLine); };
    const std::unique_ptr<float[], decltype(free_entries)> entries(new (kCacheLine) float[offsets.back()],
                                                                   free_entries);
    const auto blocks = static_cast<int64_t>(offsets.size()) - 1;
    parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            pack_block(op, block * kObsBlock, panel_columns, entries.get() + offsets[block]);
        }
    });

    // Tiles of equal size, as many for every thread, and none of less than a vector.
    const int64_t share = (op.rows + std::max(threads, 1) - 1) / std::max(threads, 1);
    const int64_t tiles = (share + kObsTileRows - 1) / kObsTileRows;
    const int64_t rows = (share + 16 * tiles - 1) / (16 * tiles) * 16;
    const ObsFactor factor{entries.get(), offsets.data()};
    parallel_for(op.rows, rows, threads, [&](int64_t begin, int64_t end) {
        // without helpers, parallel_for gives all rows in one range
        for (int64_t first = begin; first < end; first += rows) {
            path.tile(op, factor, first, std::min(end, first + rows));
        }
    });
}

}  // namespace msp
