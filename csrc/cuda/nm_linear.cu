#include "nm_linear.h"
#include "nm_linear_launch.h"

namespace msp {

bool nm_linear_has(LinearForm form, int group_size, int n, int tokens_at_once) {
    const bool whole_chunks = 32 / group_size * n % 2 == 0 && n > 0 && n < group_size;
    if (form == LinearForm::kGather) {
        return whole_chunks && (tokens_at_once == 1 || tokens_at_once == 2 || tokens_at_once == 4);
    }
    return whole_chunks && (group_size <= 8 || n <= 4) &&
           (tokens_at_once == 8 || tokens_at_once == 16 || tokens_at_once == 32);
}

int64_t nm_linear_shared_bytes(int columns, const LinearCut& cut) {
    const int tiles = most_block_tiles(columns, cut.splits);
    if (cut.form == LinearForm::kGather)
        return kRingBytes + gather_activation_bytes(tiles, cut.tokens_at_once);
    return kRingBytes + kExpandTableBytes + expand_activation_bytes(tiles, cut.tokens_at_once);
}

std::string nm_linear_cuda(const NmLinear& op, void* stream) {
    if (op.tokens == 0 || op.rows == 0) return "";
    const auto order = static_cast<cudaStream_t>(stream);
    const cudaError_t error =
        op.dtype == Dtype::kBFloat16 ? launch_linear_bf16(op, order) : launch_linear_fp16(op, order);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::string nm_linear_group_cuda(const NmLinearGroup& group, void* stream) {
    const auto order = static_cast<cudaStream_t>(stream);
    const bool bf16 = group.linears[0].dtype == Dtype::kBFloat16;
    const cudaError_t error = bf16 ? launch_group_bf16(group, order) : launch_group_fp16(group, order);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace msp
