#include "device.h"
#include "obs_prune.h"
#include "obs_prune_block.h"

namespace msp {
namespace {

struct ThisThread {
    template <class Step>
    __device__ __forceinline__ void operator()(const Step& step) const {
        step(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
};

template <int M>
__global__ void __launch_bounds__(kObsThreads) obs_prune_kernel(const __grid_constant__ ObsBlock op) {
    extern __shared__ Quad memory[];
    auto& shared = *reinterpret_cast<ObsShared*>(memory);
    ObsSweep<M>{op, static_cast<int64_t>(blockIdx.x) * kObsRows, shared}.run(ThisThread{});
}

template <int M>
cudaError_t launch(const ObsBlock& op, cudaStream_t stream) {
    const int64_t blocks = (op.rows + kObsRows - 1) / kObsRows;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    // more than 48 KB must be requested
    const cudaError_t error =
        cudaFuncSetAttribute(obs_prune_kernel<M>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(sizeof(ObsShared)));
    if (error != cudaSuccess) return error;
    obs_prune_kernel<M><<<static_cast<unsigned>(blocks), kObsThreads, sizeof(ObsShared), stream>>>(op);
    return cudaGetLastError();
}

cudaError_t launch_group(const ObsBlock& op, cudaStream_t stream) {
    switch (op.group_size) {
        case 4:
            return launch<4>(op, stream);
        case 8:
            return launch<8>(op, stream);
        case 16:
            return launch<16>(op, stream);
        default:
            return launch<32>(op, stream);
    }
}

}  // namespace

std::string obs_prune_block_cuda(const ObsBlock& op, void* stream) {
    if (op.rows == 0 || op.width == 0) return "";
    return on_device_of(op.weight, "weight",
                        [&] { return launch_group(op, static_cast<cudaStream_t>(stream)); });
}

}  // namespace msp
