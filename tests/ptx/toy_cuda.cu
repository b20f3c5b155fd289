// Small CUDA kernels for the tests of the interpreter, one feature of the machine each.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A grid-stride loop over 16-byte vectors, a scalar tail, an uneven number of rounds per thread.
extern "C" __global__ void scale_add(const float* __restrict__ x, float* y, int64_t n, float a) {
  int64_t step = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < n / 4; i += step) {
    float4 u = reinterpret_cast<const float4*>(x)[i], v = reinterpret_cast<float4*>(y)[i];
    v.x = v.x + a * u.x, v.y = v.y + a * u.y, v.z = v.z + a * u.z, v.w = v.w + a * u.w;
    reinterpret_cast<float4*>(y)[i] = v;
  }
  for (int64_t i = n / 4 * 4 + first; i < n; i += step) y[i] = y[i] + a * x[i];
}

// Each thread loops a number of times of its own and branches on data.
extern "C" __global__ void collatz(const uint32_t* start, uint32_t* steps) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  uint64_t n = start[i];
  uint32_t count = 0;
  while (n != 1) {
    if (n % 2)
      n = 3 * n + 1;
    else
      n /= 2;
    if (++count == 150) break;
  }
  steps[i] = count;
}

// A tree over shared memory in double; a block-wide vote; without BARRIER one is left out.
template <bool BARRIER>
__device__ __forceinline__ void tree(const float* x, double* out, int* bad) {
  __shared__ double acc[256];
  int t = threadIdx.x;
  float v = x[blockIdx.x * 256 + t];
  acc[t] = double(v) * double(v);
  if (__syncthreads_or(!isfinite(v)) && t == 0) *bad = 1;
  for (int s = 128; s >= 1; s /= 2) {
    if (t < s) acc[t] = acc[t] + acc[t + s];
    if (BARRIER || s != 64) __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = acc[0];
}
extern "C" __global__ void block_tree(const float* x, double* out, int* bad) { tree<true>(x, out, bad); }
extern "C" __global__ void racing_tree(const float* x, double* out, int* bad) { tree<false>(x, out, bad); }

// The same sum per warp by shuffles, then a ballot and a lane exchange.
extern "C" __global__ void warp_exchange(const double* x, double* sums, uint32_t* ballots, int* rotated) {
  int t = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
  double v = x[t];
  for (int s = 16; s; s /= 2) v = v + __shfl_xor_sync(~0u, v, s);
  if (lane == 0) sums[t / 32] = v;
  uint32_t positive = __ballot_sync(~0u, x[t] > 0);
  if (lane == 31) ballots[t / 32] = positive;
  int up = __shfl_up_sync(~0u, lane, 3), down = __shfl_down_sync(~0u, lane, 5, 16);
  rotated[t] = __shfl_sync(~0u, lane, lane + 7) + 100 * up + 10000 * down;
}

// Rows of 64 bytes found by binary search; pointers from memory; a switch over kinds; parameters by value.
struct Row {
  int64_t x, y, unused[4], n;
  int32_t kind, set;
};
struct Sets {
  float scale[3][5];
  double offset;
};
__constant__ float primes[4] = {2.f, 3.f, 5.f, 7.f};
__device__ unsigned blocks_done;
extern "C" __global__ void by_table(const Row* rows, const int64_t* first, int64_t count, Sets sets) {
  int64_t low = 0, high = count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (first[middle] <= blockIdx.x)
      low = middle + 1;
    else
      high = middle;
  }
  Row row = rows[low - 1];
  int64_t i = (blockIdx.x - first[low - 1]) * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) atomicAdd(&blocks_done, 1u);
  if (i >= row.n) return;
  const float* x = reinterpret_cast<const float*>(row.x);
  float* y = reinterpret_cast<float*>(row.y);
  float v = x[i], s = sets.scale[row.set][i % 5];
  switch (row.kind) {
    case 0: v = v * s; break;
    case 1: v = v / s; break;
    case 2: v = sqrtf(fabsf(v)) + s; break;
    case 3: v = fmaf(v, s, float(sets.offset)); break;
    case 4: v = v * primes[i & 3]; break;
    case 5: v = fmaxf(v, s); break;
    case 6: v = float(double(v) / sets.offset); break;
    case 7: v = float(sqrt(double(fabsf(v)) * sets.offset)); break;
    default: return;
  }
  y[i] = v;
}

// Elements beyond 2^31 from the base pointer.
extern "C" __global__ void far_index(const float* x, float* y, int64_t start) {
  int64_t i = start + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  y[i] = 2.f * x[i];
}

// 16-bit formats: conversions by the hardware and by bits.
extern "C" __global__ void halves(const uint32_t* x, uint16_t* fp16, uint16_t* bf16, uint16_t* split, float* back) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = __uint_as_float(x[i]);
  fp16[i] = __half_as_ushort(__float2half_rn(v));
  bf16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(v));
  uint32_t high = (x[i] + 0x8000u) >> 16;
  int16_t low = int16_t(x[i]);
  split[2 * i] = uint16_t(high), split[2 * i + 1] = uint16_t(low);
  back[i] = __uint_as_float((high << 16) + int32_t(low)) + 0.f * __half2float(__ushort_as_half(fp16[i]));
}

// What the compiler cannot keep in registers, and a function that it does not inline.
__device__ __noinline__ double horner(double x, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum = sum * x + i;
  return sum;
}
extern "C" __global__ void local_and_call(const int* x, double* out, int n) {
  int slots[16];
  for (int i = 0; i < 16; i++) slots[i] = x[i] * n;
  for (int i = 0; i < n; i++) slots[slots[i & 15] & 15] += threadIdx.x;
  out[threadIdx.x] = horner(slots[threadIdx.x & 15], threadIdx.x % 5);
}
