// Which instruction set the kernels use on this machine.
#pragma once

#include <string>
#include <vector>

namespace msp {

// In ascending order, each with all that those before it have. kAvx2 also needs FMA and F16C; kAvx512 is F,
// BW, DQ, VL and VBMI2: Intel from Ice Lake on; kAvx512Bf16 adds products of bf16: AMD from Zen 4 on; kAmx
// adds the bf16 tiles of Sapphire Rapids. An op without a path of its own for a set takes the best one below
// it.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best set that this CPU and build have, or the one that the environment variable MSP_ISA names
// (scalar, avx2, avx512, avx512bf16, amx; read on every call).
// Throws std::runtime_error when it names one that is unknown or missing here.
Isa isa();

const char* isa_name(Isa isa);

// The vector extensions found, by the names that compilers give them.
std::vector<std::string> cpu_features();

}  // namespace msp
