// The CPU kernels: plain loops over the scalar functions of adam.h and formats.h, compiled once per instruction set
// (PYSHARD_ISA = baseline, avx2, avx512) and vectorized by the compiler. Body and tail of a loop are the same
// operations, so the bits do not depend on where a range begins or ends.
//
// Only functions with internal linkage here: an inline function shared with another translation unit could be merged
// by the linker into a copy that needs instructions the machine lacks.
#include "kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if !defined(PYSHARD_ISA)
#error "compile with -DPYSHARD_ISA=baseline, avx2 or avx512"
#endif

namespace pyshard {
namespace {

template <int32_t kKind>
void adam_range(const AdamRow& row, const AdamScalars& scalars, int64_t begin, int64_t end) {
  using S = Stored<kKind>;
  const AdamScalars s = scalars;
  auto* __restrict__ param = static_cast<typename S::Param*>(row.param);
  auto* __restrict__ low = static_cast<typename S::Low*>(row.low);
  const auto* __restrict__ grad = static_cast<const typename S::Grad*>(row.grad);
  float* __restrict__ exp_avg = row.exp_avg;
  float* __restrict__ exp_avg_sq = row.exp_avg_sq;
  float* __restrict__ max_exp_avg_sq = row.max_exp_avg_sq;

  for (int64_t i = begin; i < end; ++i) {
    typename S::Low remainder{};
    if constexpr (S::kLow) remainder = low[i];
    float p = S::weight(param[i], remainder);
    float m = exp_avg[i], v = exp_avg_sq[i], vmax = 0.0f;
    if constexpr (S::kAmsgrad) vmax = max_exp_avg_sq[i];
    adam_update<S::kCoupled, S::kAmsgrad>(p, m, v, vmax, S::gradient(grad[i]), s);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if constexpr (S::kAmsgrad) max_exp_avg_sq[i] = vmax;
    S::set_weight(param[i], remainder, p);
    if constexpr (S::kLow) low[i] = remainder;
  }
}

// The first kCount sources of the list are read side by side: one pass, and no sum but the last is stored.
template <int32_t kDtype, int64_t kCount, bool kMore>
void add_sources(uintptr_t base, const int64_t* deltas, float* __restrict__ out, int64_t n) {
  using E = Element<kDtype>;
  const typename E::Type* x[kCount];
  for (int64_t k = 0; k < kCount; ++k)
    x[k] = reinterpret_cast<const typename E::Type*>(base + static_cast<uintptr_t>(deltas[k]));
  for (int64_t i = 0; i < n; ++i) {
    float sum = E::decode(x[0][i]);
    if constexpr (kMore) sum = out[i] + sum;
    for (int64_t k = 1; k < kCount; ++k) sum = sum + E::decode(x[k][i]);
    out[i] = sum;
  }
}

template <int32_t kDtype, bool kMore>
void add_some(uintptr_t base, const int64_t* deltas, int64_t count, float* out, int64_t n) {
  if (count == 1) return add_sources<kDtype, 1, kMore>(base, deltas, out, n);
  if (count == 2) return add_sources<kDtype, 2, kMore>(base, deltas, out, n);
  if (count == 3) return add_sources<kDtype, 3, kMore>(base, deltas, out, n);
  add_sources<kDtype, 4, kMore>(base, deltas, out, n);
}

// Four at a time; what they add to is then in the first-level cache, as long as n is small.
template <int32_t kDtype>
void reduce(uintptr_t base, const int64_t* deltas, int64_t count, float* out, int64_t n, bool more) {
  for (int64_t k = 0; k < count; k += 4, more = true)
    (more ? add_some<kDtype, true> : add_some<kDtype, false>)(base, deltas + k, count - k, out, n);
}

double combine_lanes(double* lanes) {
  for (int64_t width = kNormLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane] + lanes[lane + width];
  return lanes[0];
}

// Adds squares of one row of lanes. The product of two 24-bit mantissas is exact in double, so a fused multiply-add
// gives the same bits as a multiplication and an addition.
template <int32_t kDtype>
PYSHARD_HD void add_squares(double* __restrict__ lanes, const typename Element<kDtype>::Type* __restrict__ x,
                            int64_t width) {
  for (int64_t lane = 0; lane < width; ++lane) {
    const double value = static_cast<double>(Element<kDtype>::decode(x[lane]));
    lanes[lane] = lanes[lane] + value * value;
  }
}

#if defined(__AVX512F__)
// Whole rows, with the 128 accumulators in 16 registers; the compiler alone keeps them in memory, at half the speed.
PYSHARD_HD __m512d widen(__m256 x) { return _mm512_maskz_cvtps_pd(0xff, x); }

template <int32_t kDtype>
PYSHARD_HD __m512d load_wide(const typename Element<kDtype>::Type* x) {
  if constexpr (kDtype == kFloat32)
    return widen(_mm256_loadu_ps(x));
  else
    return widen(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

template <int32_t kDtype>
PYSHARD_HD void add_rows(double* __restrict__ lanes, const typename Element<kDtype>::Type* __restrict__ x,
                         int64_t rows) {
  __m512d sums[16];
#pragma GCC unroll 16
  for (int64_t j = 0; j < 16; ++j) sums[j] = _mm512_loadu_pd(lanes + j * 8);
  for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < 16; ++j) {
      const __m512d wide = load_wide<kDtype>(x + row * kNormLanes + j * 8);
      sums[j] = _mm512_fmadd_pd(wide, wide, sums[j]);
    }
  }
#pragma GCC unroll 16
  for (int64_t j = 0; j < 16; ++j) _mm512_storeu_pd(lanes + j * 8, sums[j]);
}

// bf16 by 32-bit words: the upper half of a word is an odd element as fp32, the lower half shifted up an even one.
// Accumulator 4 * part + 2 * parity + side then holds the lanes 32 * part + 16 * side + 2 * i + parity, i = 0..7.
PYSHARD_HD void add_bf16_block(double* __restrict__ lanes, const uint16_t* __restrict__ x) {
  __m512d sums[16] = {};
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t row = 0; row < kNormRows; ++row) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < 4; ++part) {
      const __m512i words = _mm512_loadu_si512(x + row * kNormLanes + part * 32);
      const __m512 halves[2] = {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, words, 16)),
                                _mm512_castsi512_ps(_mm512_and_si512(words, upper))};
