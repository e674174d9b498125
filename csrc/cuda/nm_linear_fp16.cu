#include "nm_linear_launch.h"

namespace msp {

cudaError_t launch_linear_fp16(const NmLinear& op, cudaStream_t stream) {
    return launch_linear<Dtype::kFloat16>(op, stream);
}

}  // namespace msp
