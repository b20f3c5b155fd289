// The kernel bodies: what one thread of one block does, as functions of (arguments, block, thread).
//
// launch.cu runs them over a grid on a GPU, host_run.cpp over the same grid on the host, so that index arithmetic,
// vector accesses, tails and the look-up of rows run in tests without a GPU. Everything that rounds comes from adam.h
// and formats.h. All indices of elements and blocks are 64-bit.
#pragma once

#include <type_traits>

#include "../adam.h"
#include "../cpu/kernels.h"

namespace pyshard {

// An elementwise block is 1,024 elements: 128 threads times two quads. The step's table is laid out in these blocks.
constexpr int64_t kBlock = 1024;
constexpr int kThreads = 128;
constexpr int64_t kQuadStride = int64_t{4} * kThreads;

// ---- four consecutive elements ----
//
// Neighbouring threads hold neighbouring quads, so that a warp's access to fp32 (16 bytes per thread) or to 16 bits
// (8 bytes per thread) is one contiguous run of whole 32-byte sectors. Eight elements per thread would need two
// accesses to fp32, each of which touches every sector of the run and uses half of it: twice the writes to L2.

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

// Tells nvcc that rows hold global addresses, which spares the generic address look-up of each access.
template <class T>
PYSHARD_HD T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

template <bool kVector, class T>
PYSHARD_HD Quad<T> load(const T* array, int64_t i, int64_t n) {
  const T* from = global(array) + i;
  if constexpr (kVector) return *reinterpret_cast<const Quad<T>*>(from);
  Quad<T> quad{};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (i + j < n) quad.at[j] = from[j];
  return quad;
}

template <bool kVector, class T>
PYSHARD_HD void store(T* array, int64_t i, int64_t n, const Quad<T>& quad) {
  T* to = global(array) + i;
  if constexpr (kVector) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j < n) to[j] = quad.at[j];
  }
}

PYSHARD_HD bool aligned16(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }

// ---- rows and their blocks ----

