// The module pyshard._C: pointers and sizes in, nothing checked. It is private: pyshard/kernels/checks.py is the one
// place where tensors are checked before their addresses come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <system_error>

#include "comm/bindings.h"
#include "cpu/crc32.h"
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
    throw std::invalid_argument("pyshard._C: dtype code must be 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                std::to_string(code));
  return static_cast<Dtype>(code);
}

int64_t size_of(int64_t n) {
  if (n < 0) throw std::invalid_argument("pyshard._C: a size must be at least 0, got " + std::to_string(n));
  return n;
}

AdamHyper hyper_of(const std::vector<double>& h) {
  if (h.size() != 8)
    throw std::invalid_argument(
        "pyshard._C: a hyper must be (lr, beta1, beta2, eps, weight_decay, step, sign, decoupled), got " +
        std::to_string(h.size()) + " numbers");
  return {h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]};
}

AdamRow row_of(const std::vector<int64_t>& r, size_t hypers) {
  if (r.size() != 9)
    throw std::invalid_argument("pyshard._C.cpu_adam: a row must have 9 numbers, got " + std::to_string(r.size()));
  const int64_t kind = r[7], hyper = r[8];
  if (kind < 4 || kind >= kKinds || hyper < 0 || hyper >= static_cast<int64_t>(hypers))
    throw std::invalid_argument("pyshard._C.cpu_adam: kind " + std::to_string(kind) + " or hyper index " +
                                std::to_string(hyper) + " out of range");
  const int64_t format = kind >> 3;
  const bool needs[] = {true, format >= kBf16Split && format <= kFp16Master, true, true, true, (kind & 1) != 0};
  for (size_t i = 0; i < 6; ++i)
    if (needs[i] && r[i] == 0 && r[6] > 0)
      throw std::invalid_argument("pyshard._C.cpu_adam: address " + std::to_string(i) + " of a row of kind " +
                                  std::to_string(kind) + " is null");
  const auto at = [&](size_t i) { return pointer<void>(static_cast<uintptr_t>(r[i])); };
  return {at(0),
          at(1),
          at(2),
          static_cast<float*>(at(3)),
          static_cast<float*>(at(4)),
          static_cast<float*>(at(5)),
          size_of(r[6]),
          static_cast<int32_t>(kind),
          static_cast<int32_t>(hyper)};
}

