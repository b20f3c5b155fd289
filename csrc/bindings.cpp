// The module pyshard._C: pointers and sizes in, nothing checked. It is private: pyshard/kernels/checks.py is the one
// place where tensors are checked before their addresses come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/runtime.h"
#include "cuda/bindings.h"
#include "table.h"

namespace py = pybind11;

namespace pyshard {
namespace {

static_assert(sizeof(void*) == 8, "addresses travel as 64-bit integers");

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(int code) {
  if (code < 0 || code >= kDtypes)
    throw std::invalid_argument("pyshard._C: dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16)");
  return static_cast<Dtype>(code);
}

void bind_cpu(py::module_& m) {
  m.def("cpu_isas", &cpu_isas, "Instruction sets that can run here, the fastest last.");
  m.def("cpu_isa", &cpu_isa, "The instruction set in use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));

  m.def(
      "cpu_square_sum",
      [](const std::vector<std::tuple<uintptr_t, int64_t, int>>& tensors, int threads) {
        std::vector<Values> values;
        for (const auto& [data, n, dtype] : tensors) values.push_back({pointer<void>(data), n, dtype_of(dtype)});
        py::gil_scoped_release release;
        return cpu_square_sum(values, threads);
      },
      py::arg("tensors"), py::arg("threads"), "Sum of squares of (address, n, dtype code) tensors, in block order.");
  m.def(
      "cpu_cast",
      [](uintptr_t src, int from, uintptr_t dst, int to, int64_t n, int threads) {
        const Dtype source = dtype_of(from), target = dtype_of(to);
        if ((source == kFloat32) == (target == kFloat32))
          throw std::invalid_argument("pyshard._C.cpu_cast: exactly one side must be fp32");
        py::gil_scoped_release release;
        cpu_cast(pointer<void>(src), source, pointer<void>(dst), target, n, threads);
      },
      py::arg("src"), py::arg("src_dtype"), py::arg("dst"), py::arg("dst_dtype"), py::arg("n"), py::arg("threads"));
  m.def(
      "cpu_split",
      [](uintptr_t master, uintptr_t high, uintptr_t low, int64_t n, int threads) {
        py::gil_scoped_release release;
        cpu_split(pointer<float>(master), pointer<uint16_t>(high), pointer<int16_t>(low), n, threads);
      },
      py::arg("master"), py::arg("high"), py::arg("low"), py::arg("n"), py::arg("threads"));
  m.def(
      "cpu_join",
      [](uintptr_t high, uintptr_t low, uintptr_t master, int64_t n, int threads) {
        py::gil_scoped_release release;
        cpu_join(pointer<uint16_t>(high), pointer<int16_t>(low), pointer<float>(master), n, threads);
      },
      py::arg("high"), py::arg("low"), py::arg("master"), py::arg("n"), py::arg("threads"));
  m.def(
      "cpu_adam",
      [](const std::vector<std::vector<int64_t>>& rows, const std::vector<std::vector<double>>& hypers,
         double grad_scale, int threads) {
        std::vector<AdamRow> table;
        for (const auto& r : rows) {
          const auto at = [&](size_t i) { return reinterpret_cast<void*>(static_cast<uintptr_t>(r.at(i))); };
          const auto kind = static_cast<int32_t>(r.at(7));
          const auto hyper = static_cast<int32_t>(r.at(8));
          if (kind < 4 || kind >= kKinds || hyper < 0 || hyper >= static_cast<int32_t>(hypers.size()))
            throw std::invalid_argument("pyshard._C.cpu_adam: kind or hyper index out of range");
          table.push_back({at(0), at(1), at(2), static_cast<float*>(at(3)), static_cast<float*>(at(4)),
                           static_cast<float*>(at(5)), r.at(6), kind, hyper});
        }
        std::vector<AdamScalars> scalars;
        for (const auto& h : hypers)
          scalars.push_back(
              adam_scalars({h.at(0), h.at(1), h.at(2), h.at(3), h.at(4), h.at(5), h.at(6), h.at(7)}, grad_scale));
        py::gil_scoped_release release;
        cpu_adam(table.data(), static_cast<int64_t>(table.size()), scalars.data(), threads);
      },
      py::arg("rows"), py::arg("hypers"), py::arg("grad_scale"), py::arg("threads"),
      "Adam on rows (param, low, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, kind, hyper); hypers are AdamHyper.");
  m.def(
      "cpu_sweep",
      [](const std::vector<uintptr_t>& arrays, int64_t n, int threads) {
        std::vector<float*> pointers;
        for (const uintptr_t array : arrays) pointers.push_back(pointer<float>(array));
        py::gil_scoped_release release;
        cpu_sweep(pointers, n, threads);
      },
      py::arg("arrays"), py::arg("n"), py::arg("threads"),
      "x += 1 over several fp32 arrays of n elements in lock-step: the read-write limit of the machine.");
  m.def(
      "adam_scalars",
      [](const std::vector<double>& h, double grad_scale) {
        const AdamScalars s =
            adam_scalars({h.at(0), h.at(1), h.at(2), h.at(3), h.at(4), h.at(5), h.at(6), h.at(7)}, grad_scale);
        return std::vector<float>{s.grad_scale,      s.weight_decay,   s.decay,
                                  s.one_minus_beta1, s.beta2,          s.one_minus_beta2,
                                  s.step_size,       s.inv_sqrt_bias2, s.eps};
      },
      py::arg("hyper"), py::arg("grad_scale"),
      "The nine fp32 scalars of (lr, beta1, beta2, eps, weight_decay, step, sign, decoupled).");
  m.def("clip_coefficient", &clip_coefficient, py::arg("norm"), py::arg("max_norm"));
}

}  // namespace
}  // namespace pyshard

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of pyshard. Private: addresses are taken on trust.";
  m.attr("build_note") = PYSHARD_BUILD_NOTE;  // what setup.py found of CUDA
  pyshard::bind_cpu(m);
  pyshard::bind_table(m);
  pyshard::bind_cuda(m);
}
