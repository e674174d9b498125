// The work of a thread block of the CUDA obs_prune. __host__ __device__, so that the tests run the same steps
// on the CPU, thread after thread.
#pragma once

#include <cmath>

#include "../nm_format.h"
#include "../nm_score.h"
#include "obs_prune.h"

namespace msp {

constexpr int kObsThreads = 256;
// The rows of a thread block: one for each lane of a warp.
constexpr int kObsRows = 32;

struct alignas(16) Quad {
    float at[4];
};

MSP_HD float minus_product(float c, float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(-a, b, c);
#else
    return std::fma(-a, b, c);
#endif
}

// The factor's corner holds for each row the quads from the diagonal's on, row after row: half the memory of
// the square, so a multiprocessor holds twice as many thread blocks.
constexpr int kObsCornerQuads = 4 * (kObsBlockColumns / 4) * (kObsBlockColumns / 4 + 1) / 2;

// The place of row i's quad of columns 4 q ... 4 q + 3; q is at least i / 4.
MSP_HD constexpr int corner_quad(int i, int q) {
    const int above = i / 4;
    const int per_row = kObsBlockColumns / 4;
    return 4 * (above * per_row - above * (above - 1) / 2) + i % 4 * (per_row - above) + q - above;
}

// In the columns' order, each with its rows side by side, so that a warp reads a column without conflicts.
// Two floats of padding put 8 rows x 4 quads, which come from memory together, into 32 different banks.
constexpr int kObsColumnStride = kObsRows + 2;

struct ObsShared {
    Quad corner[kObsCornerQuads];
    float tile[kObsBlockColumns * kObsColumnStride];
    float reciprocal[kObsBlockColumns];               // of the diagonal
    float errors[32 * kObsRows];                      // of one group
    uint32_t kept[kObsBlockColumns / 32 * kObsRows];  // a bit for each column
};

// One thread block sweeps kObsRows rows. For each group of M columns, one warp selects and sweeps inside the
// group, a row a lane, all in registers. Then all warps apply the group's errors to the later columns, which
// they share out by quads.
template <int M>
struct ObsSweep {
    const ObsBlock& op;
    int64_t first_row;
    ObsShared& shared;

    // `threads(f)` calls f(thread) for every thread of the block and is a barrier.
    template <class Threads>
    MSP_HD void run(const Threads& threads) const {
        const ObsSweep sweep = *this;
        threads([=](int thread) { sweep.load(thread); });
        for (int first = 0; first < op.width; first += M) {
            threads([=](int thread) { sweep.prune_group(thread, first); });
            if (first + M < op.width) {
                threads([=](int thread) { sweep.update_columns_behind(thread, first); });
            }
        }
        threads([=](int thread) { sweep.store(thread); });
    }

  private:
    static constexpr int kWarps = kObsThreads / 32;

    // A warp's accesses to memory: 8 rows of 4 quads, full sectors of 32 bytes.
    struct Place {
        int row;
        int quad;  // the first of 4, each 4 on from the one before
        MSP_HD explicit Place(int thread)
            : row(thread / 32 % 4 * 8 + thread % 32 / 4), quad(thread / 128 * 16 + thread % 4) {}
    };
    static_assert(kObsThreads == 256 && kObsRows == 32 && kObsBlockColumns == 128, "what Place spreads");

    MSP_HD Quad* weight(int row, int quad) const {
        return reinterpret_cast<Quad*>(op.weight + (first_row + row) * op.columns + op.start) + quad;
    }
    MSP_HD bool has(int row) const { return first_row + row < op.rows; }
    MSP_HD float& at(int row, int column) const { return shared.tile[column * kObsColumnStride + row]; }

