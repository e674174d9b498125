#pragma once

namespace msp {

// Whether the kernels can run here: there is a device, all devices are of compute capability 8.0 or newer,
// and the driver is new enough for the CUDA runtime in this module, which may be newer than torch's.
bool cuda_usable();

}  // namespace msp
