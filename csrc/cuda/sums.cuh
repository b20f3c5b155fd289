// The bodies of the sums, in the order that all backends share.
//
// A block of kNormBlock elements has kNormLanes accumulators in double, element i belongs to lane i % kNormLanes.
// One warp serves a block with four lanes per thread, so that a row of lanes is one contiguous run of quads. The body
// comes in phases with a barrier between: accumulate, then halve with strides 64, 32, ..., 1.
#pragma once

#include "quads.cuh"

namespace pyshard {

constexpr int kNormThreads = 32;

struct SquareSumArgs {
  const AdamRow* rows;         // [n_rows], of which the gradients are read
  const int64_t* first_block;  // [n_rows + 1], in blocks of kNormBlock
  int64_t n_rows;
  double* partials;  // [n_blocks], written
  int64_t n_blocks;

  int64_t blocks() const { return n_blocks; }
};

struct SumArgs {
  const double* values;  // [n]
  int64_t n;
  double* out;  // [ceil(n / kNormBlock)], written

  int64_t blocks() const { return (n + kNormBlock - 1) / kNormBlock; }
};

template <int32_t kDtype>
PYSHARD_HD void add_squares(double (&sums)[4], const Quad<typename Element<kDtype>::Type>& quad) {
  PYSHARD_UNROLL
  for (int j = 0; j < 4; ++j) {
    const double value = static_cast<double>(Element<kDtype>::decode(quad.at[j]));
    sums[j] = sums[j] + value * value;  // the square is exact
  }
}

template <int32_t kDtype>
PYSHARD_HD void square_sum_lanes(const void* values, int64_t start, int64_t n, int thread, double* lanes) {
  using T = typename Element<kDtype>::Type;
  // Loads that a thread has in flight: 32 warps of a multiprocessor then wait for 64 KB (16 bits) or 128 KB (fp32).
  constexpr int kDepth = 8;
  const T* x = static_cast<const T*>(values);
  const int64_t end = n - start < kNormBlock ? n : start + kNormBlock;
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = start + 4 * thread;
  if (aligned16(values)) {
    PYSHARD_NO_UNROLL
    for (; i + (kDepth - 1) * kNormLanes + 4 <= end; i += kDepth * kNormLanes) {
      Quad<T> quads[kDepth];
      PYSHARD_UNROLL
      for (int k = 0; k < kDepth; ++k) quads[k] = load<true>(x, i + k * kNormLanes, end);
      PYSHARD_UNROLL
      for (int k = 0; k < kDepth; ++k) add_squares<kDtype>(sums, quads[k]);
    }
  }
  PYSHARD_NO_UNROLL
  for (; i < end; i += kNormLanes) add_squares<kDtype>(sums, load<false>(x, i, end));
  PYSHARD_UNROLL
  for (int j = 0; j < 4; ++j) lanes[4 * thread + j] = sums[j];
}

PYSHARD_HD void fill_lanes(const SquareSumArgs& args, int64_t block, int thread, double* lanes) {
  const int64_t r = find_row(args.first_block, args.n_rows, block);
  const AdamRow& row = args.rows[r];
  const int64_t start = (block - args.first_block[r]) * kNormBlock;
  switch (grad_dtype(row.kind)) {
    case kFloat32:
      return square_sum_lanes<kFloat32>(row.grad, start, row.n, thread, lanes);
    case kBfloat16:
      return square_sum_lanes<kBfloat16>(row.grad, start, row.n, thread, lanes);
    default:
      return square_sum_lanes<kFloat16>(row.grad, start, row.n, thread, lanes);
  }
}

// Lanes thread, thread + 32, ...: neighbouring threads read neighbouring doubles.
PYSHARD_HD void fill_lanes(const SumArgs& args, int64_t block, int thread, double* lanes) {
  const int64_t start = block * kNormBlock;
  const int64_t end = args.n - start < kNormBlock ? args.n : start + kNormBlock;
  for (int lane = thread; lane < kNormLanes; lane += kNormThreads) {
    double sum = 0.0;
    for (int64_t i = start + lane; i < end; i += kNormLanes) sum = sum + args.values[i];
    lanes[lane] = sum;
  }
}

PYSHARD_HD void halve_lanes(double* lanes, int width, int thread) {
  for (int lane = thread; lane < width; lane += kNormThreads) lanes[lane] = lanes[lane] + lanes[lane + width];
}

}  // namespace pyshard
