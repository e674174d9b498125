#include "nm_linear_launch.h"

namespace msp {

cudaError_t launch_linear_bf16(const NmLinear& op, cudaStream_t stream) {
    return launch_linear<Dtype::kBFloat16>(op, stream);
}

cudaError_t launch_group_bf16(const NmLinearGroup& group, cudaStream_t stream) {
    return launch_group<Dtype::kBFloat16>(group, stream);
}

}  // namespace msp
