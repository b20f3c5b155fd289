// Choice of the instruction set, and the walk of tables of tensors over threads.
#include "runtime.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "float_mode.h"

namespace pyshard {
namespace {

// Below this many elements a step is over before a second thread has woken up: measured, 16 K fp32 elements of Adam
// take 4 us on one core, and an empty parallel region 3 us.
constexpr int64_t kSerialElements = 16384;
// Ranges are cut at multiples of this, so that two threads never write to one cache line.
constexpr int64_t kGrain = 1024;

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found{&kernels_baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) found.push_back(&kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&kernels_avx512);
#endif
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{runnable().back()};
  return kernels;
}

// Calls body(part, parts) on each of `threads` threads; with one, in the caller.
template <class Body>
void on_threads(int threads, const Body& body) {
  if (threads <= 1) {
    DefaultFloatMode mode;
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    DefaultFloatMode mode;
    body(omp_get_thread_num(), omp_get_num_threads());
  }
}

int useful_threads(int64_t elements, int threads) { return elements <= kSerialElements ? 1 : std::max(threads, 1); }

// Start of a part when `total` is cut into equal parts at multiples of the grain.
int64_t cut(int64_t total, int64_t part, int64_t parts, int64_t grain) {
  const int64_t grains = (total + grain - 1) / grain;
  return std::min(total, grains * part / parts * grain);
}

template <class Body>
void on_ranges(int64_t n, int threads, const Body& body) {
  on_threads(useful_threads(n, threads),
             [&](int part, int parts) { body(cut(n, part, parts, kGrain), cut(n, part + 1, parts, kGrain)); });
}

// Walks items of given sizes, laid end to end, from position begin to end: visit(item, first, last) per item.
template <class Size, class Visit>
void walk(int64_t items, int64_t begin, int64_t end, const Size& size, const Visit& visit) {
  int64_t start = 0;
  for (int64_t item = 0; item < items && start < end; ++item) {
    const int64_t n = size(item);
    const int64_t first = std::max<int64_t>(begin - start, 0), last = std::min(end - start, n);
    if (first < last) visit(item, first, last);
    start += n;
  }
}

double sum_blocks(const Kernels& kernels, std::vector<double> values) {
  while (values.size() > 1) {
    std::vector<double> sums;
    for (size_t i = 0; i < values.size(); i += kNormBlock)
      sums.push_back(kernels.sum(&values[i], std::min<int64_t>(kNormBlock, values.size() - i)));
    values.swap(sums);
  }
  return values.empty() ? 0.0 : values[0];
}

constexpr int64_t kBytes[kDtypes] = {4, 2, 2};

// Shared by both forms: values(item) gives the tensor.
template <class At>
double square_sum(int64_t count, int threads, const At& at) {
  const Kernels& kernels = *chosen();
  const auto blocks_of = [&](int64_t item) { return (at(item).n + kNormBlock - 1) / kNormBlock; };
  int64_t elements = 0, blocks = 0;
  for (int64_t item = 0; item < count; ++item) {
    elements += at(item).n;
    blocks += blocks_of(item);
  }
  std::vector<double> sums(blocks);
  on_threads(useful_threads(elements, threads), [&](int part, int parts) {
    int64_t out = cut(blocks, part, parts, 1);
    walk(count, out, cut(blocks, part + 1, parts, 1), blocks_of, [&](int64_t item, int64_t first, int64_t last) {
      const Values values = at(item);
      const char* data = static_cast<const char*>(values.data);
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kNormBlock;
        sums[out++] = kernels.square_sum[values.dtype](data + start * kBytes[values.dtype],
                                                       std::min(kNormBlock, values.n - start));
      }
    });
  });
  DefaultFloatMode mode;
  return sum_blocks(kernels, std::move(sums));
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.push_back(kernels->name);
  return names;
}

std::string cpu_isa() { return chosen().load()->name; }

void set_cpu_isa(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->name) {
      chosen() = kernels;
      return;
    }
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("pyshard: instruction set '" + name + "' cannot run here; expected one of: " + known);
}

double cpu_square_sum(const AdamRow* rows, int64_t count, int threads) {
  return square_sum(count, threads, [rows](int64_t item) {
    return Values{rows[item].grad, rows[item].n, grad_dtype(rows[item].kind)};
  });
}

double cpu_square_sum(const std::vector<Values>& tensors, int threads) {
  return square_sum(static_cast<int64_t>(tensors.size()), threads, [&](int64_t item) { return tensors[item]; });
}

void cpu_adam(const AdamRow* rows, int64_t count, const AdamScalars* scalars, int threads) {
  const Kernels& kernels = *chosen();
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += rows[i].n;
  on_ranges(total, threads, [&](int64_t begin, int64_t end) {
    walk(
        count, begin, end, [rows](int64_t i) { return rows[i].n; },
        [&](int64_t i, int64_t first, int64_t last) {
          kernels.adam[rows[i].kind](rows[i], scalars[rows[i].hyper], first, last);
        });
  });
}

void cpu_cast(const void* src, Dtype from, void* dst, Dtype to, int64_t n, int threads) {
  const auto cast = chosen().load()->cast[from][to];
  on_ranges(n, threads, [&](int64_t begin, int64_t end) { cast(src, dst, begin, end); });
}

void cpu_split(const float* master, uint16_t* high, int16_t* low, int64_t n, int threads) {
  const auto split = chosen().load()->split;
  on_ranges(n, threads, [&](int64_t begin, int64_t end) { split(master, high, low, begin, end); });
}

void cpu_join(const uint16_t* high, const int16_t* low, float* master, int64_t n, int threads) {
  const auto join = chosen().load()->join;
  on_ranges(n, threads, [&](int64_t begin, int64_t end) { join(high, low, master, begin, end); });
}

void cpu_sweep(const std::vector<float*>& arrays, int64_t n, int threads) {
  const auto increment = chosen().load()->increment;
  on_ranges(n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kGrain)
      for (float* array : arrays) increment(array, i, std::min(i + kGrain, end));
  });
}

}  // namespace pyshard
