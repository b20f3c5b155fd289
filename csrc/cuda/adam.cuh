// The body of the Adam kernel, and of the kernel that prepares a step's scalars on the device.
#pragma once

#include "quads.cuh"

namespace pyshard {

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
  const int64_t* first_block;  // [n_rows + 1], in blocks of kBlock
  int64_t n_rows, n_blocks;
  const AdamScalars* scalars;  // by AdamRow::hyper
  const double* control;       // [8]

  int64_t blocks() const { return n_blocks; }
};

template <int32_t kKind>
struct AdamQuad : Stored<kKind> {
  using S = Stored<kKind>;
  using typename S::Grad;
  using typename S::Low;
  using typename S::Param;

  Quad<Param> param;
  Quad<Low> low;
  Quad<Grad> grad;
  Quad<float> exp_avg, exp_avg_sq, max_exp_avg_sq;

  template <bool kVector>
  PYSHARD_HD AdamQuad read(const AdamRow& row, int64_t i) {
    AdamQuad q{};
    q.param = load<kVector>(static_cast<const Param*>(row.param), i, row.n);
    if constexpr (S::kLow) q.low = load<kVector>(static_cast<const Low*>(row.low), i, row.n);
    q.grad = load<kVector>(static_cast<const Grad*>(row.grad), i, row.n);
    q.exp_avg = load<kVector>(row.exp_avg, i, row.n);
    q.exp_avg_sq = load<kVector>(row.exp_avg_sq, i, row.n);
    if constexpr (S::kAmsgrad) q.max_exp_avg_sq = load<kVector>(row.max_exp_avg_sq, i, row.n);
    return q;
  }

  template <bool kVector>
  PYSHARD_HD void write(const AdamQuad& q, const AdamRow& row, int64_t i) {
    store<kVector>(static_cast<Param*>(row.param), i, row.n, q.param);
    if constexpr (S::kLow) store<kVector>(static_cast<Low*>(row.low), i, row.n, q.low);
    store<kVector>(row.exp_avg, i, row.n, q.exp_avg);
    store<kVector>(row.exp_avg_sq, i, row.n, q.exp_avg_sq);
    if constexpr (S::kAmsgrad) store<kVector>(row.max_exp_avg_sq, i, row.n, q.max_exp_avg_sq);
  }

  PYSHARD_HD void update(AdamQuad& q, const AdamScalars& s) {
    PYSHARD_UNROLL
    for (int j = 0; j < 4; ++j) {
      float p = S::weight(q.param.at[j], q.low.at[j]);
      float vmax = 0.0f;
      if constexpr (S::kAmsgrad) vmax = q.max_exp_avg_sq.at[j];
      adam_update<S::kCoupled, S::kAmsgrad>(p, q.exp_avg.at[j], q.exp_avg_sq.at[j], vmax, S::gradient(q.grad.at[j]), s);
      if constexpr (S::kAmsgrad) q.max_exp_avg_sq.at[j] = vmax;
      S::set_weight(q.param.at[j], q.low.at[j], p);
    }
  }
};

template <int32_t kKind>
PYSHARD_HD void adam_block(const AdamRow& row, const AdamScalars& s, int64_t start, int thread) {
  using Q = AdamQuad<kKind>;
  const bool aligned = aligned16(row.param) && aligned16(row.low) && aligned16(row.grad) && aligned16(row.exp_avg) &&
                       aligned16(row.exp_avg_sq) && aligned16(row.max_exp_avg_sq);
  // One quad at a time: its four to six loads, by the 1,024 threads that 64 registers allow on a multiprocessor, keep
  // 40 to 100 KB under way; bandwidth times latency (0.8 us) is 20 KB on H100, 43 KB on B200. Two quads at a time would
  // double the code and halve the threads.
  PYSHARD_NO_UNROLL
  for (int64_t i = start + 4 * thread; i < start + kBlock && i < row.n; i += kQuadStride) {
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

// ---- prepare: the scalars of a step, computed where the step counts and the norm are ----

struct PrepareArgs {
  const AdamHyper* hypers;        // [n]; their step is not read if there are addresses
  const int64_t* step_addresses;  // [n] of float step counts that are read and counted, or null
  double* control;                // [8], read and written
  AdamScalars* scalars;           // [n], written
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

}  // namespace pyshard
