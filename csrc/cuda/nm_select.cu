#include "device.h"
#include "nm_select.h"
#include "nm_select_block.h"

namespace msp {
namespace {

template <Dtype D, int M, ScoreKind Kind>
__global__ void __launch_bounds__(kSelectThreads)
    nm_select_kernel(const __grid_constant__ NmSelect op, int32_t* wrong) {
    using Block = SelectBlock<D, M, Kind>;
    extern __shared__ Bytes16 shared[];
    auto* values = reinterpret_cast<typename Block::Bits*>(shared);
    Block::select(op, blockIdx.x, threadIdx.x, values, wrong);
    __syncthreads();
    Block::write(op, blockIdx.x, threadIdx.x, values);
}

template <Dtype D, int M, ScoreKind Kind>
cudaError_t launch(const NmSelect& op, int32_t* wrong, cudaStream_t stream) {
    using Block = SelectBlock<D, M, Kind>;
    const int64_t blocks = (Block::units(op) + kSelectThreads - 1) / kSelectThreads;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    nm_select_kernel<D, M, Kind>
        <<<static_cast<unsigned>(blocks), kSelectThreads, Block::shared_bytes(op.n), stream>>>(op, wrong);
    return cudaGetLastError();
}

template <Dtype D, int M>
cudaError_t launch_kind(const NmSelect& op, int32_t* wrong, cudaStream_t stream) {
    switch (op.kind) {
        case ScoreKind::kMagnitude:
            return launch<D, M, ScoreKind::kMagnitude>(op, wrong, stream);
        case ScoreKind::kScaled:
            return launch<D, M, ScoreKind::kScaled>(op, wrong, stream);
        case ScoreKind::kRelative:
            return launch<D, M, ScoreKind::kRelative>(op, wrong, stream);
        case ScoreKind::kFisher:
            return launch<D, M, ScoreKind::kFisher>(op, wrong, stream);
        default:
            return launch<D, M, ScoreKind::kGiven>(op, wrong, stream);
    }
}

template <Dtype D>
cudaError_t launch_group(const NmSelect& op, int32_t* wrong, cudaStream_t stream) {
    switch (op.group_size) {
        case 4:
            return launch_kind<D, 4>(op, wrong, stream);
        case 8:
            return launch_kind<D, 8>(op, wrong, stream);
        case 16:
            return launch_kind<D, 16>(op, wrong, stream);
        default:
            return launch_kind<D, 32>(op, wrong, stream);
    }
}

cudaError_t launch_dtype(const NmSelect& op, int32_t* wrong, cudaStream_t stream) {
    switch (op.dtype) {
        case Dtype::kFloat32:
            return launch_group<Dtype::kFloat32>(op, wrong, stream);
        case Dtype::kFloat16:
            return launch_group<Dtype::kFloat16>(op, wrong, stream);
        default:
            return launch_group<Dtype::kBFloat16>(op, wrong, stream);
    }
}

}  // namespace

std::string nm_select_cuda(const NmSelect& op, int32_t* wrong, void* stream) {
    if (op.rows == 0 || op.columns == 0) return "";
    return on_device_of(op.weight, "weight",
                        [&] { return launch_dtype(op, wrong, static_cast<cudaStream_t>(stream)); });
}

}  // namespace msp
