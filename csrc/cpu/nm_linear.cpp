#include "nm_linear.h"

#include <algorithm>
#include <new>

#include "parallel.h"

namespace msp {
namespace {

// One token leaves most of a tile empty.
[[maybe_unused]] constexpr int64_t kTokensForTiles = 2;

// From this number of tokens on, tokens in the lanes of a vector are faster than columns.
[[maybe_unused]] constexpr int64_t kManyTokens = 41;

const LinearPath& path(Isa isa, int64_t tokens, Dtype dtype) {
#if defined(MSP_X86)
    if (dtype == Dtype::kBFloat16) {
        if (isa >= Isa::kAmx && tokens >= kTokensForTiles) return kLinearAmx;
        // a processor with tiles has bf16 products that are slower than shift and FMA
        if (isa == Isa::kAvx512Bf16) {
            return tokens < kManyTokens ? kLinearAvx512Bf16 : kLinearManyAvx512Bf16;
        }
    }
    if (isa >= Isa::kAvx512) return kLinearAvx512;
    if (isa >= Isa::kAvx2) return kLinearAvx2;
#else
    (void)isa, (void)tokens, (void)dtype;
#endif
    return kLinearScalar;
}

// A thread's memory, aligned to a cache line; it grows and is not freed.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { release(); }

    void* at_least(int64_t bytes) {
        if (bytes > size_) {
            release();
            memory_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t(64));
            size_ = bytes;
        }
        return memory_;
    }

  private:
    void release() {
        if (memory_) ::operator delete(memory_, std::align_val_t(64));
        memory_ = nullptr;
        size_ = 0;
    }

    void* memory_ = nullptr;
    int64_t size_ = 0;
};

// The least bytes of packed weight in a range of rows: some microseconds of reading.
constexpr int64_t kGrainBytes = 1 << 18;

int64_t grain(const Packed& weight) {
    const int64_t row = weight.row_values() * dtype_bytes(weight.dtype) + bitmask_row_bytes(weight.columns);
    // whole tiles of sixteen rows
    return std::max<int64_t>(16, kGrainBytes / std::max<int64_t>(1, row) / 16 * 16);
}

// --- scalar ---

int64_t scalar_batch_bytes(const NmLinear&) { return 0; }
void scalar_prepare(const NmLinear&, int64_t, void*) {}

// Calls visit(column, index of its value) for each kept weight of the row.
template <class Visit>
void for_each_kept(const Packed& weight, int64_t row, const Visit& visit) {
    const int64_t row_bytes = bitmask_row_bytes(weight.columns);
    const uint8_t* bits = weight.bitmask + row * row_bytes;
    int64_t value = row * weight.row_values();
    const int64_t end = value + weight.row_values();
    for (int64_t column = 0; column < weight.columns; ++column) {
        // with too many bits in a bitmask, the loop must not read past the row
        if ((bits[column / 8] >> (column % 8) & 1) != 0 && value < end) visit(column, value++);
    }
}

void scalar_rows(const NmLinear& op, const void*, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t token = 0; token < op.tokens; ++token) {
            // as many sums as a vector path has: a single sum would round more often than torch does
            float sums[8] = {};
            for_each_kept(op.weight, row, [&](int64_t column, int64_t value) {
                sums[value % 8] += load_float(op.weight.values, op.weight.dtype, value) *
                                   load_float(op.x, op.weight.dtype, token * op.weight.columns + column);
            });
            for (int i = 1; i < 8; ++i) sums[0] += sums[i];
            store_output(op, token, row, sums[0]);
        }
    }
}

template <class Bits>
void scalar_unpack_as(const Packed& weight, void* dense, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        Bits* out = static_cast<Bits*>(dense) + row * weight.columns;
        std::fill_n(out, weight.columns, Bits{0});
        for_each_kept(weight, row, [&](int64_t column, int64_t value) {
            out[column] = static_cast<const Bits*>(weight.values)[value];
        });
    }
}

void scalar_unpack(const Packed& weight, void* dense, int64_t begin, int64_t end) {
    if (dtype_bytes(weight.dtype) == 4) {
        scalar_unpack_as<uint32_t>(weight, dense, begin, end);
    } else {
        scalar_unpack_as<uint16_t>(weight, dense, begin, end);
    }
}

}  // namespace

const LinearPath kLinearScalar{1,           kTokensInCache, 0, scalar_batch_bytes, scalar_prepare,
                               scalar_rows, scalar_unpack};

void nm_linear(const NmLinear& op, Isa isa, int threads) {
    const LinearPath& with = path(isa, op.tokens, op.weight.dtype);
    const int64_t bytes = dtype_bytes(op.weight.dtype);
    for (int64_t token = 0; token < op.tokens; token += with.most_tokens) {
        NmLinear part = op;
        part.tokens = std::min(with.most_tokens, op.tokens - token);
        part.x = static_cast<const uint8_t*>(op.x) + token * op.weight.columns * bytes;
        part.y = static_cast<uint8_t*>(op.y) + token * op.weight.rows * bytes;
        const void* prepared = part.x;
        const int64_t batch_bytes = with.batch_bytes(part);
        if (batch_bytes > 0) {
            const int64_t batches = (part.tokens + with.batch - 1) / with.batch;
            static thread_local Scratch scratch;
            auto* memory = static_cast<uint8_t*>(scratch.at_least(batch_bytes * batches));
            parallel_for(batches, std::max<int64_t>(1, kGrainBytes / batch_bytes), threads,
                         [&](int64_t begin, int64_t end) {
                             for (int64_t i = begin; i < end; ++i) {
                                 with.prepare(part, i * with.batch, memory + i * batch_bytes);
                             }
                         });
            prepared = memory;
        }
        parallel_for(op.weight.rows, with.range_rows > 0 ? with.range_rows : grain(op.weight), threads,
                     [&](int64_t begin, int64_t end) { with.rows(part, prepared, begin, end); });
    }
}

void nm_unpack(const Packed& weight, void* dense, Isa isa, int threads) {
    const LinearPath& with = path(isa, 0, weight.dtype);
    parallel_for(weight.rows, grain(weight), threads,
                 [&](int64_t begin, int64_t end) { with.unpack(weight, dense, begin, end); });
}

}  // namespace msp
