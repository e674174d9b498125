// The first steps of every launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace msp {

// Lets a kernel without static shared memory use `bytes` of dynamic memory. The limit is raised to the whole
// memory of the device: if two threads launch the same kernel, the smaller launch must not lower the limit of
// the other.
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, int64_t bytes) {
    if (bytes <= 48 << 10) return cudaSuccess;
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    return error == cudaSuccess
               ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)
               : error;
}

// Calls launch() with the device current that holds `memory`, and then makes the caller's device current
// again. Returns an error message, or an empty string.
template <class Launch>
std::string on_device_of(const void* memory, const char* name, const Launch& launch) {
    cudaPointerAttributes attributes{};
    int current = 0;
    cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
        return std::string(name) + "_ptr is not device memory";
    }
    error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != attributes.device) error = cudaSetDevice(attributes.device);
    if (error == cudaSuccess) error = launch();
    if (current != attributes.device) cudaSetDevice(current);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace msp
