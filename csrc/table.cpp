// AdamTable. Everything here runs with the GIL held, except the kernels themselves.
#include "table.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

namespace pyshard {
namespace {

constexpr std::ptrdiff_t kAhead = 8;  // entries between asking for their memory and looking at it

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Names of the attributes that are read, made once.
struct Names {
  PyObject* grad = interned("grad");
  PyObject* local = interned("_local_tensor");
  PyObject* placements = interned("placements");
  PyObject* wait = interned("wait");
  PyObject* is_neg = interned("is_neg");
  PyObject* params = interned("params");
};

const Names& names() {
  static const Names all;
  return all;
}

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// The tensor whose memory is meant: of a DTensor its local shard, waited for if a collective is still filling it.
py::object local(PyObject* tensor, bool is_dtensor) {
  if (!is_dtensor) return py::reinterpret_borrow<py::object>(tensor);
  py::object shard = attribute(tensor, names().local);
  if (PyObject_HasAttr(shard.ptr(), names().wait)) shard = attribute(shard.ptr(), names().wait)();
  return shard;
}

void check_deltas(const char* what, const Deltas& deltas, int64_t element_size) {
  for (const int64_t delta : deltas)
    if (delta % element_size != 0)
      throw std::invalid_argument(std::string("pyshard._C.AdamTable.") + what + ": got a distance of " +
                                  std::to_string(delta) + " bytes, expected multiples of an element's " +
                                  std::to_string(element_size));
}

}  // namespace

AdamTable::Known AdamTable::known(const TensorView& view, PyObject* tensor, bool with_strides) {
  Layout layout;
  layout.shape.assign(view.shape, view.shape + view.ndim);
  if (with_strides) layout.strides.assign(view.strides, view.strides + view.ndim);
  auto found = std::find_if(layouts_.begin(), layouts_.end(), [&](const Layout& other) {
    return other.shape == layout.shape && other.strides == layout.strides;
  });
  if (found == layouts_.end()) found = layouts_.insert(found, std::move(layout));
  return {view.address(), &*found, view.device_type, view.device_id, view.code, view.bits, tensor, view.shape};
}

// Equal in all but the address. Strides count only where a step along them is possible.
bool AdamTable::same(const TensorView& view, const Known& known) {
  if (view.device_type != known.device_type || view.device_id != known.device_id) return false;
  const Layout& layout = *known.layout;
  if (view.code != known.code || view.bits != known.bits || view.ndim != static_cast<int32_t>(layout.shape.size()))
    return false;
  const bool strided = !layout.strides.empty() && view.numel() > 0;
  for (int32_t i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != layout.shape[i]) return false;
    if (strided && view.shape[i] > 1 && view.strides[i] != layout.strides[i]) return false;
  }
  return true;
}

void AdamTable::add(const py::object& param, const py::dict& state, const py::tuple& keys, int32_t kind,
                    bool grad_is_fp32, int64_t group, bool is_dtensor, const py::object& param_buffer,
                    const py::object& grad_buffer) {
  if (kind != -1 && (kind < 4 || kind >= kKinds))
    throw std::invalid_argument("pyshard._C.AdamTable.add: kind " + std::to_string(kind) + " is none of a row");
  const int32_t format = kind >> 3;  // of fp64, which has kind -1: none with a low
  const bool needs[] = {true, format >= kBf16Split && format <= kFp16Master, true, true, kind >= 0 && (kind & 1) != 0};
  if (keys.size() != std::size(needs))
    throw std::invalid_argument(
        "pyshard._C.AdamTable.add: expected 5 keys: step, low, exp_avg, exp_avg_sq, max_exp_avg_sq");
  for (size_t i = 0; i < std::size(needs); ++i)
    if (needs[i] && keys[i].is_none())
      throw std::invalid_argument("pyshard._C.AdamTable.add: key " + std::to_string(i) + " of kind " +
                                  std::to_string(kind) + " is None");
  Entry entry{};
  std::vector<uintptr_t> pointers;  // in the order of keys
  for (const auto& item : keys) {
    pointers.push_back(0);
    if (item.is_none()) continue;
    PyObject* key = item.ptr();
    Py_INCREF(key);
    PyUnicode_InternInPlace(&key);  // kept for the life of the process: there are six such keys
    const py::object tensor = state[item];
    const py::object shard = local(tensor.ptr(), is_dtensor && PyObject_HasAttr(tensor.ptr(), names().local));
    const TensorView view = view_of(shard.ptr());
    pointers.back() = view.address();
    entry.held.at(entry.held_count++) = {key, tensor.ptr(), known(view, tensor.ptr())};
    add_output(view);
  }
  const py::object shard = local(param.ptr(), is_dtensor);
  const TensorView weight = view_of(shard.ptr());
  add_output(weight);
  entry.param = param.ptr();
  entry.weight = known(weight, shard.ptr());
  entry.copied = !param_buffer.is_none();
  if (entry.copied) {
    entry.grad = known(view_of(grad_buffer.ptr()), grad_buffer.ptr(), false);
  } else {
    entry.grad = entry.weight;
    if (grad_is_fp32) entry.grad.bits = 32, entry.grad.code = 2;  // kDLFloat
  }
  if (is_dtensor) entry.placements = attribute(param.ptr(), names().placements);
  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  entry.row = {pointer(entry.copied ? view_of(param_buffer.ptr()).address() : weight.address()),
               pointer(pointers.at(1)),
               entry.copied ? pointer(view_of(grad_buffer.ptr()).address()) : nullptr,
               static_cast<float*>(pointer(pointers.at(2))),
               static_cast<float*>(pointer(pointers.at(3))),
               static_cast<float*>(pointer(pointers.at(4))),
               weight.numel(),
               kind,
               0};
  entry.step = static_cast<float*>(pointer(pointers.at(0)));
  entry.group = group;
  entry.is_dtensor = is_dtensor;
  entries_.push_back(std::move(entry));
}

