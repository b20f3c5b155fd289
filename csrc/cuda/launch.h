// The two ways to run a kernel of bodies.cuh. Instantiated for each Args there.
#pragma once

#include <string>

#include "bodies.cuh"

namespace pyshard {

// Enqueues the whole grid on a stream (a cudaStream_t) of a device, which becomes the current one of the calling
// thread. Throws std::runtime_error if CUDA refuses, std::invalid_argument for more blocks than a grid has.
template <class Args>
void launch(const Args& args, int device, uintptr_t stream);

// Why no kernel can run on the device; empty if one can.
std::string launch_refusal(int device);

// Runs blocks [begin, end) of the grid on the calling thread; args then hold host addresses.
template <class Args>
void host_run(const Args& args, int64_t begin, int64_t end);

}  // namespace pyshard
