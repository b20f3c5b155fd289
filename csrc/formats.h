// Storage formats: bf16, fp16 and split weights, encoded and decoded one element at a time.
//
// Every function is pure integer or exact floating-point arithmetic without branches, so that a compiler can
// vectorize it and the CPU, the GPU and a host run of the GPU code give the same bits. None of them depends on the
// flush-to-zero modes of the machine.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYSHARD_HD static __host__ __device__ __forceinline__
#else
#define PYSHARD_HD static inline __attribute__((always_inline))
#endif

namespace pyshard {

PYSHARD_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

PYSHARD_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

// ---- bf16: the upper half of an fp32 ----

PYSHARD_HD float bf16_to_float(uint16_t half) { return bits_float(static_cast<uint32_t>(half) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN (quieted), overflow gives inf.
PYSHARD_HD uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>(value != value ? quiet : rounded);
}

// ---- fp16: 1 sign, 5 exponent, 10 mantissa bits ----

PYSHARD_HD float fp16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;  // rebias the exponent from 15 to 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  // Through the integer unit: exact, and not subject to flush-to-zero as an fp32 subnormal would be.
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bits_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

// Rounds to nearest, ties to even; NaN stays NaN (quieted), overflow gives inf, subnormals are kept.
PYSHARD_HD uint16_t float_to_fp16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the spacing of fp16 subnormals.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? (0x7e00u | (magnitude >> 13 & 0x3ffu)) : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

// ---- split weights: bf16 upper half (rounded half away from zero in magnitude of the bits) + int16 remainder ----

struct Split {
  uint16_t high;  // bf16 bits: what the model sees
  int16_t low;    // master bits minus (high << 16)
};

// Exact: join(split(x)) == x for every x that is not NaN; a NaN keeps its sign and stays NaN.
PYSHARD_HD Split split_master(float master) {
  const uint32_t bits = float_bits(master);
  // Rounding up could carry a NaN into -0 or inf: make it quiet, and drop what the lower half would hold.
  const uint32_t safe = master != master ? (bits | 0x00400000u) & 0xffff0000u : bits;
  return {static_cast<uint16_t>((safe + 0x8000u) >> 16), static_cast<int16_t>(static_cast<uint16_t>(safe))};
}

// Halves that no split makes, whose sum is NaN, mean the upper one alone: a weight set to 0 or inf between steps meets
// the remainder of its former value.
PYSHARD_HD float join_master(uint16_t high, int16_t low) {
  const uint32_t upper = static_cast<uint32_t>(high) << 16;
  const float joined = bits_float(upper + static_cast<uint32_t>(static_cast<int32_t>(low)));
  return joined != joined ? bits_float(upper) : joined;
}

}  // namespace pyshard