void AdamTable::add_output(const TensorView& view) {
  const uintptr_t size = view.extent();
  if (size > 0) outputs_.emplace_back(view.address(), view.address() + size);
}

bool AdamTable::overlaps_output(const TensorView& view) const {
  const uintptr_t begin = view.address(), end = begin + view.extent();
  const auto after = std::lower_bound(outputs_.begin(), outputs_.end(), std::make_pair(begin, uintptr_t{0}));
  if (after != outputs_.end() && after->first < end) return true;
  return after != outputs_.begin() && std::prev(after)->second > begin;
}

void AdamTable::seal(const py::list& param_groups, const py::dict& state) {
  std::sort(outputs_.begin(), outputs_.end());
  std::vector<std::pair<uintptr_t, uintptr_t>> apart;  // interleaved views become one range
  for (const auto& range : outputs_) {
    if (!apart.empty() && range.first < apart.back().second)
      apart.back().second = std::max(apart.back().second, range.second);
    else
      apart.push_back(range);
  }
  outputs_.swap(apart);
  for (const auto& group : param_groups) {
    groups_.emplace_back();
    for (const auto& param : group[py::reinterpret_borrow<py::object>(names().params)].cast<py::list>())
      groups_.back().push_back(param.ptr());
  }
  std::map<PyObject*, Py_ssize_t> positions;
  for (const auto& item : state) positions.emplace(item.first.ptr(), positions.size());
  std::map<Py_ssize_t, size_t> order;
  for (size_t i = 0; i < entries_.size(); ++i) {
    entries_[i].position = positions.at(entries_[i].param);
    order.emplace(entries_[i].position, i);
    if (!take_grad(entries_[i], false)) throw std::runtime_error("pyshard: a gradient changed while it was checked");
  }
  for (const auto& item : order) by_position_.push_back(item.second);
  collect();
}

bool AdamTable::same_groups(const py::list& param_groups) const {
  if (param_groups.size() != groups_.size()) return false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), i);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItemWithError(group, names().params) : nullptr;
    if (params == nullptr || !PyList_Check(params)) return false;
    if (PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(groups_[i].size())) return false;
    for (size_t j = 0; j < groups_[i].size(); ++j)
      if (PyList_GET_ITEM(params, j) != groups_[i][j]) return false;
  }
  return true;
}

bool AdamTable::unchanged(const Entry& entry, PyObject* state) const {
  const py::object shard = local(entry.param, entry.is_dtensor);
  const TensorView weight = view_of(shard.ptr());
  if (weight.address() != entry.weight.address || !same(weight, entry.weight)) return false;
  for (size_t i = 0; i < entry.held_count; ++i) {
    const Held& held = entry.held[i];
    PyObject* value = PyDict_GetItemWithError(state, held.key);  // borrowed
    if (value == nullptr || value != held.object) return false;  // another tensor: Python looks at it
    const py::object tensor = local(value, entry.is_dtensor && PyObject_HasAttr(value, names().local));
    const TensorView view = view_of(tensor.ptr());
    if (view.address() != held.known.address || !same(view, held.known)) return false;
  }
  return true;
}

