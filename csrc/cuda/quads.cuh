// What all kernel bodies share: quads of elements and how a thread reads and writes them, and the
// look-up from blocks to rows.
#pragma once

#include "../storage.h"

#if defined(__CUDACC__)
#define PYSHARD_UNROLL _Pragma("unroll")
#define PYSHARD_NO_UNROLL _Pragma("unroll 1")
#else
#define PYSHARD_UNROLL
#define PYSHARD_NO_UNROLL
#endif

namespace pyshard {

constexpr int kThreads = 128;                           // of a block, except in sums
constexpr int64_t kQuadStride = int64_t{4} * kThreads;  // elements that the threads of a block hold at a time
constexpr int64_t kBlock = 1024;                        // elements of an Adam block; Python lays out rows in these

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

// Elements [i, i + 4) of an array of n: kVector in one access, for which they must be inside and aligned; else one by
// one, and zero past the end.
template <bool kVector, class T>
PYSHARD_HD Quad<T> load(const T* array, int64_t i, int64_t n) {
  const T* from = global(array) + i;
  if constexpr (kVector) {
    return *reinterpret_cast<const Quad<T>*>(from);
  } else {
    Quad<T> quad{};
    PYSHARD_UNROLL
    for (int j = 0; j < 4; ++j)
      if (i + j < n) quad.at[j] = from[j];
    return quad;
  }
}

template <bool kVector, class T>
PYSHARD_HD void store(T* array, int64_t i, int64_t n, const Quad<T>& quad) {
  T* to = global(array) + i;
  if constexpr (kVector) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
  } else {
    PYSHARD_UNROLL
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

}  // namespace pyshard
