// What a torch tensor is made of, read in one call: DLPack's C exchange API, which torch.Tensor carries as
// __dlpack_c_exchange_api__. A call takes 40 ns; through Python each single attribute takes that much or twice.
// The structs are DLPack's own, version 1 (https://github.com/dmlc/dlpack, dlpack.h). No torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pyshard {

// DLTensor. Valid while the tensor is; shape and strides are in elements.
struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;  // of the dtype
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // Bytes from the first element to the last; 0 for an empty tensor.
  uintptr_t extent() const {
    int64_t last = 0;
    for (int32_t i = 0; i < ndim; ++i) {
      if (shape[i] == 0) return 0;
      last += (shape[i] - 1) * strides[i];
    }
    return static_cast<uintptr_t>(last + 1) * (bits / 8);
  }
};

namespace detail {

struct DLPackExchangeApi {
  uint32_t major, minor;
  const DLPackExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*view)(void* object, TensorView* out);  // 0, or -1 with a Python exception set
  void* stream;
};

inline const DLPackExchangeApi& exchange_api() {
  static const DLPackExchangeApi* const found = [] {
    namespace py = pybind11;
    const py::object type = py::module_::import("torch").attr("Tensor");
    const DLPackExchangeApi* api = nullptr;
    if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
      const py::object capsule = type.attr("__dlpack_c_exchange_api__");
      api = static_cast<const DLPackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (api == nullptr) throw py::error_already_set();
    }
    while (api != nullptr && api->major > 1) api = api->previous;
    if (api == nullptr || api->view == nullptr)
      throw py::import_error(
          "pyshard: this torch does not offer DLPack's C exchange API, version 1 "
          "(torch.Tensor.__dlpack_c_exchange_api__)"
          "; expected torch 2.11 or newer. Update torch.");
    return api;
  }();
  return *found;
}

}  // namespace detail

// The view of a torch.Tensor; raises what torch raises for a tensor without plain memory (sparse, meta).
inline TensorView view_of(PyObject* tensor) {
  TensorView view;
  if (detail::exchange_api().view(tensor, &view) != 0) throw pybind11::error_already_set();
  return view;
}

}  // namespace pyshard