void bind_cpu(py::module_& m) {
  m.def("cpu_isas", &cpu_isas, "Instruction sets that can run here, the fastest last.");
  m.def("cpu_isa", &cpu_isa, "The instruction set in use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));

  m.def(
      "cpu_square_sum",
      [](const std::vector<std::tuple<uintptr_t, int64_t, int>>& tensors, int threads) {
        std::vector<Values> values;
        for (const auto& [data, n, dtype] : tensors)
          values.push_back({pointer<void>(data), size_of(n), dtype_of(dtype)});
        py::gil_scoped_release release;
        return cpu_sum_blocks(cpu_block_sums(values, {0}, threads));
      },
      py::arg("tensors"), py::arg("threads"), "Sum of squares of (address, n, dtype code) tensors, in block order.");
  m.def(
      "sum_blocks",
      [](const py::bytes& sums) {
        const std::string_view bytes = sums;
        if (bytes.size() % sizeof(double) != 0)
          throw std::invalid_argument("pyshard._C.sum_blocks: got " + std::to_string(bytes.size()) +
                                      " bytes, expected a multiple of the 8 of a double");
        std::vector<double> values(bytes.size() / sizeof(double));
        if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
        return cpu_sum_blocks(std::move(values));
      },
      py::arg("sums"), "Total of AdamTable.block_sums(), of one table or of several in a row; 0.0 of none.");
  m.def(
      "cpu_reduce",
      [](const std::vector<uintptr_t>& sources, int dtype, uintptr_t out, int64_t n, bool accumulate, int threads) {
        const Dtype from = dtype_of(dtype);
        const int64_t size = size_of(n);
        if (sources.empty())
          throw std::invalid_argument("pyshard._C.cpu_reduce: no sources; expected the address of at least one");
        for (size_t i = 0; i < sources.size() && size > 0; ++i)
          if (sources[i] == 0)
            throw std::invalid_argument("pyshard._C.cpu_reduce: address " + std::to_string(i) + " of " +
                                        std::to_string(sources.size()) + " sources is null");
        if (out == 0 && size > 0) throw std::invalid_argument("pyshard._C.cpu_reduce: the address of out is null");
        py::gil_scoped_release release;
        cpu_reduce(sources, from, pointer<float>(out), size, accumulate, threads);
      },
      py::arg("sources"), py::arg("dtype"), py::arg("out"), py::arg("n"), py::arg("accumulate"), py::arg("threads"),
      "out = s0 + s1 + ... in fp32, in list order, each sum rounded; with accumulate out + that. out overlaps no "
      "source.");
  m.def(
      "cpu_copy",
      [](uintptr_t src, uintptr_t dst, int64_t bytes, int threads) {
        cpu_copy(pointer<void>(src), pointer<void>(dst), size_of(bytes), threads);
      },
      py::arg("src"), py::arg("dst"), py::arg("bytes"), py::arg("threads"));
  m.attr("crc32_kind") = crc32_kind();
  m.def(
      "crc32",
      [](const py::buffer& data, uint32_t value, const std::optional<std::string>& kind) {
        const py::buffer_info info = data.request();
        for (ssize_t d = info.ndim - 1, step = info.itemsize; d >= 0; step *= info.shape[d--])
          if (info.size > 0 && info.shape[d] > 1 && info.strides[d] != step)
            throw std::invalid_argument("pyshard._C.crc32: the buffer is not contiguous");
        const size_t n = static_cast<size_t>(info.size * info.itemsize);
        py::gil_scoped_release release;
        return kind ? crc32_by(kind->c_str(), info.ptr, n, value) : crc32(info.ptr, n, value);
      },
      py::arg("data"), py::arg("value") = 0, py::arg("kind") = py::none(),
      "zlib.crc32 of a contiguous buffer, by the fastest kind this machine has, or by \"vpclmul\", \"pclmul\", "
      "\"table\".");
  m.def(
      "crc32_of_file",
      [](int file, int64_t begin, int64_t end) {
        try {
          py::gil_scoped_release release;
          return crc32_of_file(file, begin, end);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrno(PyExc_OSError);
          throw py::error_already_set();
        }
      },
      py::arg("file"), py::arg("begin"), py::arg("end"),
      "The checksum of the bytes [begin, end) of an open file. RuntimeError if it is shorter.");
  m.def(
      "cpu_cast",
      [](uintptr_t src, int from, uintptr_t dst, int to, int64_t n, int threads) {
        const Dtype source = dtype_of(from), target = dtype_of(to);
        if ((source == kFloat32) == (target == kFloat32))
          throw std::invalid_argument("pyshard._C.cpu_cast: exactly one side must be fp32");
        const int64_t size = size_of(n);
        py::gil_scoped_release release;
        cpu_cast(pointer<void>(src), source, pointer<void>(dst), target, size, threads);
      },
      py::arg("src"), py::arg("src_dtype"), py::arg("dst"), py::arg("dst_dtype"), py::arg("n"), py::arg("threads"));
  m.def(
      "cpu_split",
      [](uintptr_t master, uintptr_t high, uintptr_t low, int64_t n, int threads) {
        const int64_t size = size_of(n);
        py::gil_scoped_release release;
        cpu_split(pointer<float>(master), pointer<uint16_t>(high), pointer<int16_t>(low), size, threads);
      },
      py::arg("master"), py::arg("high"), py::arg("low"), py::arg("n"), py::arg("threads"));
  m.def(
      "cpu_join",
      [](uintptr_t high, uintptr_t low, uintptr_t master, int64_t n, int threads) {
        const int64_t size = size_of(n);
        py::gil_scoped_release release;
        cpu_join(pointer<uint16_t>(high), pointer<int16_t>(low), pointer<float>(master), size, threads);
      },
      py::arg("high"), py::arg("low"), py::arg("master"), py::arg("n"), py::arg("threads"));
  m.def(
      "cpu_adam",
      [](const std::vector<std::vector<int64_t>>& rows, const std::vector<std::vector<double>>& hypers,
         double grad_scale, int threads) {
        std::vector<AdamRow> table;
        for (const auto& row : rows) table.push_back(row_of(row, hypers.size()));
        std::vector<AdamScalars> scalars;
        for (const auto& hyper : hypers) scalars.push_back(adam_scalars(hyper_of(hyper), grad_scale));
        py::gil_scoped_release release;
        cpu_adam(table.data(), static_cast<int64_t>(table.size()), scalars.data(), {0}, {}, threads);
      },
      py::arg("rows"), py::arg("hypers"), py::arg("grad_scale"), py::arg("threads"),
      "Adam on rows (param, low, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, kind, hyper); hypers are AdamHyper.");
  m.def(
      "cpu_sweep",
      [](const std::vector<uintptr_t>& arrays, int64_t n, int threads) {
        std::vector<float*> pointers;
        for (const uintptr_t array : arrays) pointers.push_back(pointer<float>(array));
        const int64_t size = size_of(n);
        py::gil_scoped_release release;
        cpu_sweep(pointers, size, threads);
      },
      py::arg("arrays"), py::arg("n"), py::arg("threads"),
      "x += 1 over several fp32 arrays of n elements in lock-step: the read-write limit of the machine.");
  m.def(
      "adam_scalars",
      [](const std::vector<double>& h, double grad_scale) {
        const AdamScalars s = adam_scalars(hyper_of(h), grad_scale);
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
  pyshard::bind_comm(m);
}
