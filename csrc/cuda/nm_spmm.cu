#include <cuda_runtime.h>

#include <string_view>

#include "nm_spmm_kernels.h"

namespace msp {
namespace {

// Only a module with machine code for sm_90a has the wgmma kernel: PTX for newer chips cannot hold it.
constexpr bool kBuiltForSm90a = std::string_view(MSP_CUDA_ARCHS).find("90a") != std::string_view::npos;

std::string text(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

cudaError_t plan_for_current_device(int64_t tokens, int64_t rows, int64_t columns, SpmmPlan* plan) {
    int device = 0, major = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
        *plan = spmm_plan(tokens, rows, columns, kBuiltForSm90a && major == 9, multiprocessors);
    }
    return error;
}

}  // namespace

std::string nm_spmm_workspace_bytes(int64_t tokens, int64_t rows, int64_t columns, int64_t* bytes) {
    SpmmPlan plan{};
    const cudaError_t error = plan_for_current_device(tokens, rows, columns, &plan);
    *bytes = spmm_workspace_bytes(plan);
    return text(error);
}

std::string nm_spmm_cuda(const NmSpmm& op, void* stream) {
    if (op.tokens == 0 || op.rows == 0 || op.columns == 0) return "";
    SpmmTask task{op, {}};
    const cudaError_t error = plan_for_current_device(op.tokens, op.rows, op.columns, &task.plan);
    if (error != cudaSuccess) return text(error);
    if (task.plan.splits > 1 && op.workspace == nullptr) return "this call needs a workspace";
    const auto queue = static_cast<cudaStream_t>(stream);
    const std::string failed = task.plan.wgmma ? nm_spmm_sm90(task, queue) : text(nm_spmm_sm80(task, queue));
    if (!failed.empty() || task.plan.splits == 1) return failed;
    return text(nm_spmm_sum(task, queue));
}

}  // namespace msp