#pragma GCC unroll 2
      for (int64_t parity = 0; parity < 2; ++parity) {
        const __m512d low = widen(_mm512_castps512_ps256(halves[parity]));
        const __m512d high = widen(_mm512_maskz_extractf32x8_ps(0xff, halves[parity], 1));
        __m512d* sum = sums + 4 * part + 2 * parity;
        sum[0] = _mm512_fmadd_pd(low, low, sum[0]);
        sum[1] = _mm512_fmadd_pd(high, high, sum[1]);
      }
    }
  }
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
#pragma GCC unroll 8
  for (int64_t j = 0; j < 8; ++j) {
    const __m512d even = sums[4 * (j / 2) + j % 2], odd = sums[4 * (j / 2) + 2 + j % 2];
    _mm512_storeu_pd(lanes + 16 * j, _mm512_permutex2var_pd(even, first, odd));
    _mm512_storeu_pd(lanes + 16 * j + 8, _mm512_permutex2var_pd(even, second, odd));
  }
}

#else
template <int32_t kDtype>
PYSHARD_HD void add_rows(double* __restrict__ lanes, const typename Element<kDtype>::Type* __restrict__ x,
                         int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) add_squares<kDtype>(lanes, x + row * kNormLanes, kNormLanes);
}
#endif

// A whole block; the lanes are 0 before.
template <int32_t kDtype>
PYSHARD_HD void add_block(double* __restrict__ lanes, const typename Element<kDtype>::Type* __restrict__ x) {
#if defined(__AVX512F__)
  if constexpr (kDtype == kBfloat16) return add_bf16_block(lanes, x);
#endif
  add_rows<kDtype>(lanes, x, kNormRows);
}

