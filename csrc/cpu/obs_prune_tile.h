// The whole column sweep of one tile of rows, for any vector V; included by one file per instruction set.
//
// In a block of columns the vector's lanes are rows, so that selection and sweep take the same few
// instructions for every row. In the update of the later columns, lanes are columns: the weight keeps torch's
// layout.
#pragma once

#include <cstring>

#include "../nm_format.h"
#include "obs_prune.h"

namespace msp {
namespace {

template <class V>
class ObsTile {
  public:
    static constexpr int kPanel = V::kPanelVectors * V::kLanes;  // columns that an update's registers cover

    static void run(const ObsPrune& op, const ObsFactor& packed, int64_t begin, int64_t end) {
        // here and not all at once: the tile is then in the cache, and threads share the page faults
        std::memcpy(op.updated + begin * op.columns, op.weight + begin * op.columns,
                    static_cast<size_t>((end - begin) * op.columns) * sizeof(float));
        ObsTile tile(op, begin, end);
        for (int64_t start = 0; start < op.columns; start += kBlock) {
            const int width = at_most(kBlock, op.columns - start);
            const float* factor = packed.entries + packed.offsets[start / kBlock];
            tile.prune_block(start, width, factor);
            tile.update(start, width, factor + kBlock * kBlock);
        }
    }

  private:
    using Float = typename V::Float;
    using Int = typename V::Int;

    static constexpr int kBlock = kObsBlock;
    static constexpr int kLanes = V::kLanes;
    static constexpr int kPanelRows = 6;   // that the registers of an update cover
    static constexpr int kCacheLine = 16;  // floats
    // The mark of a pruned weight in a swept block until it is written out as zero. No arithmetic on x86 or
    // Arm makes this NaN from finite inputs.
    static constexpr uint32_t kPruned = 0xffffffffu;

    ObsTile(const ObsPrune& op, int64_t begin, int64_t end)
        : op_(op), begin_(begin), rows_(static_cast<int>(end - begin)) {
        std::memset(errors_, 0, sizeof errors_);
    }

    // Not std::min: its symbol from one instruction set could serve another.
    static MSP_HD int at_most(int limit, int64_t value) {
        return value < limit ? static_cast<int>(value) : limit;
    }

    float* weight(int64_t row, int64_t column) { return op_.updated + (begin_ + row) * op_.columns + column; }

    void prune_block(int64_t start, int width, const float* corner) {
        for (int first = 0; first < rows_; first += kLanes) {
            load_rows(first, start, width);
            switch (op_.group_size) {
                case 4:
                    sweep<4>(errors_ + first, width, corner);
                    break;
                case 8:
                    sweep<8>(errors_ + first, width, corner);
                    break;
                case 16:
                    sweep<16>(errors_ + first, width, corner);
                    break;
                default:
                    sweep<32>(errors_ + first, width, corner);
            }
            store_rows(first, start, width);
        }
    }

    // Fills swept_, a column's rows together; rows past the tile's end are zero.
    void load_rows(int first, int64_t start, int width) {
        const int live = at_most(kLanes, rows_ - first);
        int i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            Float square[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                square[lane] = lane < live ? V::load(weight(first + lane, start + i)) : V::broadcast(0.0f);
            }
            V::transpose(square);
            for (int column = 0; column < kLanes; ++column) {
                V::store(swept_ + (i + column) * kLanes, square[column]);
            }
        }
        for (; i < width; ++i) {
            for (int lane = 0; lane < kLanes; ++lane) {
                swept_[i * kLanes + lane] = lane < live ? *weight(first + lane, start + i) : 0.0f;
            }
        }
    }

    void store_rows(int first, int64_t start, int width) {
        const int live = at_most(kLanes, rows_ - first);
        uint8_t* kept = op_.kept + (begin_ + first) * op_.columns + start;
        int i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            Float square[kLanes];
            for (int column = 0; column < kLanes; ++column) {
                square[column] = V::load(swept_ + (i + column) * kLanes);
            }
            V::transpose(square);
            for (int lane = 0; lane < live; ++lane) {
                const auto pruned = V::equal_bits(square[lane], kPruned);
                V::store(weight(first + lane, start + i),
                         V::choose(pruned, V::broadcast(0.0f), square[lane]));
                V::store_inverted(kept + lane * op_.columns + i, pruned);
            }
        }
        for (; i < width; ++i) {
            for (int lane = 0; lane < live; ++lane) {
                uint32_t bits;
                std::memcpy(&bits, swept_ + i * kLanes + lane, sizeof bits);
                kept[lane * op_.columns + i] = bits != kPruned;
                *weight(first + lane, start + i) = bits != kPruned ? swept_[i * kLanes + lane] : 0.0f;
            }
        }
    }

