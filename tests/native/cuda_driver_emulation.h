// Tensor maps as the emulated bulk copies read them, made by the driver's function of the same name.
#pragma once

#include "cuda_emulation.h"

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

struct alignas(64) CUtensorMap {
    const unsigned char* base;
    uint64_t columns, rows, row_bytes;
    uint32_t box_columns, box_rows;
    bool swizzled;
};

// Rank 2 and 16-bit elements only. Refuses what the driver refuses (CUDA driver API, cuTensorMapEncodeTiled).
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* strides,
                                       const cuuint32_t* box, const cuuint32_t* element_strides,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides[0] % 16 == 0 &&
                      sizes[0] > 0 && sizes[1] > 0 && sizes[0] <= UINT64_C(1) << 32 &&
                      sizes[1] <= UINT64_C(1) << 32 && strides[0] >= 2 * sizes[0] && box[0] > 0 &&
                      box[0] <= 256 && box[1] > 0 && box[1] <= 256 && box[0] * 2 % 16 == 0 &&
                      element_strides[0] == 1 && element_strides[1] == 1 &&
                      (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128);
    if (!fits) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<const unsigned char*>(base), sizes[0], sizes[1], strides[0], box[0], box[1],
            swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
    return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
    if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
