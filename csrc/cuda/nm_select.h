// nm_select on a CUDA device.
#pragma once

#include <string>

#include "../nm_select.h"

namespace msp {

// Fills values and bitmask, in order on `stream` of the device that holds the weight; returns without
// waiting. `*wrong`, on the device, becomes 1 if a weight or a score is NaN or infinite. Returns an error
// message, or an empty string.
std::string nm_select_cuda(const NmSelect& op, int32_t* wrong, void* stream);

}  // namespace msp
