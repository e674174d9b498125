// The part of msp._cuda that prunes with an inverse Hessian.
#pragma once

#include <pybind11/pybind11.h>

namespace msp {

void bind_prune(pybind11::module_& module);

}  // namespace msp