// The row r with first_block[r] <= block < first_block[r + 1]; rows without elements have no block. Every thread
// searches for itself: all of a warp read one address, a few thousand rows are a dozen steps in L1 and L2, and the
// latency is covered by the loads of the other resident blocks. A search by one thread would wait as long, and then at
// a barrier.
PYSHARD_HD int64_t find_row(const int64_t* first_block, int64_t n_rows, int64_t block) {
  int64_t low = 0, high = n_rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// ---- control: eight doubles that stay on the device during a step ----

enum Control : int32_t {
  kGradScale = 0,      // in: factor on the gradients
  kMaxNorm = 1,        // in: inf for no clipping
  kSquareSum = 2,      // in: sum of squares of the gradients, 0 if not computed
  kFoundInf = 3,       // in: nonzero: skip the step
  kSkipNonfinite = 4,  // in: nonzero: skip the step if the sum of squares is inf or NaN
  kSkip = 5,           // out: 1 if the step is skipped, else 0
  kNorm = 6,           // out: norm of the scaled gradients, before clipping
  kSkipped = 7,        // in, out: count of skipped steps
};

// ---- Adam ----

struct AdamArgs {
  const AdamRow* rows;         // [n_rows]
  const int64_t* first_block;  // [n_rows + 1], in blocks of kBlock elements
  int64_t n_rows, n_blocks;
  const AdamScalars* scalars;  // by AdamRow::hyper
  const double* control;       // [8]

  int64_t blocks() const { return n_blocks; }
};

template <int32_t kFormat, bool kGradF32, bool kCoupled, bool kAmsgrad>
struct AdamQuad {
  static constexpr bool kFp16 = kFormat == kFp16Master || kFormat == kFp16None;
  static constexpr bool kMaster = kFormat == kBf16Master || kFormat == kFp16Master;
  static constexpr bool kLow = kMaster || kFormat == kBf16Split;
  using Param = std::conditional_t<kFormat == kF32, float, uint16_t>;
  using Low = std::conditional_t<kMaster, float, int16_t>;
  using Grad = std::conditional_t<kGradF32, float, uint16_t>;

  Quad<Param> param;
  Quad<Low> low;
  Quad<Grad> grad;
  Quad<float> exp_avg, exp_avg_sq, max_exp_avg_sq;

  template <bool kVector>
  PYSHARD_HD AdamQuad read(const AdamRow& row, int64_t i) {
    AdamQuad q{};
    q.param = load<kVector>(static_cast<const Param*>(row.param), i, row.n);
    if constexpr (kLow) q.low = load<kVector>(static_cast<const Low*>(row.low), i, row.n);
    q.grad = load<kVector>(static_cast<const Grad*>(row.grad), i, row.n);
    q.exp_avg = load<kVector>(row.exp_avg, i, row.n);
    q.exp_avg_sq = load<kVector>(row.exp_avg_sq, i, row.n);
    if constexpr (kAmsgrad) q.max_exp_avg_sq = load<kVector>(row.max_exp_avg_sq, i, row.n);
    return q;
  }

  template <bool kVector>
  PYSHARD_HD void write(const AdamQuad& q, const AdamRow& row, int64_t i) {
    store<kVector>(static_cast<Param*>(row.param), i, row.n, q.param);
    if constexpr (kLow) store<kVector>(static_cast<Low*>(row.low), i, row.n, q.low);
    store<kVector>(row.exp_avg, i, row.n, q.exp_avg);
    store<kVector>(row.exp_avg_sq, i, row.n, q.exp_avg_sq);
    if constexpr (kAmsgrad) store<kVector>(row.max_exp_avg_sq, i, row.n, q.max_exp_avg_sq);
  }

  PYSHARD_HD float weight(Param param, Low low) {
    if constexpr (kFormat == kF32) return param;
    if constexpr (kFormat == kBf16Split) return join_master(param, low);
    if constexpr (kFormat == kBf16Master) return live_master(low, float_to_bf16(low), param, bf16_to_float(param));
    if constexpr (kFormat == kFp16Master) return live_master(low, float_to_fp16(low), param, fp16_to_float(param));
    if constexpr (kFormat == kBf16None) return bf16_to_float(param);
    if constexpr (kFormat == kFp16None) return fp16_to_float(param);
  }

  PYSHARD_HD float gradient(Grad grad) {
    if constexpr (kGradF32) return grad;
    if constexpr (!kGradF32 && kFp16) return fp16_to_float(grad);
    if constexpr (!kGradF32 && !kFp16) return bf16_to_float(grad);
  }

  PYSHARD_HD void set_weight(Param& param, Low& low, float p) {
    if constexpr (kFormat == kF32) param = p;
    if constexpr (kFormat == kBf16Split) {
      const Split parts = split_master(p);
      param = parts.high;
      low = parts.low;
    }
    if constexpr (kMaster) low = p;
    if constexpr (kFormat == kBf16Master || kFormat == kBf16None) param = float_to_bf16(p);
    if constexpr (kFp16) param = float_to_fp16(p);
  }

  PYSHARD_HD void update(AdamQuad& q, const AdamScalars& s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float p = weight(q.param.at[j], q.low.at[j]);
      float vmax = 0.0f;
      if constexpr (kAmsgrad) vmax = q.max_exp_avg_sq.at[j];
      adam_update<kCoupled, kAmsgrad>(p, q.exp_avg.at[j], q.exp_avg_sq.at[j], vmax, gradient(q.grad.at[j]), s);
      if constexpr (kAmsgrad) q.max_exp_avg_sq.at[j] = vmax;
      set_weight(q.param.at[j], q.low.at[j], p);
    }
  }
};

template <int32_t kKind>
PYSHARD_HD void adam_block(const AdamRow& row, const AdamScalars& s, int64_t start, int thread) {
  using Q = AdamQuad<(kKind >> 3), (kKind & 4) != 0, (kKind & 2) != 0, (kKind & 1) != 0>;
  const bool aligned = aligned16(row.param) && aligned16(row.low) && aligned16(row.grad) && aligned16(row.exp_avg) &&
                       aligned16(row.exp_avg_sq) && aligned16(row.max_exp_avg_sq);
#pragma unroll
  for (int64_t i = start + 4 * thread; i < start + kBlock; i += kQuadStride) {
    if (i >= row.n) return;
    const bool vector = aligned && i + 4 <= row.n;
    Q q = vector ? Q::template read<true>(row, i) : Q::template read<false>(row, i);
    Q::update(q, s);
    if (vector)
      Q::template write<true>(q, row, i);
    else
      Q::template write<false>(q, row, i);
  }
}