bool AdamTable::take_grad(Entry& entry, bool sealed) {
  const py::object grad = attribute(entry.param, names().grad);
  entry.active = !grad.is_none();
  if (!entry.active) return true;
  if (entry.is_dtensor && !entry.copied && !attribute(grad.ptr(), names().placements).equal(entry.placements))
    return false;
  const py::object shard = local(grad.ptr(), entry.is_dtensor);
  const TensorView view = view_of(shard.ptr());
  const auto address = reinterpret_cast<const void*>(view.address());
  if (view.code != entry.grad.code || view.bits != entry.grad.bits || (address == nullptr && view.numel() > 0))
    return false;
  // Before the table is sealed, Python has looked closer; a gradient that stays where it was has been looked at.
  if (sealed && (entry.copied || address != entry.row.grad)) {
    if (overlaps_output(view)) return false;
    // Memory does not show a view that negates; where the gradient is copied, torch sees to it.
    if (!entry.copied && py::cast<bool>(attribute(shard.ptr(), names().is_neg)())) return false;
  }
  if (entry.copied && entry.is_dtensor) return true;  // of any placement; Python brings it into the parameter's
  if (!same(view, entry.grad)) return false;
  if (!entry.copied) entry.row.grad = address;
  entry.grad.object = shard.ptr();
  entry.grad.sizes = view.shape;
  return true;
}

// Asks for the lines of an entry's tensors some entries before they are looked at: a step, or the rest of a training
// loop, has pushed them out of the caches, and each would be waited for in turn.
void AdamTable::prefetch(const Entry& entry) {
  const auto ask = [](const Known& known) {
    __builtin_prefetch(known.object);
    for (const int offset : {-64, 0, 64}) __builtin_prefetch(static_cast<const char*>(known.sizes) + offset);
  };
  ask(entry.weight);
  ask(entry.grad);
  for (size_t i = 0; i < entry.held_count; ++i) ask(entry.held[i].known);
}

bool AdamTable::refresh(const py::list& param_groups, const py::dict& state) {
  try {
    if (!same_groups(param_groups)) return false;
    for (PyObject* param : idle_)
      if (!attribute(param, names().grad).is_none()) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0, position = 0;
    auto next = by_position_.begin();
    for (; next != by_position_.end() && PyDict_Next(state.ptr(), &at, &key, &value); ++position) {
      Entry& entry = entries_[*next];
      if (position < entry.position) continue;
      if (by_position_.end() - next > kAhead) prefetch(entries_[next[kAhead]]);
      if (key != entry.param || !PyDict_Check(value)) return false;
      if (!unchanged(entry, value) || !take_grad(entry, true)) return false;
      ++next;
    }
    if (next != by_position_.end()) return false;
  } catch (py::error_already_set&) {
    return false;  // Python checks again, and says what is wrong
  }
  collect();
  return true;
}

void AdamTable::collect() {
  hypers_.clear();
  rows_.clear();
  active_.clear();
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].active) continue;
    rows_.push_back(entries_[i].row);
    active_.push_back(i);
  }
}

py::list AdamTable::active() const {
  py::list result;
  for (const size_t i : active_) result.append(i);
  return result;
}

py::list AdamTable::params() const {
  py::list result;
  for (const size_t i : active_) result.append(py::handle(entries_[i].param));
  return result;
}

void AdamTable::prepare(const std::vector<std::vector<double>>& groups, bool per_row) {
  hypers_.clear();
  std::map<std::pair<int64_t, float>, int32_t> known;
  std::pair<int64_t, float> last{-1, 0.0f};
  for (size_t i = 0; i < active_.size(); ++i) {
    const Entry& entry = entries_[active_[i]];
    const std::vector<double>& h = groups.at(static_cast<size_t>(entry.group));
    const std::pair<int64_t, float> key{entry.group, per_row ? static_cast<float>(i) : *entry.step + 1.0f};
    if (per_row || key != last) {
      const auto [found, inserted] = known.emplace(key, static_cast<int32_t>(hypers_.size()));
      if (inserted) hypers_.push_back({h.at(0), h.at(1), h.at(2), h.at(3), h.at(4), key.second, h.at(5), h.at(6)});
      rows_[i].hyper = found->second;
      last = key;
    } else {
      rows_[i].hyper = rows_[i - 1].hyper;
    }
  }
}

void AdamTable::pack(uintptr_t words, int64_t adam_block, int64_t norm_block) const {
  auto* out = reinterpret_cast<int64_t*>(words);
  std::memcpy(out, rows_.data(), rows_.size() * sizeof(AdamRow));
  out += 8 * count();
  for (const int64_t block : {adam_block, norm_block}) {
    int64_t first = 0;
    for (const AdamRow& row : rows_) {
      *out++ = first;
      first += (row.n + block - 1) / block;
    }
    *out++ = first;
  }
  for (const size_t i : active_) *out++ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(entries_[i].step));
  std::memcpy(out, hypers_.data(), hypers_.size() * sizeof(AdamHyper));
}

int64_t AdamTable::blocks(int64_t size) const {
  int64_t total = 0;
  for (const AdamRow& row : rows_) total += (row.n + size - 1) / size;
  return total;
}

