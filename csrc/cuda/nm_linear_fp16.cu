#include "nm_linear_launch.h"

namespace msp {

cudaError_t launch_linear_fp16(const NmLinear& op, cudaStream_t stream) {
    return launch_linear<Dtype::kFloat16>(op, stream);
}

cudaError_t launch_group_fp16(const NmLinearGroup& group, cudaStream_t stream) {
    return launch_group<Dtype::kFloat16>(group, stream);
}

}  // namespace msp