PYSHARD_HD void adam_body(const AdamArgs& args, int64_t block, int thread) {
  if (args.control[kSkip] != 0.0) return;
  const int64_t r = find_row(args.first_block, args.n_rows, block);
  const AdamRow row = args.rows[r];
  const AdamScalars s = args.scalars[row.hyper];
  const int64_t start = (block - args.first_block[r]) * kBlock;
  switch (row.kind) {
#define PYSHARD_KIND(kind) \
  case kind:               \
    return adam_block<kind>(row, s, start, thread);
#define PYSHARD_KINDS(first) PYSHARD_KIND(first) PYSHARD_KIND(first + 1) PYSHARD_KIND(first + 2) PYSHARD_KIND(first + 3)
    PYSHARD_KINDS(4)  // fp32 weights have fp32 gradients
    PYSHARD_KINDS(8)
    PYSHARD_KINDS(12)
    PYSHARD_KINDS(16)
    PYSHARD_KINDS(20)
    PYSHARD_KINDS(24)
    PYSHARD_KINDS(28)
    PYSHARD_KINDS(32)
    PYSHARD_KINDS(36)
    PYSHARD_KINDS(40)
    PYSHARD_KINDS(44)
#undef PYSHARD_KINDS
#undef PYSHARD_KIND
    default:
      return;  // Python makes no other kinds
  }
}

// ---- sums in a fixed order ----
//
// A block of kNormBlock elements has kNormLanes accumulators in double, element i belongs to lane i % kNormLanes.
// One warp serves a block with four lanes per thread, so that a row of lanes is one contiguous run of quads. The body
// comes in phases with a barrier between: accumulate, then halve with strides 64, 32, ..., 1.

constexpr int kNormThreads = 32;

struct SquareSumArgs {
  const AdamRow* rows;         // [n_rows], of which the gradients are read
  const int64_t* first_block;  // [n_rows + 1], in blocks of kNormBlock elements
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
struct Element {
  using Type = std::conditional_t<kDtype == kFloat32, float, uint16_t>;
  PYSHARD_HD float decode(Type x) {
    if constexpr (kDtype == kFloat32) return x;
    if constexpr (kDtype == kBfloat16) return bf16_to_float(x);
    if constexpr (kDtype == kFloat16) return fp16_to_float(x);
  }
  PYSHARD_HD Type encode(float x) {
    if constexpr (kDtype == kFloat32) return x;
    if constexpr (kDtype == kBfloat16) return float_to_bf16(x);
    if constexpr (kDtype == kFloat16) return float_to_fp16(x);
  }
};

template <int32_t kDtype>
PYSHARD_HD void add_squares(double (&sums)[4], const Quad<typename Element<kDtype>::Type>& quad) {
#pragma unroll
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
#pragma unroll 1
    for (; i + (kDepth - 1) * kNormLanes + 4 <= end; i += kDepth * kNormLanes) {
      Quad<T> quads[kDepth];
#pragma unroll
      for (int k = 0; k < kDepth; ++k) quads[k] = load<true>(x, i + k * kNormLanes, end);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) add_squares<kDtype>(sums, quads[k]);
    }
  }
#pragma unroll 1
  for (; i < end; i += kNormLanes) add_squares<kDtype>(sums, load<false>(x, i, end));
#pragma unroll
  for (int j = 0; j < 4; ++j) lanes[4 * thread + j] = sums[j];
}

