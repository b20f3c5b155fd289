// AdamTable. Everything here runs with the GIL held, except the kernels themselves.
#include "table.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "prefetch.h"

namespace pyshard {
namespace {

// Entries between asking for their memory and looking at it, and between fetching their gradients, whose objects are
// new at each step, asking for the gradients' local shards and for what lies behind these.
constexpr std::ptrdiff_t kAhead = 8, kGrad = 6, kShard = 4, kMemory = 2;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Names of the attributes that are read, made once.
struct Names {
  PyObject* grad = interned("grad");
  PyObject* local = interned("_local_tensor");
  PyObject* placements = interned("placements");
  PyObject* spec = interned("_spec");
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

// Where objects of a class keep an attribute for which it has a slot: read there, it takes 2 ns instead of 30.
class Slot {
 public:
  Slot(PyTypeObject* type, PyObject* name) : name_(name) {
    PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name);
    if (found == nullptr) PyErr_Clear();
    if (found != nullptr && Py_TYPE(found) == &PyMemberDescr_Type) {
      const auto* descriptor = reinterpret_cast<PyMemberDescrObject*>(found);
      const int kind = descriptor->d_member->type;
      if (kind == T_OBJECT_EX || kind == T_OBJECT) {
        type_ = PyDescr_TYPE(descriptor);
        offset_ = descriptor->d_member->offset;
      }
    }
    Py_XDECREF(found);
  }

  py::object of(PyObject* object) const {
    if (type_ != nullptr && PyObject_TypeCheck(object, type_)) {
      PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
      if (value != nullptr) return py::reinterpret_borrow<py::object>(value);
    }
    return attribute(object, name_);
  }

  // Borrowed; null if there is no slot.
  PyObject* peek(PyObject* object) const {
    if (type_ == nullptr || !PyObject_TypeCheck(object, type_)) return nullptr;
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

  // Where `object` keeps it; of no meaning if there is no slot.
  const char* address(PyObject* object) const { return reinterpret_cast<const char*>(object) + offset_; }

 private:
  PyObject* name_;
  PyTypeObject* type_ = nullptr;  // a class with a slot lives as long as its module; DTensor's as long as torch
  Py_ssize_t offset_ = 0;
};

// What is known of the classes of tensors. Made with the first DTensor, as torch.distributed may not be there before.
struct Slots {
  explicit Slots(PyTypeObject* dtensor)
      : local(dtensor, names().local),
        spec(dtensor, names().spec),
        plain(py::module_::import("torch").attr("Tensor").ptr()) {}
  Slot local, spec;
  PyObject* plain;  // torch.Tensor, never freed
};

const Slots& slots(PyObject* dtensor) {
  static const Slots all(Py_TYPE(dtensor));
  return all;
}

bool is_plain(PyObject* tensor, PyObject* dtensor) {
  return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == slots(dtensor).plain;
}

// The tensor whose memory is meant: of a DTensor its local shard, waited for if a collective is still filling it.
py::object local(PyObject* tensor, bool is_dtensor) {
  if (!is_dtensor) return py::reinterpret_borrow<py::object>(tensor);
  py::object shard = slots(tensor).local.of(tensor);
  if (!is_plain(shard.ptr(), tensor) && PyObject_HasAttr(shard.ptr(), names().wait))
    shard = attribute(shard.ptr(), names().wait)();
  return shard;
}

// Likewise of an item of the state of a parameter, which may be a DTensor if the parameter is one.
py::object local_state(PyObject* tensor, PyObject* param, bool is_dtensor) {
  if (!is_dtensor || is_plain(tensor, param)) return py::reinterpret_borrow<py::object>(tensor);
  return local(tensor, slots(param).local.peek(tensor) != nullptr || PyObject_HasAttr(tensor, names().local));
}

bool is_neg(PyObject* tensor) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, names().is_neg));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

void check_deltas(const char* what, const Deltas& deltas, int64_t element_size) {
  for (const int64_t delta : deltas)
    if (delta % element_size != 0)
      throw std::invalid_argument(std::string("pyshard._C.AdamTable.") + what + ": got a distance of " +
                                  std::to_string(delta) + " bytes, expected multiples of an element's " +
                                  std::to_string(element_size));
}

}  // namespace

