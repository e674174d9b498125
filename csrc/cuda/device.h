// What every launch does first.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace msp {

// Calls launch() with the device current that holds `memory`, and makes the caller's current again. Returns
// what went wrong, or an empty string.
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
