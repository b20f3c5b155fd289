// The CUDA part of pyshard._C.
#pragma once

#include <pybind11/pybind11.h>

namespace pyshard {

// Adds host_* (always) and cuda_* (in a build with nvcc) for each kernel of bodies.cuh.
void bind_cuda(pybind11::module_& m);

}  // namespace pyshard
