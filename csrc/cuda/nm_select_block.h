// The work of a thread block of the CUDA nm_select, phase by phase. __host__ __device__, so that the tests
// run the same index arithmetic on the CPU, thread after thread.
#pragma once

#include "../nm_select.h"

namespace msp {

constexpr int kSelectThreads = 128;

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

// A thread owns one unit (one group, or two of 4). The block's units, and so its groups, their values and
// their mask bytes, are consecutive in memory: kept values are gathered in shared memory and written with
// 16-byte stores.
template <Dtype D, int M, ScoreKind Kind>
struct SelectBlock {
    using Bits = typename Stored<D>::Bits;
    static constexpr int kUnit = unit_columns(M);
    static constexpr int kGroups = kUnit / M;
    static constexpr int kPerLoad = 16 / static_cast<int>(sizeof(Bits));

    // The place of a unit.
    struct Place {
        int64_t row;
        int64_t column;
        int64_t group;  // its first, counted over all rows
        int groups;     // 1 of 2 at the end of a row that is no multiple of 8 long
    };

    static MSP_HD int64_t units(const NmSelect& op) { return op.rows * units_per_row(op.columns, M); }

    static MSP_HD Place place(const NmSelect& op, int64_t unit) {
        const int64_t per_row = units_per_row(op.columns, M);
        // a 64-bit division costs a GPU ten times a 32-bit one
        const int64_t row =
            unit <= INT32_MAX ? static_cast<uint32_t>(unit) / static_cast<uint32_t>(per_row) : unit / per_row;
        const int64_t unit_in_row = unit - row * per_row;
        const int64_t column = unit_in_row * kUnit;
        const bool cut = kGroups == 2 && op.columns - column < kUnit;
        return {row, column, first_group_of_unit(row, unit_in_row, op.columns, M), cut ? 1 : kGroups};
    }

    // The unit's first group, without a division if all rows are whole units. `unit` may be the one past the
    // last.
    static MSP_HD int64_t first_group(const NmSelect& op, int64_t unit) {
        return op.columns % kUnit == 0 ? unit * kGroups : place(op, unit).group;
    }

    // Whether all reads of a unit begin at multiples of 16 bytes.
    static MSP_HD bool loads_vectors(const NmSelect& op) {
        const uintptr_t addresses =
            address(op.weight) | address(op.column_scale) | address(op.column_term) | address(op.matrix);
        return addresses % 16 == 0 && op.columns % kUnit == 0;
    }

    static MSP_HD uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

    static MSP_HD bool stores_vectors(const NmSelect& op) { return address(op.values) % 16 == 0; }

    static MSP_HD int64_t shared_bytes(int n) {
        return static_cast<int64_t>(kSelectThreads) * kGroups * n * static_cast<int64_t>(sizeof(Bits));
    }

    template <bool Vectors>
    static MSP_HD void load(const NmSelect& op, const Place& at, Bits (&weight)[kUnit]) {
        const Bits* from = static_cast<const Bits*>(op.weight) + at.row * op.columns + at.column;
        if constexpr (Vectors) {
            MSP_UNROLL
            for (int i = 0; i < kUnit / kPerLoad; ++i) {
                const Bytes16 chunk = reinterpret_cast<const Bytes16*>(from)[i];
                MSP_UNROLL
                for (int j = 0; j < kPerLoad; ++j) {
                    const uint32_t word = chunk.word[j * static_cast<int>(sizeof(Bits)) / 4];
                    weight[i * kPerLoad + j] =
                        static_cast<Bits>(sizeof(Bits) == 2 && j % 2 ? word >> 16 : word);
                }
            }
        } else {
            MSP_UNROLL
            for (int c = 0; c < kUnit; ++c) weight[c] = c < at.groups * M ? from[c] : Bits{0};
        }
    }

    // Four consecutive fp32 terms from a column that is a multiple of 4; ones if there are none.
    template <bool Vectors>
    static MSP_HD void load_terms(const float* from, int64_t index, float (&terms)[4]) {
        MSP_UNROLL
        for (int i = 0; i < 4; ++i) terms[i] = 1.0f;
        if (from == nullptr) return;
        if constexpr (Vectors) {
            const Bytes16 chunk = *reinterpret_cast<const Bytes16*>(from + index);
            MSP_UNROLL
            for (int i = 0; i < 4; ++i) terms[i] = float_from_bits(chunk.word[i]);
        } else {
            MSP_UNROLL
            for (int i = 0; i < 4; ++i) terms[i] = from[index + i];
        }
    }