    MSP_HD void load(int thread) const {
        const float* corner = op.factor + op.start * (op.columns + 1);
        const int column = thread % 32;
        MSP_UNROLL
        for (int pass = 0; pass < kObsBlockColumns / kWarps; ++pass) {
            const int i = pass * kWarps + thread / 32;
            if (i < op.width && column >= i / 4 && column < op.width / 4) {
                shared.corner[corner_quad(i, column)] =
                    reinterpret_cast<const Quad*>(corner + i * op.columns)[column];
            }
        }
        if (thread < op.width) shared.reciprocal[thread] = 1.0f / corner[thread * (op.columns + 1)];
        if (thread < kObsBlockColumns / 32 * kObsRows) shared.kept[thread] = 0;

        const Place place(thread);
        MSP_UNROLL
        for (int quad = place.quad; quad < place.quad + 16; quad += 4) {
            if (quad >= op.width / 4) continue;
            const Quad w = has(place.row) ? *weight(place.row, quad) : Quad{};
            MSP_UNROLL
            for (int i = 0; i < 4; ++i) at(place.row, 4 * quad + i) = w.at[i];
        }
    }

    MSP_HD void prune_group(int thread, int first) const {
        if (thread >= kObsRows) return;
        const int row = thread;
        float w[M], reciprocal[M];
        int32_t scores[M];
        MSP_UNROLL
        for (int i = 0; i < M; ++i) {
            w[i] = at(row, first + i);
            reciprocal[i] = shared.reciprocal[first + i];
            // |w| / U_ii ranks as w^2 / U_ii^2 does, and does not underflow. Its bits order as it does, with
            // NaN on top: NaN must be kept, so that it is found.
            scores[i] = static_cast<int32_t>(float_bits(w[i] * reciprocal[i]) & 0x7fffffffu);
        }
        const uint32_t kept = select_group<M>(scores, op.n);
        shared.kept[first / 32 * kObsRows + row] |= kept << first % 32;

        float* errors = op.errors + first * op.rows + first_row + row;
        MSP_UNROLL
        for (int i = 0; i < M; ++i) {
            const bool keep = kept >> i & 1;
            const float error = keep ? 0.0f : w[i] * reciprocal[i];
            at(row, first + i) = keep ? w[i] : 0.0f;
            shared.errors[i * kObsRows + row] = error;
            if (has(row)) errors[i * op.rows] = error;
            MSP_UNROLL
            for (int q = i / 4; q < M / 4; ++q) {
                const Quad u = shared.corner[corner_quad(first + i, first / 4 + q)];
                MSP_UNROLL
                for (int k = 0; k < 4; ++k) {
                    if (4 * q + k > i) w[4 * q + k] = minus_product(w[4 * q + k], error, u.at[k]);
                }
            }
        }
    }

    MSP_HD void update_columns_behind(int thread, int first) const {
        const int row = thread % 32;
        float error[M];
        MSP_UNROLL
        for (int i = 0; i < M; ++i) error[i] = shared.errors[i * kObsRows + row];
        for (int quad = (first + M) / 4 + thread / 32; quad < op.width / 4; quad += kWarps) {
            float w[4];
            MSP_UNROLL
            for (int k = 0; k < 4; ++k) w[k] = at(row, 4 * quad + k);
            MSP_UNROLL
            for (int i = 0; i < M; ++i) {
                const Quad u = shared.corner[corner_quad(first + i, quad)];
                MSP_UNROLL
                for (int k = 0; k < 4; ++k) w[k] = minus_product(w[k], error[i], u.at[k]);
            }
            MSP_UNROLL
            for (int k = 0; k < 4; ++k) at(row, 4 * quad + k) = w[k];
        }
    }

    MSP_HD void store(int thread) const {
        const Place place(thread);
        if (has(place.row)) {
            MSP_UNROLL
            for (int quad = place.quad; quad < place.quad + 16; quad += 4) {
                if (quad >= op.width / 4) continue;
                Quad w;
                MSP_UNROLL
                for (int i = 0; i < 4; ++i) w.at[i] = at(place.row, 4 * quad + i);
                *weight(place.row, quad) = w;
            }
        }
        const int quad = thread % 32;
        MSP_UNROLL
        for (int row = thread / 32; row < kObsRows; row += kWarps) {
            if (!has(row) || quad >= op.width / 4) continue;
            const uint32_t four = shared.kept[quad / 8 * kObsRows + row] >> quad % 8 * 4 & 15u;
            auto* to =
                reinterpret_cast<uint32_t*>(op.kept + (first_row + row) * op.columns + op.start) + quad;
            *to = four * 0x00204081u & 0x01010101u;  // a byte each
        }
    }
};

}  // namespace msp
