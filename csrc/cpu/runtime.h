// What the CPU backend offers to the bindings: whole-step operations over a table of tensors, each one parallel
// region. The bits of every result are independent of the number of threads and of the instruction set.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pyshard {

// Instruction sets this machine can run, the fastest last.
std::vector<std::string> cpu_isas();
std::string cpu_isa();
// Chooses the instruction set of all later calls; throws std::invalid_argument for one that cannot run here.
void set_cpu_isa(const std::string& name);

struct Values {
  const void* data;
  int64_t n;
  Dtype dtype;
};
// Byte distances from an array to others like it, in an order that counts; to the gradients of all ranks, for one.
using Deltas = std::vector<int64_t>;

// Sums of squares of the blocks of every tensor, tensor after tensor. With several sources, what is squared is the
// fp32 sum, in their order, of the arrays at these distances from the tensor.
std::vector<double> cpu_block_sums(const std::vector<Values>& tensors, const Deltas& sources, int threads);
// Their total in the fixed order; inf or NaN exactly if an element is.
double cpu_sum_blocks(std::vector<double> sums);

// One Adam step of every row; scalars are indexed by AdamRow::hyper. The gradient is the fp32 sum, in their order, of the
// arrays at the distances `sources` from AdamRow::grad; the new param is also written at the distances `targets` from
// AdamRow::param.
void cpu_adam(const AdamRow* rows, int64_t count, const AdamScalars* scalars, const Deltas& sources,
              const Deltas& targets, int threads);

// out[i] = s0[i] + s1[i] + ... in fp32, in the order of the sources, each sum rounded; with accumulate out[i] + that.
// No source overlaps out.
void cpu_reduce(const std::vector<uintptr_t>& sources, Dtype dtype, float* out, int64_t n, bool accumulate,
                int threads);

void cpu_copy(const void* src, void* dst, int64_t bytes, int threads);
void cpu_cast(const void* src, Dtype from, void* dst, Dtype to, int64_t n, int threads);
void cpu_split(const float* master, uint16_t* high, int16_t* low, int64_t n, int threads);
void cpu_join(const uint16_t* high, const int16_t* low, float* master, int64_t n, int threads);
// values += 1 over several arrays of n floats in lock-step: as many memory streams as a step has.
void cpu_sweep(const std::vector<float*>& arrays, int64_t n, int threads);

}  // namespace pyshard