    // The key of each weight of one group, whose first column is `column`. `largest` becomes the bits of the
    // largest magnitude met: of the scores, which are not finite if a weight is not, unless they are
    // given.
    template <bool Vectors>
    static MSP_HD void rank_keys(const NmSelect& op, int64_t row, int64_t column, const Bits* weight,
                                 int32_t (&keys)[M], int32_t& largest) {
        const float row_term = Kind == ScoreKind::kRelative ? op.row_term[row] : 0.0f;
        MSP_UNROLL
        for (int c = 0; c < M; c += 4) {
            float scale[4] = {}, column_term[4] = {}, entry[4] = {};
            if constexpr (Kind == ScoreKind::kScaled || Kind == ScoreKind::kRelative) {
                load_terms<Vectors>(op.column_scale, column + c, scale);
            }
            if constexpr (Kind == ScoreKind::kRelative) {
                load_terms<Vectors>(op.column_term, column + c, column_term);
            }
            if constexpr (Kind == ScoreKind::kFisher || Kind == ScoreKind::kGiven) {
                load_terms<Vectors>(op.matrix, row * op.columns + column + c, entry);
            }
            MSP_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float w = Stored<D>::to_float(weight[c + i]);
                const uint32_t bits =
                    float_bits(score<Kind>(w, scale[i], row_term, column_term[i], entry[i]));
                keys[c + i] = ordered_key(bits);
                largest = greater(largest, bits);
                if constexpr (Kind == ScoreKind::kGiven) largest = greater(largest, float_bits(w));
            }
        }
    }

    static MSP_HD int32_t greater(int32_t magnitude, uint32_t float_bits) {
        const auto other = static_cast<int32_t>(float_bits & 0x7fffffffu);
        return magnitude > other ? magnitude : other;
    }

    // First phase: thread `thread` selects its unit, writes its mask bytes and puts its kept values into
    // `shared`, which has the groups of the block in order. Sets `*wrong` if it meets NaN or infinity.
    static MSP_HD void select(const NmSelect& op, int64_t block, int thread, Bits* shared, int32_t* wrong) {
        const int64_t first_unit = block * kSelectThreads;
        const int64_t unit = first_unit + thread;
        if (unit >= units(op)) return;
        const Place at = place(op, unit);
        Bits weight[kUnit];
        const bool vectors = loads_vectors(op);
        if (vectors) {
            load<true>(op, at, weight);
        } else {
            load<false>(op, at, weight);
        }

        Bits* slot = shared + (first_group(op, unit) - first_group(op, first_unit)) * op.n;
        uint32_t mask = 0;
        int32_t largest = 0;
        MSP_UNROLL
        for (int group = 0; group < kGroups; ++group) {
            if (group < at.groups) {
                int32_t keys[M];
                const int64_t column = at.column + group * M;
                if (vectors) {
                    rank_keys<true>(op, at.row, column, weight + group * M, keys, largest);
                } else {
                    rank_keys<false>(op, at.row, column, weight + group * M, keys, largest);
                }
                if (op.compliant) rule_out_beyond_two_of_four<M>(keys);
                const uint32_t kept = select_group<M>(keys, op.n);
                mask |= kept << (group * M);
                MSP_UNROLL
                for (int c = 0; c < M; ++c) {
                    if (kept >> c & 1) *slot++ = weight[group * M + c];
                }
            }
        }
        if (largest >= 0x7f800000) *wrong = 1;
        if constexpr (kUnit == 8) op.bitmask[unit] = static_cast<uint8_t>(mask);
        if constexpr (kUnit == 16)
            reinterpret_cast<uint16_t*>(op.bitmask)[unit] = static_cast<uint16_t>(mask);
        if constexpr (kUnit == 32) reinterpret_cast<uint32_t*>(op.bitmask)[unit] = mask;
    }

    // Second phase, after all threads have finished the first: the block's values are written, `shared` in
    // order.
    static MSP_HD void write(const NmSelect& op, int64_t block, int thread, const Bits* shared) {
        const int64_t first_unit = block * kSelectThreads;
        const int64_t end_unit =
            first_unit + kSelectThreads < units(op) ? first_unit + kSelectThreads : units(op);
        const int64_t first = first_group(op, first_unit);
        const int count = static_cast<int>(first_group(op, end_unit) - first) * op.n;
        Bits* to = static_cast<Bits*>(op.values) + first * op.n;
        // 16-byte stores if the block's first value is aligned, which is so for all but odd row lengths
        int done = 0;
        if (stores_vectors(op) && first * op.n % kPerLoad == 0) {
            const int whole = count / kPerLoad;
            for (int i = thread; i < whole; i += kSelectThreads) {
                reinterpret_cast<Bytes16*>(to)[i] = reinterpret_cast<const Bytes16*>(shared)[i];
            }
            done = whole * kPerLoad;
        }
        for (int i = done + thread; i < count; i += kSelectThreads) to[i] = shared[i];
    }
};

}  // namespace msp
