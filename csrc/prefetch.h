// The memory that looking at a torch.Tensor touches, to ask for it before it is needed.
//
// After a training step over more memory than the caches hold, each line of a tensor's objects comes from memory. The
// addresses here are guesses from the layout that torch's objects have had so far: they are never read, only asked for,
// so that a wrong one costs time and nothing else. What is read to find them lies inside of living objects.
#pragma once

#include "tensor_view.h"

namespace pyshard {

struct TensorLines {
  static constexpr int kLine = 64;

  static void ask(const char* address) { __builtin_prefetch(address); }

  // The TensorImpl behind a tensor's Python object; null if the layout is another one.
  static const char* impl(PyObject* tensor) {
    const int offset = offset_of_impl();
    return offset < 0 ? nullptr : *reinterpret_cast<const char**>(reinterpret_cast<char*>(tensor) + offset);
  }

  static uintptr_t line_of(const char* address) { return reinterpret_cast<uintptr_t>(address) & ~uintptr_t{kLine - 1}; }

  // Calls `line` with an address in each line: of the Python object and, with `memory`, of sizes, strides and flags, and
  // where its storage keeps its address. A parameter also has what autograd keeps of it, where its gradient hangs.
  template <class F>
  static void each(PyObject* tensor, bool memory, bool is_param, const F& line) {
    const auto* object = reinterpret_cast<const char*>(tensor);
    line(object);
    line(object + kField);
    const char* own = impl(tensor);
    if (own == nullptr) return;
    if (is_param) {
      line(own + kAutograd);
      line(field(own, kAutograd));
      line(field(own, kAutograd) + kLine);
    }
    if (!memory) return;
    for (int i = 0; i < 4; ++i) line(own + (i < 3 ? i * kLine : kImpl));
    line(field(own, kStorage));
    line(field(own, kStorage) + kField);
  }

  static void ask_impl(PyObject* tensor) {
    const char* own = impl(tensor);
    for (int i = 0; own != nullptr && i < 3; ++i) ask(own + i * kLine);
  }

  static void ask_storage(PyObject* tensor) {
    if (const char* own = impl(tensor)) ask(field(own, kStorage));
  }

  // What autograd counts the versions of a tensor in.
  static void ask_version(PyObject* tensor) {
    if (const char* own = impl(tensor)) ask(field(own, kVersion));
  }

 private:
  static constexpr int kStorage = 16, kAutograd = 24, kVersion = 40;  // in a TensorImpl
  static constexpr int kImpl = 184;                                   // the last of its bytes that are looked at
  static constexpr int kField = 24;                                   // likewise of a Python object, and of a storage

  static const char* field(const char* own, int offset) { return *reinterpret_cast<const char* const*>(own + offset); }

  // Small sizes are kept inside of the TensorImpl, which tells where it is.
  static int offset_of_impl() {
    static const int found = [] {
      const pybind11::object tensor = pybind11::module_::import("torch").attr("empty")(1);
      const auto* sizes = reinterpret_cast<const char*>(view_of(tensor.ptr()).shape);
      for (const int offset : {16, 24}) {
        const auto* own = *reinterpret_cast<const char**>(reinterpret_cast<char*>(tensor.ptr()) + offset);
        if (own != nullptr && sizes > own + kVersion && sizes < own + 2 * kLine) return offset;
      }
      return -1;
    }();
    return found;
  }
};

}  // namespace pyshard