AdamTable::Known AdamTable::known(const TensorView& view, bool with_strides) {
  Layout layout;
  layout.shape.assign(view.shape, view.shape + view.ndim);
  if (with_strides) layout.strides.assign(view.strides, view.strides + view.ndim);
  auto found = std::find_if(layouts_.begin(), layouts_.end(), [&](const Layout& other) {
    return other.shape == layout.shape && other.strides == layout.strides;
  });
  if (found == layouts_.end()) found = layouts_.insert(found, std::move(layout));
  return {view.address(), &*found, view.device_type, view.device_id, view.code, view.bits};
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
    const py::object shard = local_state(tensor.ptr(), param.ptr(), is_dtensor);
    const TensorView view = view_of(shard.ptr());
    pointers.back() = view.address();
    entry.held.at(entry.held_count++) = {key, tensor.ptr(), known(view)};
    add_output(view);
  }
  const py::object shard = local(param.ptr(), is_dtensor);
  const TensorView weight = view_of(shard.ptr());
  add_output(weight);
  entry.param = param.ptr();
  entry.weight = known(weight);
  entry.copied = !param_buffer.is_none();
  if (entry.copied) {
    entry.grad = known(view_of(grad_buffer.ptr()), false);
  } else {
    entry.grad = entry.weight;
    if (grad_is_fp32) entry.grad.bits = 32, entry.grad.code = 2;  // kDLFloat
  }
  if (is_dtensor) {
    entry.placements = attribute(param.ptr(), names().placements);
    entry.spec = slots(param.ptr()).spec.of(param.ptr());
  }
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
    const py::object grad = attribute(entries_[i].param, names().grad);
    if (!take_grad(entries_[i], grad, false))
      throw std::runtime_error("pyshard: a gradient changed while it was checked");
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
    const py::object tensor = local_state(value, entry.param, entry.is_dtensor);
    const TensorView view = view_of(tensor.ptr());
    if (view.address() != held.known.address || !same(view, held.known)) return false;
  }
  return true;
}

bool AdamTable::take_grad(Entry& entry, const py::object& grad, bool sealed) {
  entry.active = !grad.is_none();
  if (!entry.active) return true;
  if (entry.is_dtensor && !entry.copied) {
    const py::object spec = slots(entry.param).spec.of(grad.ptr());
    if (!spec.is(entry.spec)) {  // FSDP2 gives gradients the parameter's own
      if (!attribute(spec.ptr(), names().placements).equal(entry.placements)) return false;
      entry.spec = spec;
    }
  }
  const py::object shard = local(grad.ptr(), entry.is_dtensor);
  const TensorView view = view_of(shard.ptr());
  const auto address = reinterpret_cast<const void*>(view.address());
  if (view.code != entry.grad.code || view.bits != entry.grad.bits || (address == nullptr && view.numel() > 0))
    return false;
  // Before the table is sealed, Python has looked closer; a gradient that stays where it was has been looked at.
  if (sealed && (entry.copied || address != entry.row.grad)) {
    if (overlaps_output(view)) return false;
    // Memory does not show a view that negates; where the gradient is copied, torch sees to it.
    if (!entry.copied && is_neg(shard.ptr())) return false;
  }
  if (entry.copied && entry.is_dtensor) return true;  // of any placement; Python brings it into the parameter's
  if (!same(view, entry.grad)) return false;
  if (!entry.copied) entry.row.grad = address;
  return true;
}

