// AdamTable: the rows of a step, and what they were made from.
//
// Python checks every tensor once, when a row is added. At each later step refresh() answers one question: does all
// that was checked still hold? It compares the parameters, the state dictionaries and every tensor's dtype, device,
// shape, strides and address with what it knows, and takes over new gradients of the same kind. Anything else makes it
// answer no, and Python checks again from the start. It walks Python objects in C++ because 2,000 small tensors would
// otherwise cost more time in attribute look-ups than in arithmetic (0.5 us a tensor here, against several in Python).
//
// The table owns no tensor: gradients die when zero_grad() drops them and state when the user moves it away. Parameters
// are kept by the Launch that has the table.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <deque>
#include <utility>
#include <vector>

#include "adam.h"
#include "cpu/runtime.h"
#include "tensor_view.h"

namespace pyshard {

namespace py = pybind11;

class AdamTable {
 public:
  // Adds a parameter that has state. `keys` name the items of its state that a step uses, in this order: step count,
  // remainder or master, exp_avg, exp_avg_sq, max_exp_avg_sq; None for one that it does not have. `kind` is AdamRow's
  // (-1 for fp64). The buffers are None, or what Python copies the parameter and its gradient into before each step.
  void add(const py::object& param, const py::dict& state, const py::tuple& keys, int32_t kind, bool grad_is_fp32,
           int64_t group, bool is_dtensor, const py::object& param_buffer, const py::object& grad_buffer);
  // Adds a parameter that has had no gradient yet.
  void add_idle(const py::object& param) { idle_.push_back(param.ptr()); }
  // Remembers the groups and the state as they are now.
  void seal(const py::list& param_groups, const py::dict& state);
  // True if everything still holds; afterwards the rows point to the current gradients.
  bool refresh(const py::list& param_groups, const py::dict& state);

  py::list active() const;   // indices (in order of add) of the entries that have a gradient
  py::list changed() const;  // the tensors that a step writes for autograd to know: parameters, and their local shards
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
  int64_t packed_size() const { return 11 * count() + 2 + 8 * hypers_count(); }
  int64_t blocks(int64_t size) const;  // blocks of `size` elements in the active rows
  std::vector<int32_t> kinds() const;  // of the active rows that have elements, sorted
  bool aligned() const;                // every address of the active rows is a multiple of 16

  double square_sum(int threads) const;
  // Its parts before they are added up: the bytes of one double per block of kNormBlock elements of each active row, in
  // row order. sum_blocks() adds them up, also those of several tables or ranks. `sources` as in adam().
  py::bytes block_sums(int threads, const Deltas& sources) const;
  // One step on the CPU: adds 1 to the step counts of the active rows and updates them. prepare() comes first.
  // A row's gradient is the fp32 sum, in the order of the list, of the arrays that lie `sources` bytes from its own (0 is
  // itself); its new parameter is also written `targets` bytes from its own. Nothing that is written may overlap anything
  // else; neither is looked at here.
  void adam(double grad_scale, int threads, const Deltas& sources, const Deltas& targets);
  void count_step();  // the step counts alone

 private:
  struct Layout {
    std::vector<int64_t> shape, strides;  // no strides: any
  };
  // What a tensor must go on being. Compact, and with layouts that many tensors share: after a step over more memory
  // than the caches hold, each line that is touched here has to come from memory.
  struct Known {
    uintptr_t address;
    const Layout* layout;
    int32_t device_type, device_id;
    uint8_t code, bits;
  };
  struct Held {
    PyObject* key;     // interned, never freed
    PyObject* object;  // the tensor it was, for comparison only: it may be gone
    Known known;
  };
  struct Entry {
    PyObject* param;      // borrowed: the Launch keeps it
    Py_ssize_t position;  // in the optimizer's state
    AdamRow row;
    float* step;
    int64_t group;
    bool is_dtensor, copied, active;
    Known weight, grad;  // of a copied entry: not the buffers, but what they are filled from
    std::array<Held, 5> held;
    size_t held_count;
    py::object placements;         // of a DTensor's gradient
    py::object spec;               // its last one, which has these placements
    std::vector<uintptr_t> lines;  // memory that a look at it touches, but for the gradient's: only prefetched
  };

  Known known(const TensorView& view, bool with_strides = true);
  static bool same(const TensorView& view, const Known& known);
  static void find_lines(Entry& entry, PyObject* state);
  bool same_groups(const py::list& param_groups) const;
  bool unchanged(const Entry& entry, PyObject* state) const;
  bool take_grad(Entry& entry, const py::object& grad, bool sealed);
  void add_output(const TensorView& view);
  bool overlaps_output(const TensorView& view) const;
  void collect();
  std::vector<Values> grads() const;  // of the active rows
  void check_sources(const char* function, const Deltas& sources) const;

  std::deque<Layout> layouts_;  // all different
  std::vector<Entry> entries_;
  std::vector<size_t> by_position_;  // entries in the order of the optimizer's state
  std::vector<PyObject*> idle_;      // borrowed
  std::vector<AdamRow> rows_;        // of the active entries, as kernels read them
  std::vector<size_t> active_;       // their entries
  std::vector<AdamHyper> hypers_;
  std::vector<std::pair<uintptr_t, uintptr_t>> outputs_;  // sorted ranges that a step writes
  std::vector<std::vector<PyObject*>> groups_;            // borrowed parameters of each group
};

void bind_table(py::module_& m);

}  // namespace pyshard