// Several sources are added up one row of lanes at a time: two of fp32 at 0.9 of the speed of a mere dot product, against
// 0.65 by whole blocks.
template <int32_t kDtype>
double square_sum(uintptr_t base, const int64_t* deltas, int64_t sources, int64_t count) {
  using Type = typename Element<kDtype>::Type;
  const auto* x = reinterpret_cast<const Type*>(base + static_cast<uintptr_t>(deltas[0]));
  alignas(64) double lanes[kNormLanes] = {};
  alignas(64) float summed[kNormLanes];
  if (sources == 1 && count == kNormBlock) {
    add_block<kDtype>(lanes, x);
    return combine_lanes(lanes);
  }
  for (int64_t row = 0; row < count; row += kNormLanes) {
    const int64_t width = count - row < kNormLanes ? count - row : kNormLanes;
    if (sources == 1) {
      add_squares<kDtype>(lanes, x + row, width);
      continue;
    }
    reduce<kDtype>(base + static_cast<uintptr_t>(row) * sizeof(Type), deltas, sources, summed, width, false);
    if (width == kNormLanes)
      add_rows<kFloat32>(lanes, summed, 1);
    else
      add_squares<kFloat32>(lanes, summed, width);
  }
  return combine_lanes(lanes);
}

double sum(const double* __restrict__ values, int64_t count) {
  double lanes[kNormLanes] = {};
  for (int64_t row = 0; row < count; row += kNormLanes) {
    const int64_t width = count - row < kNormLanes ? count - row : kNormLanes;
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane] + values[row + lane];
  }
  return combine_lanes(lanes);
}

template <int32_t kFrom, int32_t kTo>
void cast(const void* src, void* dst, int64_t begin, int64_t end) {
  const typename Element<kFrom>::Type* __restrict__ x = static_cast<const typename Element<kFrom>::Type*>(src);
  typename Element<kTo>::Type* __restrict__ y = static_cast<typename Element<kTo>::Type*>(dst);
  for (int64_t i = begin; i < end; ++i) y[i] = Element<kTo>::encode(Element<kFrom>::decode(x[i]));
}

void split(const float* __restrict__ master, uint16_t* __restrict__ high, int16_t* __restrict__ low, int64_t begin,
           int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Split parts = split_master(master[i]);
    high[i] = parts.high;
    low[i] = parts.low;
  }
}

void join(const uint16_t* __restrict__ high, const int16_t* __restrict__ low, float* __restrict__ master, int64_t begin,
          int64_t end) {
  for (int64_t i = begin; i < end; ++i) master[i] = join_master(high[i], low[i]);
}

void increment(float* __restrict__ values, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) values[i] = values[i] + 1.0f;
}

// clang-format off
#define PYSHARD_KINDS(first) adam_range<first>, adam_range<first + 1>, adam_range<first + 2>, adam_range<first + 3>
#define PYSHARD_JOIN_(a, b) a##b
#define PYSHARD_JOIN(a, b) PYSHARD_JOIN_(a, b)
#define PYSHARD_STRING_(a) #a
#define PYSHARD_STRING(a) PYSHARD_STRING_(a)
// clang-format on

}  // namespace

const Kernels PYSHARD_JOIN(kernels_, PYSHARD_ISA) = {
    PYSHARD_STRING(PYSHARD_ISA),
    {nullptr, nullptr, nullptr, nullptr,  // fp32 weights have fp32 gradients
     PYSHARD_KINDS(4), PYSHARD_KINDS(8), PYSHARD_KINDS(12), PYSHARD_KINDS(16), PYSHARD_KINDS(20), PYSHARD_KINDS(24),
     PYSHARD_KINDS(28), PYSHARD_KINDS(32), PYSHARD_KINDS(36), PYSHARD_KINDS(40), PYSHARD_KINDS(44)},
    {reduce<kFloat32>, reduce<kBfloat16>, reduce<kFloat16>},
    {square_sum<kFloat32>, square_sum<kBfloat16>, square_sum<kFloat16>},
    sum,
    {{nullptr, cast<kFloat32, kBfloat16>, cast<kFloat32, kFloat16>},
     {cast<kBfloat16, kFloat32>, nullptr, nullptr},
     {cast<kFloat16, kFloat32>, nullptr, nullptr}},
    split,
    join,
    increment,
};

}  // namespace pyshard