void AdamTable::find_lines(Entry& entry, PyObject* state) {
  std::set<uintptr_t> found;
  const auto add = [&](const char* address) { found.insert(TensorLines::line_of(address)); };
  const auto add_all = [&](PyObject* tensor, bool is_param) {
    const bool is_dtensor = entry.is_dtensor && (is_param || !is_plain(tensor, entry.param));
    if (is_dtensor) add(slots(entry.param).local.address(tensor));
    TensorLines::each(tensor, !is_dtensor, is_param, add);
    if (is_dtensor) TensorLines::each(local_state(tensor, entry.param, true).ptr(), true, false, add);
  };
  add_all(entry.param, true);
  for (int i = 0; i < 2; ++i) add(reinterpret_cast<char*>(state) + i * TensorLines::kLine);
  const auto* keys = reinterpret_cast<char*>(reinterpret_cast<PyDictObject*>(state)->ma_keys);
  for (int i = 0; i < 3; ++i) add(keys + i * TensorLines::kLine);
  for (size_t i = 0; i < entry.held_count; ++i) add_all(entry.held[i].object, false);
  add(reinterpret_cast<const char*>(entry.step));
  entry.lines.assign(found.begin(), found.end());
}

bool AdamTable::refresh(const py::list& param_groups, const py::dict& state) {
  try {
    if (!same_groups(param_groups)) return false;
    for (PyObject* param : idle_)
      if (!attribute(param, names().grad).is_none()) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0, position = 0;
    const auto count = static_cast<std::ptrdiff_t>(by_position_.size());
    std::array<py::object, kGrad> grads;
    const auto entry_at = [&](std::ptrdiff_t i) -> Entry& { return entries_[by_position_[static_cast<size_t>(i)]]; };
    const auto grad_at = [&](std::ptrdiff_t i) -> py::object& { return grads[static_cast<size_t>(i % kGrad)]; };
    std::ptrdiff_t next = -kAhead;
    // What comes `ahead` entries after `next` gets a little nearer: see kAhead.
    const auto look_ahead = [&] {
      const auto in = [&](std::ptrdiff_t i) { return i >= 0 && i < count; };
      const auto shard_at = [&](std::ptrdiff_t i) -> PyObject* {  // that has the gradient's memory; or null
        PyObject* grad = in(i) ? grad_at(i).ptr() : Py_None;
        if (grad == Py_None) return nullptr;
        return entry_at(i).is_dtensor ? slots(entry_at(i).param).local.peek(grad) : grad;
      };
      if (in(next + kAhead))
        for (const uintptr_t line : entry_at(next + kAhead).lines)
          TensorLines::ask(reinterpret_cast<const char*>(line));
      if (const auto i = next + kGrad - 1; in(i)) {
        grad_at(i) = attribute(entry_at(i).param, names().grad);
        TensorLines::ask(reinterpret_cast<const char*>(grad_at(i).ptr()));
        TensorLines::ask(reinterpret_cast<const char*>(grad_at(i).ptr()) + TensorLines::kLine);
      }
      if (PyObject* shard = shard_at(next + kShard)) TensorLines::ask(reinterpret_cast<const char*>(shard));
      if (PyObject* shard = shard_at(next + kMemory)) TensorLines::ask_impl(shard);
      if (PyObject* shard = shard_at(next + kMemory - 1)) TensorLines::ask_storage(shard);
    };
    for (; next < 0; ++next) look_ahead();
    for (; next < count && PyDict_Next(state.ptr(), &at, &key, &value); ++position) {
      Entry& entry = entry_at(next);
      if (position < entry.position) continue;
      look_ahead();
      if (key != entry.param || !PyDict_Check(value)) return false;
      const py::object grad = std::move(grad_at(next));
      if (!unchanged(entry, value) || !take_grad(entry, grad, true)) return false;
      if (entry.lines.empty()) find_lines(entry, value);
      ++next;
    }
    if (next != count) return false;
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

py::list AdamTable::changed() const {
  py::list result;
  for (const size_t i : active_) {
    const Entry& entry = entries_[i];
    result.append(py::handle(entry.param));
    TensorLines::ask_version(entry.param);
    if (!entry.is_dtensor) continue;
    const py::object shard = local(entry.param, true);
    TensorLines::ask_version(shard.ptr());
    result.append(shard);
  }
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
      .def("changed", &AdamTable::changed)
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
