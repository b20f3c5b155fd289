// The kernels, and their launches. The kernels' names are extern "C", so that they are found in PTX and in profilers.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace pyshard {

// A block's sum: a phase that fills the lanes, and the halvings of the lanes.
template <class Args>
__device__ __forceinline__ void sum_block(const Args& args, double* out) {
  __shared__ double lanes[kNormLanes];
  const int thread = static_cast<int>(threadIdx.x);
  fill_lanes(args, blockIdx.x, thread, lanes);
  for (int width = kNormLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    halve_lanes(lanes, width, thread);
  }
  if (thread == 0) out[blockIdx.x] = lanes[0];  // which this thread has written itself
}

extern "C" {

__global__ void __launch_bounds__(kThreads) pyshard_adam(AdamArgs args) {
  adam_body(args, blockIdx.x, static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kNormThreads) pyshard_square_sum(SquareSumArgs args) {
  sum_block(args, args.partials);
}

__global__ void __launch_bounds__(kNormThreads) pyshard_sum(SumArgs args) { sum_block(args, args.out); }

__global__ void __launch_bounds__(kThreads) pyshard_prepare(PrepareArgs args) {
  prepare_body(args, blockIdx.x, static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads) pyshard_cast(CastArgs args) {
  cast_body(args, blockIdx.x, static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads) pyshard_split(SplitArgs args) {
  split_body(args, blockIdx.x, static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads) pyshard_join(JoinArgs args) {
  join_body(args, blockIdx.x, static_cast<int>(threadIdx.x));
}

}  // extern "C"

namespace {

std::string explain(cudaError_t error) {
  const std::string what = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "there is no NVIDIA driver, or one too old for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
             std::to_string(CUDART_VERSION % 1000 / 10) + " (" + what +
             "). Install or update the driver, or use CPU tensors";
    case cudaErrorNoDevice:
      return "no CUDA device is visible (" + what + "). Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use CPU tensors";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "this build has no code for the device (" + what +
             "). Build pyshard with a CUDA toolkit that knows it, or use backend=\"triton\"";
    default:
      return what + ". If an earlier kernel is at fault, CUDA_LAUNCH_BLOCKING=1 shows which";
  }
}

void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("pyshard: cannot launch ") + kernel + ": " + explain(error) + ".");
}

// A grid's first dimension ends at 2^31 - 1; with the smallest block, of 1,024 elements, that is 2^41 elements.
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class Args>
void launch_kernel(void (*kernel)(Args), const char* name, int threads, const Args& args, int device,
                   uintptr_t stream) {
  const int64_t blocks = args.blocks();
  if (blocks == 0) return;
  if (blocks > kMaxBlocks)
    throw std::invalid_argument(std::string("pyshard: cannot launch ") + name + ": got " + std::to_string(blocks) +
                                " blocks, expected at most " + std::to_string(kMaxBlocks) +
                                ". Shard the tensors over more devices, or update fewer of them at once.");
  // This file's runtime is linked in statically and has its own idea of the current device, apart from torch's.
  check(cudaSetDevice(device), name);
  kernel<<<static_cast<unsigned>(blocks), threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), name);
}

}  // namespace

#define PYSHARD_LAUNCH(Args, kernel, threads)                      \
  template <>                                                      \
  void launch(const Args& args, int device, uintptr_t stream) {    \
    launch_kernel(kernel, #kernel, threads, args, device, stream); \
  }
PYSHARD_LAUNCH(AdamArgs, pyshard_adam, kThreads)
PYSHARD_LAUNCH(SquareSumArgs, pyshard_square_sum, kNormThreads)
PYSHARD_LAUNCH(SumArgs, pyshard_sum, kNormThreads)
PYSHARD_LAUNCH(PrepareArgs, pyshard_prepare, kThreads)
PYSHARD_LAUNCH(CastArgs, pyshard_cast, kThreads)
PYSHARD_LAUNCH(SplitArgs, pyshard_split, kThreads)
PYSHARD_LAUNCH(JoinArgs, pyshard_join, kThreads)
#undef PYSHARD_LAUNCH

std::string launch_refusal(int device) {
  cudaError_t error = cudaSetDevice(device);
  // Loads the code for the device: this fails if the build has none, and a later CUDA graph finds it loaded.
  for (const void* kernel :
       {reinterpret_cast<const void*>(pyshard_adam), reinterpret_cast<const void*>(pyshard_square_sum),
        reinterpret_cast<const void*>(pyshard_sum), reinterpret_cast<const void*>(pyshard_prepare),
        reinterpret_cast<const void*>(pyshard_cast), reinterpret_cast<const void*>(pyshard_split),
        reinterpret_cast<const void*>(pyshard_join)}) {
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  }
  cudaGetLastError();  // answered here, so the next launch must not find it
  return error == cudaSuccess ? "" : explain(error);
}

}  // namespace pyshard
