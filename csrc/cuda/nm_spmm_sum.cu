#include "nm_spmm_kernels.h"
#include "nm_spmm_tile.h"

namespace msp {
namespace {

// Computes y from the sums of the splits, always added in the same order.
template <Dtype D, class Shape>
__global__ void __launch_bounds__(Shape::kThreads) nm_spmm_sum_kernel(const __grid_constant__ SpmmTask task) {
    using Epilogue = SpmmEpilogue<Shape>;
    const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
    const int thread = static_cast<int>(threadIdx.x);
    SpmmTile tile{static_cast<int>(blockIdx.x) % task.plan.row_tiles,
                  static_cast<int>(blockIdx.x) / task.plan.row_tiles, 0};
    typename Shape::Sums sums = {};
    for (; tile.split < task.plan.splits; ++tile.split) Epilogue::add_partial(task, tile, thread, sums);
    Epilogue::template stage<D, false>(task, tile, thread, sums, shared);
    __syncthreads();
    Epilogue::write(task, tile, thread, shared);
}

template <Dtype D, class Shape>
cudaError_t run(const SpmmTask& task, cudaStream_t stream) {
    return spmm_launch(nm_spmm_sum_kernel<D, Shape>, task, task.plan.tiles(), Shape::kThreads,
                       SpmmEpilogue<Shape>::kSharedBytes, 1, stream);
}

template <Dtype D>
cudaError_t run(const SpmmTask& task, cudaStream_t stream) {
    if (task.plan.wgmma) return run<D, SpmmWgmmaShape<64>>(task, stream);
    return task.plan.tokens == 16 ? run<D, SpmmShape16>(task, stream) : run<D, SpmmShape64>(task, stream);
}

}  // namespace

cudaError_t nm_spmm_sum(const SpmmTask& task, cudaStream_t stream) {
    return task.op.dtype == Dtype::kBFloat16 ? run<Dtype::kBFloat16>(task, stream)
                                             : run<Dtype::kFloat16>(task, stream);
}

}  // namespace msp
