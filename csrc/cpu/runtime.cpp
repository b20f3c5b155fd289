// Choice of the instruction set, and the walk of tables of tensors over threads.
#include "runtime.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "float_mode.h"

namespace pyshard {
namespace {

// Below this many elements a step is over before a second thread has woken up: measured, 16 K fp32 elements of Adam
// take 4 us on one core, and an empty parallel region 3 us.
constexpr int64_t kSerialElements = 16384;
// Ranges are cut at multiples of this, so that two threads never write to one cache line.
constexpr int64_t kGrain = 1024;
// Elements that are summed, updated and sent to peers at a time: so few that no memory stream pauses for long. With 7 M
// fp32 elements, 2 sources and 1 target, 128 took 3.9 ms, as would a single loop; 512 4.2 ms, 2048 4.6 ms, 32 4.3 ms.
constexpr int64_t kBlock = 128;
constexpr int64_t kLine = 64;  // bytes of a cache line

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

constexpr int64_t kBytes[kDtypes] = {4, 2, 2};

template <class T>
T* moved(T* pointer, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + static_cast<uintptr_t>(bytes));
}

// Elements from `begin` on as a row of their own.
AdamRow rest_of(const AdamRow& row, int64_t begin) {
  const int32_t format = row.kind >> 3;
  AdamRow rest = row;
  rest.param = moved(row.param, begin * kBytes[param_dtype(format)]);
  rest.low = moved(row.low, begin * (format == kBf16Split ? 2 : 4));
  rest.grad = moved(row.grad, begin * kBytes[grad_dtype(row.kind)]);
  rest.exp_avg = moved(row.exp_avg, begin * 4);
  rest.exp_avg_sq = moved(row.exp_avg_sq, begin * 4);
  rest.max_exp_avg_sq = moved(row.max_exp_avg_sq, begin * 4);
  rest.n -= begin;
  return rest;
}

// Copies to memory that this core will not read. Whole cache lines go past the caches, which saves fetching them first:
// 14 M fp32 elements, 2 sources, 1 target took 8.3 ms instead of 9.2 with plain stores.
void send(void* to, const void* from, int64_t bytes) {
  auto* dst = static_cast<char*>(to);
  const auto* src = static_cast<const char*>(from);
#if defined(__x86_64__)
  const int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(dst) % kLine, bytes);
  std::memcpy(dst, src, head);
  for (dst += head, src += head, bytes -= head; bytes >= kLine; dst += kLine, src += kLine, bytes -= kLine)
    for (int64_t i = 0; i < kLine; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#endif
  std::memcpy(dst, src, bytes);
}

// After it, what was sent comes before all later stores in the eyes of other cores.
void end_sending() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void exchange_adam(const Kernels& kernels, const AdamRow& row, const AdamScalars& scalars, const Deltas& sources,
                   const Deltas& targets, int64_t first, int64_t last) {
  alignas(kLine) float sum[kBlock];
  const int64_t width = kBytes[param_dtype(row.kind >> 3)];
  for (int64_t begin = first; begin < last;) {
    AdamRow block = rest_of(row, begin);
    const int64_t past_line = reinterpret_cast<uintptr_t>(block.param) % kLine / width;  // whole lines from then on
    const int64_t n = std::min(last - begin, kBlock - past_line);
    int32_t kind = row.kind;
    if (sources.size() == 1) {
      block.grad = moved(block.grad, sources[0]);
    } else {
      kernels.reduce[grad_dtype(kind)](reinterpret_cast<uintptr_t>(block.grad), sources.data(), sources.size(), sum, n,
                                       false);
      block.grad = sum;
      kind |= 4;  // an fp32 gradient
    }
    kernels.adam[kind](block, scalars, 0, n);
    for (const int64_t target : targets) send(moved(block.param, target), block.param, n * width);
    begin += n;
  }
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

std::vector<double> cpu_block_sums(const std::vector<Values>& tensors, const Deltas& sources, int threads) {
  const Kernels& kernels = *chosen();
  const auto blocks_of = [&](int64_t item) { return (tensors[item].n + kNormBlock - 1) / kNormBlock; };
  const int64_t count = static_cast<int64_t>(tensors.size());
  int64_t elements = 0, blocks = 0;
  for (int64_t item = 0; item < count; ++item) {
    elements += tensors[item].n;
    blocks += blocks_of(item);
  }
  std::vector<double> sums(blocks);
  on_threads(useful_threads(elements, threads), [&](int part, int parts) {
    int64_t out = cut(blocks, part, parts, 1);
    walk(count, out, cut(blocks, part + 1, parts, 1), blocks_of, [&](int64_t item, int64_t first, int64_t last) {
      const Values& values = tensors[item];
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kNormBlock, n = std::min(kNormBlock, values.n - start);
        const auto data = reinterpret_cast<uintptr_t>(values.data) + start * kBytes[values.dtype];
        sums[out++] = kernels.square_sum[values.dtype](data, sources.data(), sources.size(), n);
      }
    });
  });
  return sums;
}

double cpu_sum_blocks(std::vector<double> values) {
  const Kernels& kernels = *chosen();
  DefaultFloatMode mode;
  while (values.size() > 1) {
    std::vector<double> sums;
    for (size_t i = 0; i < values.size(); i += kNormBlock)
      sums.push_back(kernels.sum(&values[i], std::min<int64_t>(kNormBlock, values.size() - i)));
    values.swap(sums);
  }
  return values.empty() ? 0.0 : values[0];
}

void cpu_adam(const AdamRow* rows, int64_t count, const AdamScalars* scalars, const Deltas& sources,
              const Deltas& targets, int threads) {
  const Kernels& kernels = *chosen();
  const bool alone = sources == Deltas{0} && targets.empty();
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += rows[i].n;
  on_ranges(total, threads, [&](int64_t begin, int64_t end) {
    walk(
        count, begin, end, [rows](int64_t i) { return rows[i].n; },
        [&](int64_t i, int64_t first, int64_t last) {
          const AdamScalars& s = scalars[rows[i].hyper];
          if (alone)
            kernels.adam[rows[i].kind](rows[i], s, first, last);
          else
            exchange_adam(kernels, rows[i], s, sources, targets, first, last);
        });
    if (!targets.empty()) end_sending();
  });
}

void cpu_reduce(const std::vector<uintptr_t>& sources, Dtype dtype, float* out, int64_t n, bool accumulate,
                int threads) {
  const Kernels& kernels = *chosen();
  const Deltas at(sources.begin(), sources.end());
  const int64_t count = static_cast<int64_t>(at.size());
  on_ranges(n, threads, [&](int64_t begin, int64_t end) {
    alignas(kLine) float sum[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t size = std::min(kBlock, end - i);
      const auto from = static_cast<uintptr_t>(i * kBytes[dtype]);
      kernels.reduce[dtype](from, at.data(), count, accumulate ? sum : out + i, size, false);
      const int64_t summed = static_cast<int64_t>(reinterpret_cast<uintptr_t>(sum));
      if (accumulate) kernels.reduce[kFloat32](0, &summed, 1, out + i, size, true);
    }
  });
}

void cpu_copy(const void* src, void* dst, int64_t bytes, int threads) {
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  threads = useful_threads(bytes / 4, threads);
  on_ranges(bytes, threads, [&](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
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
