// The CPU kernels of one instruction set, as a table of function pointers. kernels.cpp is compiled once per
// instruction set and defines one table each; runtime.cpp picks a table and walks tensors with it.
#pragma once

#include "../storage.h"

namespace pyshard {

struct Kernels {
  const char* name;
  // Adam on elements [begin, end) of a row; null for kinds that do not exist.
  void (*adam[kKinds])(const AdamRow& row, const AdamScalars& scalars, int64_t begin, int64_t end);
  // out[i] = s0[i] + s1[i] + ... for i < n, or with `more` out[i] + s0[i] + s1[i] + ...: in fp32, from the left, each sum
  // rounded. There is at least one source; source k lies at base + deltas[k], and out overlaps none.
  void (*reduce[kDtypes])(uintptr_t base, const int64_t* deltas, int64_t sources, float* out, int64_t n, bool more);
  // Sum of squares of up to kNormBlock elements, each the sum over sources as above, in the order of the lanes. Squares
  // of finite floats cannot overflow a double: the sum is inf or NaN exactly if an element is.
  double (*square_sum[kDtypes])(uintptr_t base, const int64_t* deltas, int64_t sources, int64_t count);
  // The same order, plain sum.
  double (*sum)(const double* values, int64_t count);
  // dst[i] = convert(src[i]) on [begin, end); by [from][to].
  void (*cast[kDtypes][kDtypes])(const void* src, void* dst, int64_t begin, int64_t end);
  void (*split)(const float* master, uint16_t* high, int16_t* low, int64_t begin, int64_t end);
  void (*join)(const uint16_t* high, const int16_t* low, float* master, int64_t begin, int64_t end);
  // values[i] += 1: the read-write sweep that benchmarks take as the machine's limit.
  void (*increment)(float* values, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace pyshard
