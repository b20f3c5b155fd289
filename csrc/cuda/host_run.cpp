// Runs the kernel bodies on the host, thread after thread and block after block: for tests, which thus execute the
// index arithmetic, vector accesses, tails and look-ups of the GPU code where there is no GPU.
#include "../cpu/float_mode.h"
#include "launch.h"

namespace pyshard {
namespace {

template <auto kBody, class Args>
void run_threads(const Args& args, int64_t begin, int64_t end) {
  DefaultFloatMode mode;  // a GPU keeps subnormals whatever the host does
  for (int64_t block = begin; block < end; ++block)
    for (int thread = 0; thread < kThreads; ++thread) kBody(args, block, thread);
}

// Each phase by all threads before the next: what the barriers of the kernel ensure.
template <class Args>
void run_sums(const Args& args, double* out, int64_t begin, int64_t end) {
  DefaultFloatMode mode;
  for (int64_t block = begin; block < end; ++block) {
    double lanes[kNormLanes];
    for (int thread = 0; thread < kNormThreads; ++thread) fill_lanes(args, block, thread, lanes);
    for (int width = kNormLanes / 2; width > 0; width /= 2)
      for (int thread = 0; thread < kNormThreads; ++thread) halve_lanes(lanes, width, thread);
    out[block] = lanes[0];
  }
}

}  // namespace

template <>
void host_run(const AdamArgs& args, int64_t begin, int64_t end) {
  run_threads<adam_body>(args, begin, end);
}

template <>
void host_run(const SquareSumArgs& args, int64_t begin, int64_t end) {
  run_sums(args, args.partials, begin, end);
}

template <>
void host_run(const SumArgs& args, int64_t begin, int64_t end) {
  run_sums(args, args.out, begin, end);
}

template <>
void host_run(const PrepareArgs& args, int64_t begin, int64_t end) {
  run_threads<prepare_body>(args, begin, end);
}

template <>
void host_run(const CastArgs& args, int64_t begin, int64_t end) {
  run_threads<cast_body>(args, begin, end);
}

template <>
void host_run(const SplitArgs& args, int64_t begin, int64_t end) {
  run_threads<split_body>(args, begin, end);
}

template <>
void host_run(const JoinArgs& args, int64_t begin, int64_t end) {
  run_threads<join_body>(args, begin, end);
}

}  // namespace pyshard
