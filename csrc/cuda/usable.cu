#include <cuda_runtime.h>

#include "usable.h"

namespace msp {

bool cuda_usable() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) return false;
    for (int device = 0; device < devices; ++device) {
        int major = 0;
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
            major < 8)
            return false;
    }
    return devices > 0;
}

}  // namespace msp
