#include "nm_linear_avx512.h"

namespace msp {
namespace {

// A token of whole chunks is read where it lies.
int64_t batch_bytes(const NmLinear& op) {
    if (op.weight.dtype != Dtype::kBFloat16) return kLinearAvx512.batch_bytes(op);
    return op.weight.columns % 32 == 0 ? 0 : op.weight.chunks() * 32 * 2;
}

void prepare(const NmLinear& op, int64_t token, void* prepared) {
    if (op.weight.dtype != Dtype::kBFloat16) return kLinearAvx512.prepare(op, token, prepared);
    prepare_as<BFloat16Dot, uint16_t>(op, token, prepared);
}

void rows(const NmLinear& op, const void* prepared, int64_t begin, int64_t end) {
    if (op.weight.dtype != Dtype::kBFloat16) return kLinearAvx512.rows(op, prepared, begin, end);
    rows_of<BFloat16Dot>(op, prepared, begin, end);
}

}  // namespace

const LinearPath kLinearAvx512Bf16{1, batch_bytes, prepare, rows, unpack_rows};

}  // namespace msp
