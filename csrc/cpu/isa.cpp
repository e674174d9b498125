#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(MSP_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace msp {
namespace {

#if defined(MSP_X86)
// Whether the CPU has tiles for bf16 and the kernel lets this process use them; it allocates space in the
// threads' contexts only on demand.
bool has_tiles() {
#if defined(__linux__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool has(Isa isa) {
    switch (isa) {
        case Isa::kScalar:
            return true;
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
        case Isa::kAvx512:
            return has(Isa::kAvx2) && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
        case Isa::kAvx512Bf16:
            return has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
        case Isa::kAmx:
            return has(Isa::kAvx512Bf16) && has_tiles();
    }
    return false;
}
#else
bool has(Isa isa) { return isa == Isa::kScalar; }
#endif

constexpr Isa kBestFirst[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kScalar};

Isa best() {
    for (Isa isa : kBestFirst) {
        if (has(isa)) return isa;
    }
    return Isa::kScalar;
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAmx:
            return "amx";
        case Isa::kAvx512Bf16:
            return "avx512bf16";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx2:
            return "avx2";
        default:
            return "scalar";
    }
}

Isa isa() {
    static const Isa found = best();
    const char* forced = std::getenv("MSP_ISA");
    if (forced == nullptr || *forced == '\0') return found;
    std::string available;
    for (Isa candidate : kBestFirst) {
        if (!has(candidate)) continue;
        if (std::string(forced) == isa_name(candidate)) return candidate;
        available += (available.empty() ? "" : ", ") + std::string(isa_name(candidate));
    }
    throw std::runtime_error("MSP_ISA=" + std::string(forced) +
                             " is not available on this machine; available: " + available);
}

std::vector<std::string> cpu_features() {
    std::vector<std::string> features;
#if defined(MSP_X86)
#define MSP_FEATURE(name) \
    if (__builtin_cpu_supports(name)) features.push_back(name)
    MSP_FEATURE("avx2");
    MSP_FEATURE("fma");
    MSP_FEATURE("f16c");
    MSP_FEATURE("avx512f");
    MSP_FEATURE("avx512bw");
    MSP_FEATURE("avx512dq");
    MSP_FEATURE("avx512vl");
    MSP_FEATURE("avx512vbmi");
    MSP_FEATURE("avx512vbmi2");
    MSP_FEATURE("avx512vnni");
    MSP_FEATURE("avx512bf16");
#undef MSP_FEATURE
#endif
    return features;
}

}  // namespace msp
