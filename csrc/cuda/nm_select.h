// nm_select on a CUDA device.
#pragma once

#include <string>

#include "../nm_select.h"

namespace msp {

// Fills values and bitmask, in order on `stream` of the device that holds the weight; returns without
// waiting. Returns what went wrong, or an empty string.
std::string nm_select_cuda(const NmSelect& op, void* stream);

}  // namespace msp
