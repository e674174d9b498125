// The packed N:M format: the layout in memory of a weight [R, K] that keeps N of every M columns, and the
// selection of the kept weights of a group. All backends share this definition: CUDA kernels, the scalar CPU
// path and the tests compile these functions.
//
//   values   [R, K/M*N]      kept weights of each row in column order, in the weight's dtype
//   bitmask  [R, ceil(K/8)]  bit c%8 of byte c/8 is set if column c is kept; bits past K are 0
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MSP_HD __host__ __device__ __forceinline__
#else
// Files compiled for different instruction sets share these functions, so none may become a symbol that the
// linker could take from a file of another set.
#define MSP_HD inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define MSP_UNROLL _Pragma("unroll")
#define MSP_ROLLED _Pragma("unroll 1")
#else
#define MSP_UNROLL
#define MSP_ROLLED
#endif

namespace msp {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

MSP_HD constexpr int dtype_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A unit is the smallest number of columns whose kept bits fill whole bytes: one group, or two groups of 4.
MSP_HD constexpr int unit_columns(int group_size) { return group_size < 8 ? 8 : group_size; }

MSP_HD constexpr int64_t bitmask_row_bytes(int64_t columns) { return (columns + 7) / 8; }

MSP_HD constexpr int64_t values_per_row(int64_t columns, int group_size, int n) {
    return columns / group_size * n;
}

MSP_HD constexpr int64_t units_per_row(int64_t columns, int group_size) {
    return (columns + unit_columns(group_size) - 1) / unit_columns(group_size);
}

// The groups of the last unit in a row whose length is no multiple of 8: 1 group of 2, else all.
MSP_HD constexpr int64_t first_group_of_unit(int64_t row, int64_t unit_in_row, int64_t columns,
                                             int group_size) {
    return row * (columns / group_size) + unit_in_row * (unit_columns(group_size) / group_size);
}

// Ranks below every finite score: for weights that `compliant` excludes, and lanes past the end of a row. Not
// the least integer, so that comparisons can use the integer below it.
constexpr int32_t kRuledOut = INT32_MIN + 1;

// An integer that orders as the finite float with these bits does; -0 and +0 are one value.
MSP_HD constexpr int32_t ordered_key(uint32_t float_bits) {
    const uint32_t bits = float_bits == 0x80000000u ? 0u : float_bits;
    return static_cast<int32_t>(bits ^ (bits >> 31 ? 0x7fffffffu : 0u));
}

MSP_HD constexpr bool is_finite(uint32_t float_bits) { return (float_bits & 0x7f800000u) != 0x7f800000u; }

// Batcher's odd-even merge sort, descending (Knuth, TAOCP 3, 5.2.2 M). No branch or address depends on the
// data, so a GPU thread keeps its group in registers.
template <int M, int P, int D>
MSP_HD constexpr void merge_pass(int32_t (&keys)[M]) {
    MSP_UNROLL
    for (int j = D % P; j + D < M; j += 2 * D) {
        MSP_UNROLL
        for (int i = 0; i < D; ++i) {
            if (i + j + D < M && (i + j) / (2 * P) == (i + j + D) / (2 * P)) {
                const int32_t a = keys[i + j], b = keys[i + j + D];
                keys[i + j] = a > b ? a : b;
                keys[i + j + D] = a > b ? b : a;
            }
        }
    }
    if constexpr (D > 1) merge_pass<M, P, D / 2>(keys);
}

template <int M, int P = 1>
MSP_HD constexpr void sort_descending(int32_t (&keys)[M]) {
    merge_pass<M, P, P>(keys);
    if constexpr (2 * P < M) sort_descending<M, 2 * P>(keys);
}

MSP_HD constexpr int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

// `kept` without the last `excess` of the columns whose key equals the threshold.
template <int M>
MSP_HD constexpr uint32_t without_last_ties(const int32_t (&keys)[M], int32_t threshold, uint32_t kept,
                                            int excess) {
    MSP_UNROLL
    for (int c = M - 1; c >= 0; --c) {
        const bool drop = keys[c] == threshold && excess > 0;
        excess -= drop ? 1 : 0;
        kept &= drop ? ~(1u << c) : ~0u;
    }
    return kept;
}

// Bit c is set for each of the n largest keys, ties to the lower column; exactly n bits.
template <int M>
MSP_HD constexpr uint32_t select_group(const int32_t (&keys)[M], int n) {
    int32_t sorted[M] = {};
    MSP_UNROLL
    for (int c = 0; c < M; ++c) sorted[c] = keys[c];
    sort_descending<M>(sorted);

    // sorted[n - 1] without an indexed access, which would put the array into local memory
    int32_t threshold = sorted[0];
    MSP_UNROLL
    for (int c = 1; c < M; ++c) threshold = c < n ? sorted[c] : threshold;

    uint32_t kept = 0;
    MSP_UNROLL
    for (int c = 0; c < M; ++c) kept |= keys[c] >= threshold ? 1u << c : 0u;
    const int excess = count_bits(kept) - n;
    if (excess > 0) kept = without_last_ties<M>(keys, threshold, kept, excess);
    return n > 0 ? kept : 0u;
}

// Excludes all but the best two of each aligned four. A walk in rank order that skips the third and fourth of
// each quad keeps exactly the best of the weights that rank below 2 in their quad. So the compliant selection
// is the plain one on the remaining weights.
template <int M>
MSP_HD constexpr void rule_out_beyond_two_of_four(int32_t (&keys)[M]) {
    MSP_UNROLL
    for (int quad = 0; quad < M; quad += 4) {
        const int32_t four[4] = {keys[quad], keys[quad + 1], keys[quad + 2], keys[quad + 3]};
        const uint32_t kept = select_group<4>(four, 2);
        MSP_UNROLL
        for (int c = 0; c < 4; ++c) keys[quad + c] = kept >> c & 1 ? four[c] : kRuledOut;
    }
}

}  // namespace msp
