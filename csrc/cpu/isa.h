// Which instruction set the kernels use on this machine.
#pragma once

#include <string>
#include <vector>

namespace msp {

// kAvx2 also needs F16C; kAvx512 is F, BW, DQ, VL and VBMI2: Intel from Ice Lake, AMD from Zen 4 on.
enum class Isa { kScalar, kAvx2, kAvx512 };

// The best set that this CPU and build have, or the one that the environment variable MSP_ISA names
// (scalar, avx2, avx512; read on every call).
// Throws std::runtime_error when it names one that is unknown or missing here.
Isa isa();

const char* isa_name(Isa isa);

// The vector extensions found, by the names that compilers give them.
std::vector<std::string> cpu_features();

}  // namespace msp
