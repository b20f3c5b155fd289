// The Adam/AdamW update: one scalar function and the scalars it needs. This is the only C++ text of the formula;
// the CPU kernels, the CUDA kernels and the host run of the CUDA kernels all compile it. Its twins, line for line,
// are triton_kernels/adam_math.py and pyshard/kernels/reference.py.
//
// Each operation is rounded on its own: build with -ffp-contract=off (g++) and --fmad=false (nvcc).
// Source: Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (decoupled weight decay), Reddi et al. 2018 (amsgrad).
#pragma once

#include "formats.h"

namespace pyshard {

// How the parameter is stored; the numbers are part of AdamRow::kind.
enum Format : int32_t {
  kF32 = 0,         // fp32 parameter
  kBf16Split = 1,   // bf16 parameter = upper half of the fp32 master, low = int16 remainder
  kBf16Master = 2,  // bf16 parameter, low = fp32 master
  kFp16Master = 3,  // fp16 parameter, low = fp32 master
  kBf16None = 4,    // bf16 parameter, no master
  kFp16None = 5,    // fp16 parameter, no master
  kFormats = 6,
};

// One tensor of a step. 64 bytes: a GPU reads it in four 16-byte loads.
struct AdamRow {
  void* param;            // [n], format of the kind, read-write
  void* low;              // [n] int16 remainder or fp32 master, read-write; null if the format has none
  const void* grad;       // [n] fp32, or the parameter's dtype, read-only
  float* exp_avg;         // [n] read-write
  float* exp_avg_sq;      // [n] read-write
  float* max_exp_avg_sq;  // [n] read-write; null without amsgrad
  int64_t n;              // elements
  int32_t kind;           // (format * 2 + grad_is_f32) * 4 + coupled * 2 + amsgrad
  int32_t hyper;          // index of its AdamHyper / AdamScalars
};
static_assert(sizeof(AdamRow) == 64, "the Python side and Triton read rows of 8 int64");

constexpr int32_t kKinds = kFormats * 8;

// Hyperparameters of a group at one step count, as the user gave them. 64 bytes, all double.
struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay;
  double step;       // the count of the step being taken, from 1
  double sign;       // -1 to maximize, else 1
  double decoupled;  // 1 for AdamW, 0 for Adam
};
static_assert(sizeof(AdamHyper) == 64, "the Python side and Triton read rows of 8 doubles");

// What one element needs, each computed in double and rounded once to float.
struct AdamScalars {
  float grad_scale;  // 1/loss-scale * clip coefficient * sign
  float weight_decay, decay;
  float one_minus_beta1, beta2, one_minus_beta2;
  float step_size, inv_sqrt_bias2, eps;
};

// base^exponent by binary exponentiation: a fixed order of multiplications, since pow() differs between libraries.
// Relative error at most about exponent * 2^-53, far below the one rounding to float that follows.
PYSHARD_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

PYSHARD_HD double square_root(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

PYSHARD_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

PYSHARD_HD AdamScalars adam_scalars(const AdamHyper& h, double grad_scale) {
  const int64_t step = static_cast<int64_t>(h.step);
  const double bias1 = 1.0 - power(h.beta1, step);
  const double bias2 = 1.0 - power(h.beta2, step);
  AdamScalars s;
  s.grad_scale = static_cast<float>(grad_scale * h.sign);
  s.weight_decay = static_cast<float>(h.weight_decay);
  s.decay = static_cast<float>(1.0 - h.lr * h.weight_decay * h.decoupled);
  s.one_minus_beta1 = static_cast<float>(1.0 - h.beta1);
  s.beta2 = static_cast<float>(h.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
  s.step_size = static_cast<float>(h.lr / bias1);
  s.inv_sqrt_bias2 = static_cast<float>(1.0 / square_root(bias2));
  s.eps = static_cast<float>(h.eps);
  return s;
}

// Factor that brings a norm down to max_norm, as torch.nn.utils.clip_grad_norm_ defines it; NaN stays NaN.
PYSHARD_HD double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

// One element. p is the fp32 (master) weight; m, v, vmax are the moments; g is the gradient as stored, in fp32.
template <bool kCoupled, bool kAmsgrad>
PYSHARD_HD void adam_update(float& p, float& m, float& v, float& vmax, float g, const AdamScalars& s) {
  g = g * s.grad_scale;
  if (kCoupled) {
    g = g + s.weight_decay * p;
  } else {
    p = p * s.decay;
  }
  m = m + s.one_minus_beta1 * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  float h = v;
  if (kAmsgrad) {
    h = (v > vmax || v != v) ? v : vmax;
    vmax = h;
  }
  p = p - s.step_size * (m / (square_root(h) * s.inv_sqrt_bias2 + s.eps));
}

// The fp32 weight behind a stored 16-bit one. The master counts as long as the model's copy is its rounding; a copy
// that differs was written by the user between steps, and becomes the weight.
PYSHARD_HD float live_master(float master, uint16_t rounded_master, uint16_t stored, float stored_value) {
  return rounded_master == stored ? master : stored_value;
}

}  // namespace pyshard
