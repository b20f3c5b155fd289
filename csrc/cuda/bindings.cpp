// Each kernel under two names with the same arguments: cuda_NAME(..., device, stream) enqueues it on a GPU,
// host_NAME(..., block_begin, block_end) runs blocks of it on the host. Addresses are taken on trust.
#include "bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace pyshard {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `make` turns what Python passes into the arguments of the kernel.
template <class Args, class... Parts>
void bind(py::module_& m, const std::string& name, const char* doc, Args (*make)(Parts...)) {
  m.def(("host_" + name).c_str(),
        [make](Parts... parts, int64_t begin, int64_t end) {
          const Args args = make(parts...);
          if (begin < 0 || end > args.blocks())
            throw std::invalid_argument("pyshard._C: blocks " + std::to_string(begin) + " to " + std::to_string(end) +
                                        " of a grid of " + std::to_string(args.blocks()));
          py::gil_scoped_release release;
          host_run(args, begin, end);
        },
        doc);
  m.def(("grid_" + name).c_str(), [make](Parts... parts) { return make(parts...).blocks(); },
        "How many blocks a launch with these arguments has.");
#if defined(PYSHARD_CUDA)
  m.def(("cuda_" + name).c_str(),
        [make](Parts... parts, int device, uintptr_t stream) {
          const Args args = make(parts...);
          py::gil_scoped_release release;
          launch(args, device, stream);
        },
        doc);
#endif
}

Dtype dtype_of(int code) {
  if (code < 0 || code >= kDtypes) throw std::invalid_argument("pyshard._C: dtype code must be 0, 1 or 2");
  return static_cast<Dtype>(code);
}

AdamArgs adam(uintptr_t rows, uintptr_t first_block, int64_t n_rows, int64_t n_blocks, uintptr_t scalars,
              uintptr_t control) {
  return {pointer<AdamRow>(rows),        pointer<int64_t>(first_block), n_rows, n_blocks,
          pointer<AdamScalars>(scalars), pointer<double>(control)};
}

SquareSumArgs square_sum(uintptr_t rows, uintptr_t first_block, int64_t n_rows, uintptr_t partials, int64_t n_blocks) {
  return {pointer<AdamRow>(rows), pointer<int64_t>(first_block), n_rows, pointer<double>(partials), n_blocks};
}

SumArgs sum(uintptr_t values, int64_t n, uintptr_t out) { return {pointer<double>(values), n, pointer<double>(out)}; }

PrepareArgs prepare(uintptr_t hypers, uintptr_t step_addresses, uintptr_t control, uintptr_t scalars, int64_t n) {
  return {pointer<AdamHyper>(hypers), pointer<int64_t>(step_addresses), pointer<double>(control),
          pointer<AdamScalars>(scalars), n};
}

CastArgs cast(uintptr_t src, int from, uintptr_t dst, int to, int64_t n) {
  const CastArgs args{pointer<void>(src), pointer<void>(dst), dtype_of(from), dtype_of(to), n};
  if ((args.from == kFloat32) == (args.to == kFloat32))
    throw std::invalid_argument("pyshard._C: a cast is from or to fp32, not both");
  return args;
}

SplitArgs split(uintptr_t master, uintptr_t high, uintptr_t low, int64_t n) {
  return {pointer<float>(master), pointer<uint16_t>(high), pointer<int16_t>(low), n};
}

JoinArgs join(uintptr_t high, uintptr_t low, uintptr_t master, int64_t n) {
  return {pointer<uint16_t>(high), pointer<int16_t>(low), pointer<float>(master), n};
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind(m, "adam", "rows, first_block, n_rows, n_blocks, scalars, control", adam);
  bind(m, "square_sum", "rows, first_block, n_rows, partials, n_blocks", square_sum);
  bind(m, "sum", "values, n, out", sum);
  bind(m, "prepare", "hypers, step_addresses (0: none), control, scalars, n", prepare);
  bind(m, "cast", "src, src dtype code, dst, dst dtype code, n", cast);
  bind(m, "split", "master, high, low, n", split);
  bind(m, "join", "high, low, master, n", join);
#if defined(PYSHARD_CUDA)
  m.def("cuda_built", [] { return true; });
  m.def("cuda_refusal", &launch_refusal, "Why no kernel can run on the device; empty if one can.");
#else
  m.def("cuda_built", [] { return false; });
#endif
}

}  // namespace pyshard