PYSHARD_HD void square_sum_phase(const SquareSumArgs& args, int64_t block, int thread, double* lanes) {
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
PYSHARD_HD void sum_phase(const SumArgs& args, int64_t block, int thread, double* lanes) {
  const int64_t start = block * kNormBlock;
  const int64_t end = args.n - start < kNormBlock ? args.n : start + kNormBlock;
  for (int lane = thread; lane < kNormLanes; lane += kNormThreads) {
    double sum = 0.0;
    for (int64_t i = start + lane; i < end; i += kNormLanes) sum = sum + args.values[i];
    lanes[lane] = sum;
  }
}

PYSHARD_HD void halve_phase(double* lanes, int width, int thread) {
  for (int lane = thread; lane < width; lane += kNormThreads) lanes[lane] = lanes[lane] + lanes[lane + width];
}

// ---- prepare: the scalars of a step, computed where the step counts and the norm are ----

struct PrepareArgs {
  const AdamHyper* hypers;               // [n]; step is not read if there are addresses
  const int64_t* step_addresses;         // [n] of float step counts, or null
  double* control;                       // [8]
  AdamScalars* scalars;                  // [n], written
  int64_t n;

  int64_t blocks() const { return n > kThreads ? (n + kThreads - 1) / kThreads : 1; }  // control is always written
};

PYSHARD_HD void prepare_body(const PrepareArgs& args, int64_t block, int thread) {
  const int64_t i = block * kThreads + thread;
  const double grad_scale = args.control[kGradScale], max_norm = args.control[kMaxNorm];
  const double square_sum = args.control[kSquareSum];
  const bool finite = square_sum - square_sum == 0.0;
  // Each thread decides by itself, from what no thread writes: there is no order between blocks.
  const bool skip = args.control[kFoundInf] != 0.0 || (args.control[kSkipNonfinite] != 0.0 && !finite);
  const double norm = square_root(square_sum) * grad_scale;
  const bool clips = max_norm != static_cast<double>(bits_float(0x7f800000u));
  const double scale = clips ? grad_scale * clip_coefficient(norm, max_norm) : grad_scale;
  if (i == 0) {
    args.control[kSkip] = skip ? 1.0 : 0.0;
    args.control[kNorm] = norm;
    args.control[kSkipped] = args.control[kSkipped] + (skip ? 1.0 : 0.0);
  }
  if (i >= args.n) return;
  AdamHyper hyper = args.hypers[i];
  if (args.step_addresses != nullptr) {
    float* count = reinterpret_cast<float*>(args.step_addresses[i]);
    const float step = *count + (skip ? 0.0f : 1.0f);
    *count = step;
    hyper.step = static_cast<double>(step);
  }
  args.scalars[i] = adam_scalars(hyper, scale);
}

// ---- casts, split, join: dst[i] = convert(src[i]) ----

struct CastArgs {
  const void* src;  // [n]
  void* dst;        // [n]
  Dtype from, to;   // exactly one is fp32
  int64_t n;

  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
};

struct SplitArgs {
  const float* master;  // [n]
  uint16_t* high;       // [n] bf16 bits
  int16_t* low;         // [n]
  int64_t n;

  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
};

struct JoinArgs {
  const uint16_t* high;  // [n] bf16 bits
  const int16_t* low;    // [n]
  float* master;         // [n]
  int64_t n;

  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
};

template <bool kVector, int32_t kFrom, int32_t kTo>
PYSHARD_HD void cast_quad(const CastArgs& args, int64_t i) {
  const auto x = load<kVector>(static_cast<const typename Element<kFrom>::Type*>(args.src), i, args.n);
  Quad<typename Element<kTo>::Type> y;
#pragma unroll
  for (int j = 0; j < 4; ++j) y.at[j] = Element<kTo>::encode(Element<kFrom>::decode(x.at[j]));
  store<kVector>(static_cast<typename Element<kTo>::Type*>(args.dst), i, args.n, y);
}

template <bool kVector>
PYSHARD_HD void convert_quad(const CastArgs& args, int64_t i) {
  if (args.to == kBfloat16)
    cast_quad<kVector, kFloat32, kBfloat16>(args, i);
  else if (args.to == kFloat16)
    cast_quad<kVector, kFloat32, kFloat16>(args, i);
  else if (args.from == kBfloat16)
    cast_quad<kVector, kBfloat16, kFloat32>(args, i);
  else
    cast_quad<kVector, kFloat16, kFloat32>(args, i);
}

template <bool kVector>
PYSHARD_HD void convert_quad(const SplitArgs& args, int64_t i) {
  const auto master = load<kVector>(args.master, i, args.n);
  Quad<uint16_t> high;
  Quad<int16_t> low;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Split parts = split_master(master.at[j]);
    high.at[j] = parts.high;
    low.at[j] = parts.low;
  }
  store<kVector>(args.high, i, args.n, high);
  store<kVector>(args.low, i, args.n, low);
}

template <bool kVector>
PYSHARD_HD void convert_quad(const JoinArgs& args, int64_t i) {
  const auto high = load<kVector>(args.high, i, args.n);
  const auto low = load<kVector>(args.low, i, args.n);
  Quad<float> master;
#pragma unroll
  for (int j = 0; j < 4; ++j) master.at[j] = join_master(high.at[j], low.at[j]);
  store<kVector>(args.master, i, args.n, master);
}

PYSHARD_HD bool aligned(const CastArgs& args) { return aligned16(args.src) && aligned16(args.dst); }
PYSHARD_HD bool aligned(const SplitArgs& args) {
  return aligned16(args.master) && aligned16(args.high) && aligned16(args.low);
}
PYSHARD_HD bool aligned(const JoinArgs& args) {
  return aligned16(args.high) && aligned16(args.low) && aligned16(args.master);
}

template <class Args>
PYSHARD_HD void convert_body(const Args& args, int64_t block, int thread) {
  const bool vector = aligned(args);
#pragma unroll
  for (int64_t i = block * kBlock + 4 * thread; i < (block + 1) * kBlock; i += kQuadStride) {
    if (vector && i + 4 <= args.n)
      convert_quad<true>(args, i);
    else if (i < args.n)
      convert_quad<false>(args, i);
  }
}

}  // namespace pyshard
