// The built-in variables and functions of CUDA C++ and the calls of its run time, on top of cuda_emulation.h.
#pragma once

#include "cuda_emulation.h"

constexpr int warpSize = 32;

inline void __syncthreads() { emulation::named_barrier(0, (emulation::threads_per_block() + 31) / 32 * 32); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(uint32_t mask = ~0u) {
    char nothing = 0;
    emulation::collective("__syncwarp", mask, nothing, [](char* const(&)[32]) {});
}

namespace emulation {

// Every lane offers a value and gets the one of the lane that `source(lane)` names; its own where that is
// outside.
template <class T, class Source>
T shuffle(const char* name, uint32_t mask, T value, int width, Source source) {
    struct Args {
        T offered, taken;
        int source;
    } args{value, value, source(lane())};
    collective(name, mask, args, [=](Args* const(&lanes)[32]) {
        for (int i = 0; i < 32; ++i) {
            if (lanes[i] == nullptr) continue;
            const int from = lanes[i]->source;
            if (from < 0 || from >= 32 || from / width != i / width) continue;
            require(lanes[from] != nullptr, "a shuffle reads a lane outside of its mask");
            lanes[i]->taken = lanes[from]->offered;
        }
    });
    return args.taken;
}

}  // namespace emulation

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    return emulation::shuffle("__shfl_sync", mask, value, width,
                              [=](int lane) { return lane / width * width + source % width; });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    return emulation::shuffle("__shfl_xor_sync", mask, value, width, [=](int lane) { return lane ^ bits; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return emulation::shuffle("__shfl_down_sync", mask, value, width,
                              [=](int lane) { return lane + static_cast<int>(delta); });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return emulation::shuffle("__shfl_up_sync", mask, value, width,
                              [=](int lane) { return lane - static_cast<int>(delta); });
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    struct Args {
        bool set;
        uint32_t result;
    } args{predicate != 0, 0};
    emulation::collective("__ballot_sync", mask, args, [](Args* const(&lanes)[32]) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= lanes[i] != nullptr && lanes[i]->set ? 1u << i : 0u;
        for (Args* lane : lanes) {
            if (lane != nullptr) lane->result = bits;
        }
    });
    return args.result;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline uint32_t __activemask() { return ~0u; }

// Loads and stores that go through these are checked against the tensors that a test has named.
template <class T>
T __ldg(const T* from) {
    emulation::check_global(from, sizeof(T), false, "__ldg");
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    emulation::check_global(from, sizeof(T), false, "__ldcs");
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    emulation::check_global(from, sizeof(T), false, "__ldcg");
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    emulation::check_global(to, sizeof(T), true, "__stcs");
    *to = value;
}
template <class T>
void __stcg(T* to, T value) {
    emulation::check_global(to, sizeof(T), true, "__stcg");
    *to = value;
}

template <class T, class U>
T atomicAdd(T* at, U value) {
    const T old = *at;
    *at = old + static_cast<T>(value);
    return old;
}
template <class T, class U>
T atomicMax(T* at, U value) {
    const T old = *at;
    *at = std::max(old, static_cast<T>(value));
    return old;
}
template <class T, class U>
T atomicOr(T* at, U value) {
    const T old = *at;
    *at = old | static_cast<T>(value);
    return old;
}
template <class T, class U>
T atomicExch(T* at, U value) {
    return std::exchange(*at, static_cast<T>(value));
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __brev(uint32_t x) {
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
    return result;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> (4 * i) & 15;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7)) & 0xff);
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}

template <class To, class From>
To emulated_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(uint32_t bits) { return emulated_cast<float>(bits); }
inline float __int_as_float(int bits) { return emulated_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return emulated_cast<uint32_t>(value); }
inline int __float_as_int(float value) { return emulated_cast<int>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaMemoryType { cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
    cudaFuncAttributeNonPortableClusterSizeAllowed = 15,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
using cudaStream_t = void*;
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
};
struct cudaLaunchAttributeValue {
    struct {
        unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated CUDA error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
    *attributes = {cudaMemoryTypeDevice, 0};
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            return *value = emulation::settings.multiprocessors, cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            return *value = emulation::settings.major, cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            return *value = emulation::settings.minor, cudaSuccess;
        default:
            return *value = static_cast<int>(emulation::settings.most_shared), cudaSuccess;
    }
}

namespace emulation {
inline std::map<const void*, size_t> shared_limits;  // what cudaFuncSetAttribute has raised
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        emulation::shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
    }
    return cudaSuccess;
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
    const auto raised = emulation::shared_limits.find(reinterpret_cast<const void*>(kernel));
    const size_t limit = raised == emulation::shared_limits.end() ? 48 << 10 : raised->second;
    if (config->dynamicSmemBytes > limit) throw emulation::Failure("dynamic shared memory above its limit");
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
            cluster = config->attrs[i].val.clusterDim.x;
    }
    const std::tuple<std::decay_t<Expected>...> arguments(std::forward<Actual>(actual)...);
    emulation::launch(
        config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, arguments); },
        cluster);
    return cudaSuccess;
}
