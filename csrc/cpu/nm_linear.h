// nm_linear on the CPU, and the unpacking that serves many tokens.
#pragma once

#include "../nm_score.h"
#include "isa.h"

namespace msp {

// A packed weight [rows, columns] as nm_format.h lays it out.
struct Packed {
    const void* values;
    const uint8_t* bitmask;
    Dtype dtype;
    int64_t rows;
    int64_t columns;
    int group_size;
    int n;

    int64_t row_values() const { return values_per_row(columns, group_size, n); }
    // The columns are taken 32 at a time: four bytes of bitmask, and always the same number of values.
    int64_t chunk_values() const { return 32 / group_size * n; }
    int64_t chunks() const { return (columns + 31) / 32; }
};

// y [tokens, rows] = x [tokens, columns] W^T + bias; x, bias (or null) and y in the dtype of the values.
// Products are summed in fp32, in an order that depends neither on the threads nor on neighbouring rows.
struct NmLinear {
    Packed weight;
    const void* x;
    const void* bias;
    void* y;
    int64_t tokens;
};

void nm_linear(const NmLinear& op, Isa isa, int threads);

// dense [rows, columns], in the dtype of the values, zero for weights that are not kept.
void nm_unpack(const Packed& weight, void* dense, Isa isa, int threads);

// Tokens that most paths take through the whole weight together: this many stay in the second cache. The
// weight, a fraction of its dense size, is read again for the next ones.
constexpr int64_t kTokensInCache = 64;

// The functions of an instruction set: the layout of the tokens, and the work on a range of rows.
struct LinearPath {
    // The number of tokens that are prepared together, and the most that `rows` takes.
    int64_t batch;
    int64_t most_tokens;
    // The rows of a range; 0: as many as make one token worth a thread's while.
    int64_t range_rows;
    // Bytes of one prepared batch; 0 if `rows` reads the tokens of `op` as they are.
    int64_t (*batch_bytes)(const NmLinear& op);
    void (*prepare)(const NmLinear& op, int64_t first_token, void* prepared);
    void (*rows)(const NmLinear& op, const void* prepared, int64_t begin, int64_t end);
    void (*unpack)(const Packed& weight, void* dense, int64_t begin, int64_t end);
};

extern const LinearPath kLinearScalar;
extern const LinearPath kLinearAvx2;
extern const LinearPath kLinearAvx512;
extern const LinearPath kLinearAvx512Bf16;
extern const LinearPath kLinearManyAvx512Bf16;
extern const LinearPath kLinearAmx;

MSP_HD uint16_t round_to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    if (!is_finite(bits)) return static_cast<uint16_t>(bits >> 16 | ((bits & 0x7fffffu) != 0 ? 0x40u : 0u));
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Rounds to nearest even by adding a power of two whose last place is the last place of the half.
MSP_HD uint16_t round_to_half(float value) {
    const uint32_t bits = float_bits(value);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {                        // subnormal halves are multiples of 2^-24
        return sign | static_cast<uint16_t>(float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u);
    }
    return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

// One output: the sum over the columns, the bias added in fp32, rounded once.
MSP_HD void store_output(const NmLinear& op, int64_t token, int64_t row, float sum) {
    const int64_t index = token * op.weight.rows + row;
    switch (op.weight.dtype) {
        case Dtype::kFloat32:
            if (op.bias) sum += static_cast<const float*>(op.bias)[row];
            static_cast<float*>(op.y)[index] = sum;
            break;
        case Dtype::kFloat16:
            if (op.bias) sum += half_to_float(static_cast<const uint16_t*>(op.bias)[row]);
            static_cast<uint16_t*>(op.y)[index] = round_to_half(sum);
            break;
        default:
            if (op.bias) {
                sum +=
                    float_from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(op.bias)[row]) << 16);
            }
            static_cast<uint16_t*>(op.y)[index] = round_to_bfloat16(sum);
    }
}

MSP_HD float load_float(const void* data, Dtype dtype, int64_t index) {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return dtype == Dtype::kFloat16 ? half_to_float(bits)
                                    : float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// The bitmask of the 32 columns from 32 * chunk on; bits past the row are 0, and nothing past it is read.
MSP_HD uint32_t chunk_mask(const uint8_t* row, int64_t row_bytes, int64_t chunk) {
    uint32_t mask = 0;
    const int64_t left = row_bytes - 4 * chunk;
    if (left >= 4) {
        std::memcpy(&mask, row + 4 * chunk, 4);
    } else {
        std::memcpy(&mask, row + 4 * chunk, static_cast<size_t>(left));
    }
    return mask;
}

}  // namespace msp
