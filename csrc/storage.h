// How tensors are stored: elements of a dtype, and weights of a Format, read to fp32 and written back. Shared by the CPU
// kernels, the CUDA kernels and their host run, as are the sizes that fix the order of sums.
#pragma once

#include <type_traits>

#include "adam.h"

namespace pyshard {

// ---- elements ----

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kDtypes = 3 };

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

// ---- rows of a kind ----

PYSHARD_HD constexpr Dtype param_dtype(int32_t format) {
  return format == kF32 ? kFloat32 : format == kFp16Master || format == kFp16None ? kFloat16 : kBfloat16;
}

// What a kind says of its row: types of the arrays, and the fp32 weight and gradient behind them.
template <int32_t kKind>
struct Stored {
  static constexpr int32_t kFormat = kKind >> 3;
  static constexpr bool kGradF32 = (kKind & 4) != 0, kCoupled = (kKind & 2) != 0, kAmsgrad = (kKind & 1) != 0;
  static constexpr bool kMaster = kFormat == kBf16Master || kFormat == kFp16Master;
  static constexpr bool kLow = kMaster || kFormat == kBf16Split;
  static constexpr Dtype kParam = param_dtype(kFormat), kGrad = kGradF32 ? kFloat32 : kParam;
  using Param = typename Element<kParam>::Type;
  using Grad = typename Element<kGrad>::Type;
  using Low = std::conditional_t<kMaster, float, int16_t>;

  PYSHARD_HD float weight(Param param, Low low) {
    if constexpr (kFormat == kBf16Split) return join_master(param, low);
    const float value = Element<kParam>::decode(param);
    if constexpr (kMaster) return live_master(low, Element<kParam>::encode(low), param, value);
    return value;
  }

  PYSHARD_HD float gradient(Grad grad) { return Element<kGrad>::decode(grad); }

  PYSHARD_HD void set_weight(Param& param, Low& low, float p) {
    if constexpr (kFormat == kBf16Split) {
      const Split parts = split_master(p);
      param = parts.high;
      low = parts.low;
    } else {
      param = Element<kParam>::encode(p);
      if constexpr (kMaster) low = p;
    }
  }
};

PYSHARD_HD Dtype grad_dtype(int32_t kind) { return (kind & 4) != 0 ? kFloat32 : param_dtype(kind >> 3); }

// ---- the order of sums ----
//
// Squares are summed in double over blocks of kNormBlock elements, counted from each tensor's own start: element i of a
// block is added to lane i % kNormLanes, in order; then lane l takes lane l + w for w = 64, 32, ..., 1. The blocks of all
// tensors are summed in the same way until one value is left.
constexpr int64_t kNormLanes = 128;  // 16 AVX-512 registers; four lanes for each thread of a warp
constexpr int64_t kNormBlock = 4096;
constexpr int64_t kNormRows = kNormBlock / kNormLanes;

}  // namespace pyshard