    // Sweeps the block of kLanes rows in swept_; its errors go to `errors`, kObsTileRows apart.
    template <int M>
    void sweep(float* errors, int width, const float* corner) {
        for (int first = 0; first < width; first += M) {
            const float* factor = corner + first * (kBlock + 1);
            float* group = swept_ + first * kLanes;
            Int ranks[M];
            rank<M>(group, factor, ranks);
            sweep_group<M>(group, factor, ranks, errors + first * kObsTileRows);
            // the errors of as many columns at a time as the registers hold
            constexpr int kAtOnce = M < 8 ? M : 8;
            for (int i = 0; i < M; i += kAtOnce) {
                Float error[kAtOnce];
                for (int k = 0; k < kAtOnce; ++k) {
                    error[k] = V::load(errors + (first + i + k) * kObsTileRows);
                }
                for (int j = first + M; j < width; ++j) {
                    Float w = V::load(swept_ + j * kLanes);
                    const float* entry = corner + (first + i) * kBlock + j;
                    for (int k = 0; k < kAtOnce; ++k) {
                        w = V::minus_product(w, error[k], V::broadcast(entry[k * kBlock]));
                    }
                    V::store(swept_ + j * kLanes, w);
                }
            }
        }
    }

    // The number of columns in its group of M that beat each column; of equal columns, the lower one wins.
    // Scores are compared as integers, which order as non-negative floats do and put NaN on top: NaN must be
    // kept, so that it is found.
    template <int M>
    static MSP_HD void rank(const float* group, const float* factor, Int (&ranks)[M]) {
        Int scores[M];
        for (int i = 0; i < M; ++i) {
            const Float diagonal = V::broadcast(factor[i * (kBlock + 1)]);
            scores[i] = V::magnitude_bits(V::divide(V::load(group + i * kLanes), diagonal));
            ranks[i] = V::broadcast_int(i);
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = i + 1; j < M; ++j) {
                const auto later_wins = V::greater(scores[j], scores[i]);
                ranks[i] = V::increment(ranks[i], later_wins);
                ranks[j] = V::decrement(ranks[j], later_wins);
            }
        }
    }

    template <int M>
    MSP_HD void sweep_group(float* group, const float* factor, const Int (&ranks)[M], float* errors) const {
        const Int n = V::broadcast_int(op_.n);
        float marker;
        std::memcpy(&marker, &kPruned, sizeof marker);
        Float w[M];
        for (int i = 0; i < M; ++i) w[i] = V::load(group + i * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const float* row = factor + i * kBlock;
            const auto kept = V::greater(n, ranks[i]);
            const Float error = V::choose(kept, V::broadcast(0.0f), V::divide(w[i], V::broadcast(row[i])));
            V::store(errors + i * kObsTileRows, error);
            V::store(group + i * kLanes, V::choose(kept, w[i], V::broadcast(marker)));
#pragma GCC unroll 8
            for (int j = i + 1; j < M; ++j) w[j] = V::minus_product(w[j], error, V::broadcast(row[j]));
        }
    }

    // weight[:, later] -= errors @ factor[block, later], one panel of columns after another.
    void update(int64_t start, int width, const float* panels) {
        for (int64_t first = start + width; first < op_.columns; first += kPanel) {
            for (int row = 0; row < rows_; row += kPanelRows) update_rows(row, first, panels, width);
            panels += width * kPanel;
        }
    }

    void update_rows(int row, int64_t first, const float* panel, int width) {
        const int live = at_most(kPanel, op_.columns - first);
        const int live_rows = at_most(kPanelRows, rows_ - row);
        const bool whole = live == kPanel && live_rows == kPanelRows;
        float partial[kPanelRows * kPanel];
        float* at = weight(row, first);
        int64_t stride = op_.columns;
        const size_t bytes = static_cast<size_t>(live) * sizeof(float);
        if (!whole) {
            at = partial;
            stride = kPanel;
            std::memset(partial, 0, sizeof partial);
            for (int r = 0; r < live_rows; ++r) std::memcpy(at + r * kPanel, weight(row + r, first), bytes);
        }

        constexpr int kVectors = V::kPanelVectors;
        Float sum[kPanelRows][kVectors];
#pragma GCC unroll 6
        for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[r][v] = V::load(at + r * stride + v * kLanes);
        }
        const int share = (width * kPanel / rows_ + kCacheLine - 1) / kCacheLine * kCacheLine;
        const float* error = errors_ + row;
        int k = 0;
        for (int r = 0; r < kPanelRows; ++r) {
            // the next rows' weights, a few at a time so that the products need not wait
            const int ahead = row + kPanelRows + r;
            if (ahead < rows_ && live == kPanel) prefetch<1>(weight(ahead, first), kPanel);
            if (row + r < rows_) prefetch<0>(panel + width * kPanel + (row + r) * share, share);
            for (const int end = width * (r + 1) / kPanelRows; k < end; ++k) {
                Float factor[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) factor[v] = V::load(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 6
                for (int i = 0; i < kPanelRows; ++i) {
                    const Float e = V::broadcast(error[k * kObsTileRows + i]);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) sum[i][v] = V::minus_product(sum[i][v], e, factor[v]);
                }
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) V::store(at + r * stride + v * kLanes, sum[r][v]);
        }
        if (!whole) {
            for (int r = 0; r < live_rows; ++r) std::memcpy(weight(row + r, first), at + r * kPanel, bytes);
        }
    }

    template <int Write>
    static MSP_HD void prefetch(const float* from, int count) {
        for (int c = 0; c < count; c += kCacheLine) __builtin_prefetch(from + c, Write, 2);
    }

    const ObsPrune op_;
    const int64_t begin_;
    const int rows_;
    alignas(64) float errors_[kBlock * kObsTileRows];  // of the block, a column's rows together
    alignas(64) float swept_[kBlock * kLanes];
};

}  // namespace
}  // namespace msp
