// The kernels of nm_spmm_cuda.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "nm_spmm.h"
#include "nm_spmm_plan.h"

namespace msp {

struct SpmmTask {
    NmSpmm op;
    SpmmPlan plan;
};

// mma.sp, for sm_80 and every newer chip.
cudaError_t nm_spmm_sm80(const SpmmTask& task, cudaStream_t stream);

// wgmma.sp, for sm_90a alone.
std::string nm_spmm_sm90(const SpmmTask& task, cudaStream_t stream);

// Computes y from the workspace if the plan splits K.
cudaError_t nm_spmm_sum(const SpmmTask& task, cudaStream_t stream);

}  // namespace msp
