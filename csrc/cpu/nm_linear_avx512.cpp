#include "nm_linear_avx512.h"

namespace msp {
namespace {

void prepare(const NmLinear& op, int64_t token, void* prepared) {
    switch (op.weight.dtype) {
        case Dtype::kFloat32:
            return prepare_as<Float32, float>(op, token, prepared);
        case Dtype::kFloat16:
            return prepare_as<Float16, uint16_t>(op, token, prepared);
        default:
            return prepare_as<BFloat16, uint16_t>(op, token, prepared);
    }
}

void rows(const NmLinear& op, const void* prepared, int64_t begin, int64_t end) {
    switch (op.weight.dtype) {
        case Dtype::kFloat32:
            return rows_of<Float32>(op, prepared, begin, end);
        case Dtype::kFloat16:
            return rows_of<Float16>(op, prepared, begin, end);
        default:
            return rows_of<BFloat16>(op, prepared, begin, end);
    }
}

}  // namespace

// the same width for every dtype
static_assert(Float32::kTokens == Float16::kTokens && Float32::kTokens == BFloat16::kTokens);
const LinearPath kLinearAvx512{Float32::kTokens, kTokensInCache, 0,          batch_bytes<Float32>,
                               prepare,          rows,           unpack_rows};

}  // namespace msp
