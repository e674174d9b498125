// Found instead of the CUDA driver's header when a test compiles a .cu file for the CPU.
#pragma once
#include "../cuda_driver_emulation.h"
