// AdamTable: the rows of a step, and what they were made from.
//
// Python checks every tensor once, when a row is added. At each later step refresh() answers one question: does all
// that was checked still hold? It compares the parameters, the state dictionaries and the addresses with what it
// knows, and takes over new gradients that are of the same kind. Anything else makes it answer no, and Python checks
// again from the start. It walks Python objects in C++ because 2,000 small tensors would otherwise cost more time in
// attribute look-ups than in arithmetic (0.2 us a tensor here against 0.9 us in Python).
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "adam.h"

namespace pyshard {

namespace py = pybind11;

class AdamTable {
 public:
  // Adds a parameter that has state. `held` are the (key, tensor) pairs of its state dictionary whose addresses are in
  // the row; `row` is (param, low, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, kind, step address).
  // `grad` is None for a parameter without one at the moment. `dtype` is the gradient's, `stride` None for contiguous
  // tensors and else what the gradient's stride() must be. `copied` marks an entry whose parameter and gradient
  // Python copies into the row's buffers before each step.
  void add(py::object param, py::dict state, py::list held, py::tuple row, py::object grad, py::object dtype,
           py::object stride, int64_t group, bool is_dtensor, bool copied);
  // Adds a parameter that has had no gradient yet.
  void add_idle(py::object param);
  // Remembers the groups and the state as they are now.
  void seal(py::list param_groups, py::dict state);
  // True if everything still holds; afterwards the rows point to the current gradients.
  bool refresh(py::list param_groups, py::dict state);

  py::list active() const;  // indices (in order of add) of the entries that have a gradient
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  int64_t hypers_count() const { return static_cast<int64_t>(hypers_.size()); }

  // Makes one AdamHyper per distinct (group, step count) and gives each active row its index. `groups` holds
  // (lr, beta1, beta2, eps, weight_decay, sign, decoupled) per group. With per_row the steps are not read (they live
  // on a device) and every row gets its own AdamHyper.
  void prepare(const std::vector<std::vector<double>>& groups, bool per_row);
  // For a launch on a device: all that its kernels read, as 64-bit words at `words` (packed_size() of them):
  // rows [n, 8], the first Adam block of each row and the end [n + 1], likewise norm blocks [n + 1], the addresses of
  // the step counts [n], AdamHyper [k, 8]. prepare() comes first.
  void pack(uintptr_t words, int64_t adam_block, int64_t norm_block) const;
  int64_t packed_size() const { return 19 * count() + 2 + 8 * hypers_count(); }
  std::vector<int32_t> kinds() const;  // of the active rows that have elements, sorted
  bool aligned() const;                // every address of the active rows is a multiple of 16

  double square_sum(int threads) const;
  // One step on the CPU: adds 1 to the step counts of the active rows and updates them. prepare() comes first.
  void adam(double grad_scale, int threads);
  void count_step();  // the step counts alone

 private:
  struct Held {
    PyObject* key;
    py::object tensor;
    uintptr_t address;
  };
  struct Entry {
    py::object param, state, grad, dtype, stride;
    std::vector<Held> held;
    AdamRow row;
    float* step;
    int64_t group;
    bool is_dtensor, copied;
  };

  bool unchanged(const Entry& entry) const;
  bool accept(Entry& entry, PyObject* grad);
  bool overlaps_output(uintptr_t begin, uintptr_t end) const;
  void collect();

  std::vector<Entry> entries_;
  std::vector<py::object> idle_;
  std::vector<AdamRow> rows_;   // of the active entries, as kernels read them
  std::vector<size_t> active_;  // their entries
  std::vector<AdamHyper> hypers_;
  std::vector<std::pair<uintptr_t, uintptr_t>> outputs_;               // sorted ranges that a step writes
  std::vector<std::pair<py::object, std::vector<PyObject*>>> groups_;  // (params list, its items) at the time of seal
  std::vector<std::pair<py::object, py::object>> states_;
  py::object state_;
};

void bind_table(py::module_& m);

}  // namespace pyshard
