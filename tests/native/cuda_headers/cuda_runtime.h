// Found instead of the CUDA toolkit's header when a test compiles a .cu file for the CPU.
#pragma once
#include "../cuda_emulation.h"
