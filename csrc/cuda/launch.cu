// The kernels, and their launches on a stream. The names are extern "C" so that they are easy to find in PTX.
#include <cuda_runtime_api.h>

#include "bodies.cuh"

namespace pyshard {

extern "C" __global__ void __launch_bounds__(kThreads) pyshard_adam(AdamArgs args) { adam_body(args, blockIdx.x, static_cast<int>(threadIdx.x)); }

template <class Args, class Phase>
__device__ __forceinline__ void reduce(const Args& args, double* out, Phase phase) {
  __shared__ double lanes[kNormLanes];
  const int thread = static_cast<int>(threadIdx.x);
  phase(args, blockIdx.x, thread, lanes);
  for (int width = kNormLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    halve_phase(lanes, width, thread);
  }
  if (thread == 0) out[blockIdx.x] = lanes[0];
}
extern "C" __global__ void __launch_bounds__(kNormThreads) pyshard_square_sum(SquareSumArgs args) {
  reduce(args, args.partials, [](const SquareSumArgs& a, int64_t b, int t, double* l) {square_sum_phase(a,b,t,l);});
}
extern "C" __global__ void __launch_bounds__(kNormThreads) pyshard_sum(SumArgs args) {
  reduce(args, args.out, [](const SumArgs& a, int64_t b, int t, double* l) {sum_phase(a,b,t,l);});
}
extern "C" __global__ void __launch_bounds__(kThreads) pyshard_prepare(PrepareArgs args) { prepare_body(args, blockIdx.x, static_cast<int>(threadIdx.x)); }
extern "C" __global__ void __launch_bounds__(kThreads) pyshard_cast(CastArgs args) { convert_body(args, blockIdx.x, static_cast<int>(threadIdx.x)); }
extern "C" __global__ void __launch_bounds__(kThreads) pyshard_split(SplitArgs args) { convert_body(args, blockIdx.x, static_cast<int>(threadIdx.x)); }
extern "C" __global__ void __launch_bounds__(kThreads) pyshard_join(JoinArgs args) { convert_body(args, blockIdx.x, static_cast<int>(threadIdx.x)); }
}
