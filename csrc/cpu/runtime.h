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

// Sum of the squares of all gradients, in the fixed order of the blocks; inf or NaN exactly if an element is.
double cpu_square_sum(const AdamRow* rows, int64_t count, int threads);
// The same over bare values: each of count tensors has a pointer, a length and a dtype.
struct Values {
  const void* data;
  int64_t n;
  Dtype dtype;
};
double cpu_square_sum(const std::vector<Values>& tensors, int threads);

// One Adam step of every row; scalars are indexed by AdamRow::hyper.
void cpu_adam(const AdamRow* rows, int64_t count, const AdamScalars* scalars, int threads);

void cpu_cast(const void* src, Dtype from, void* dst, Dtype to, int64_t n, int threads);
void cpu_split(const float* master, uint16_t* high, int16_t* low, int64_t n, int threads);
void cpu_join(const uint16_t* high, const int16_t* low, float* master, int64_t n, int threads);
// values += 1 over several arrays of n floats in lock-step: as many memory streams as a step has.
void cpu_sweep(const std::vector<float*>& arrays, int64_t n, int threads);

}  // namespace pyshard
