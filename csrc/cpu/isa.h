// The instruction set that the kernels use on this machine.
#pragma once

#include <string>
#include <vector>

namespace msp {

// In ascending order; each set includes the sets before it. kAvx2 also needs FMA and F16C; kAvx512 is F, BW,
// DQ, VL and VBMI2: Intel from Ice Lake on; kAvx512Bf16 adds products of bf16: AMD from Zen 4 on; kAmx adds
// the bf16 tiles of Sapphire Rapids. An op without a path of its own for a set uses the best path below it.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best set of this CPU and build, or the one that the environment variable MSP_ISA names
// (scalar, avx2, avx512, avx512bf16, amx; read on every call).
// Throws std::runtime_error if that set is unknown or missing here.
Isa isa();

// MSP_BEST(isa, name): the best of name_scalar, name_avx2 and name_avx512 for `isa`, of one type. Files for
// other instruction sets than the scalar one are compiled on x86 only.
#if defined(MSP_X86)
#define MSP_BEST(isa, name) ::msp::best_of(isa, name##_scalar, name##_avx2, name##_avx512)
#else
#define MSP_BEST(isa, name) ::msp::best_of(isa, name##_scalar, name##_scalar, name##_scalar)
#endif

template <class T>
T best_of(Isa isa, T portable, T avx2, T avx512) {
    return isa >= Isa::kAvx512 ? avx512 : isa >= Isa::kAvx2 ? avx2 : portable;
}

const char* isa_name(Isa isa);

// The vector extensions of this CPU, under the names that compilers use.
std::vector<std::string> cpu_features();

}  // namespace msp