std::vector<int32_t> AdamTable::kinds() const {
  std::set<int32_t> found;
  for (const AdamRow& row : rows_)
    if (row.n > 0) found.insert(row.kind);
  return {found.begin(), found.end()};
}

bool AdamTable::aligned() const {
  uintptr_t bits = 0;
  for (const AdamRow& row : rows_)
    for (const void* pointer : {static_cast<const void*>(row.param), static_cast<const void*>(row.low), row.grad,
                                static_cast<const void*>(row.exp_avg), static_cast<const void*>(row.exp_avg_sq),
                                static_cast<const void*>(row.max_exp_avg_sq)})
      bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

std::vector<Values> AdamTable::grads() const {
  std::vector<Values> found;
  for (const AdamRow& row : rows_) found.push_back({row.grad, row.n, grad_dtype(row.kind)});
  return found;
}

void AdamTable::check_sources(const char* function, const Deltas& sources) const {
  int64_t element_size = 2;
  for (const AdamRow& row : rows_) {
    if (row.kind < 0)
      throw std::invalid_argument(std::string("pyshard._C.AdamTable.") + function + ": fp64 rows have no kernel");
    if (grad_dtype(row.kind) == kFloat32) element_size = 4;
  }
  if (sources.empty())
    throw std::invalid_argument(std::string("pyshard._C.AdamTable.") + function +
                                ": source_deltas is empty; expected at least one, as [0], the row's own");
  check_deltas("source_deltas", sources, element_size);
}

double AdamTable::square_sum(int threads) const {
  check_sources("square_sum", {0});
  py::gil_scoped_release release;
  return cpu_sum_blocks(cpu_block_sums(grads(), {0}, threads));
}

py::bytes AdamTable::block_sums(int threads, const Deltas& sources) const {
  check_sources("block_sums", sources);
  std::vector<double> sums;
  {
    py::gil_scoped_release release;
    sums = cpu_block_sums(grads(), sources, threads);
  }
  return {reinterpret_cast<const char*>(sums.data()), sums.size() * sizeof(double)};
}

void AdamTable::count_step() {
  for (const size_t i : active_) *entries_[i].step += 1.0f;
}

void AdamTable::adam(double grad_scale, int threads, const Deltas& sources, const Deltas& targets) {
  check_sources("adam", sources);
  int64_t element_size = 2;
  for (const AdamRow& row : rows_) {
    if (row.hyper >= hypers_count()) throw std::invalid_argument("pyshard._C.AdamTable.adam: prepare() comes first");
    if (param_dtype(row.kind >> 3) == kFloat32) element_size = 4;
  }
  check_deltas("target_deltas", targets, element_size);
  if (std::find(targets.begin(), targets.end(), 0) != targets.end())
    throw std::invalid_argument(
        "pyshard._C.AdamTable.target_deltas: got 0, which is the row's own param; leave it out");
  std::vector<AdamScalars> scalars;
  for (const AdamHyper& hyper : hypers_) scalars.push_back(adam_scalars(hyper, grad_scale));
  count_step();
  py::gil_scoped_release release;
  cpu_adam(rows_.data(), count(), scalars.data(), sources, targets, threads);
}

void bind_table(py::module_& m) {
  py::class_<AdamTable>(m, "AdamTable")
      .def(py::init<>())
      .def("add", &AdamTable::add, py::arg("param"), py::arg("state"), py::arg("keys"), py::arg("kind"),
           py::arg("grad_is_fp32"), py::arg("group"), py::arg("is_dtensor"), py::arg("param_buffer"),
           py::arg("grad_buffer"))
      .def("add_idle", &AdamTable::add_idle)
      .def("seal", &AdamTable::seal)
      .def("refresh", &AdamTable::refresh)
      .def("active", &AdamTable::active)
      .def("params", &AdamTable::params)
      .def("count", &AdamTable::count)
      .def("hypers_count", &AdamTable::hypers_count)
      .def("prepare", &AdamTable::prepare)
      .def("pack", &AdamTable::pack)
      .def("packed_size", &AdamTable::packed_size)
      .def("blocks", &AdamTable::blocks, py::arg("size"))
      .def("kinds", &AdamTable::kinds)
      .def("aligned", &AdamTable::aligned)
      .def("square_sum", &AdamTable::square_sum)
      .def("block_sums", &AdamTable::block_sums, py::arg("threads"), py::arg("source_deltas") = Deltas{0})
      .def("count_step", &AdamTable::count_step)
      .def("adam", &AdamTable::adam, py::arg("grad_scale"), py::arg("threads"), py::arg("source_deltas") = Deltas{0},
           py::arg("target_deltas") = Deltas{});
}

}  // namespace pyshard
