// AdamTable. Everything here runs with the GIL held, except the kernels themselves.
#include "table.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "cpu/runtime.h"

namespace pyshard {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// Names of the attributes that are read, made once.
struct Names {
  PyObject* grad = interned("grad");
  PyObject* data_ptr = interned("data_ptr");
  PyObject* numel = interned("numel");
  PyObject* dtype = interned("dtype");
  PyObject* is_contiguous = interned("is_contiguous");
  PyObject* stride = interned("stride");
  PyObject* get_device = interned("get_device");
  PyObject* local = interned("_local_tensor");
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

py::object call(PyObject* object, PyObject* method) {
  PyObject* value = PyObject_CallMethodNoArgs(object, method);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

uintptr_t address(PyObject* tensor) {
  const py::object value = call(tensor, names().data_ptr);
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value.ptr()));
}

uintptr_t grad_bytes(const AdamRow& row) {
  return static_cast<uintptr_t>(row.n) * (row.kind >= 0 && grad_dtype(row.kind) != kFloat32 ? 2 : 4);
}

int64_t integer(PyObject* tensor, PyObject* method) { return PyLong_AsLongLong(call(tensor, method).ptr()); }

// The tensor whose memory is meant: of a DTensor, its local shard.
py::object local(PyObject* tensor, bool is_dtensor) {
  return is_dtensor ? attribute(tensor, names().local) : py::reinterpret_borrow<py::object>(tensor);
}

}  // namespace

void AdamTable::add(py::object param, py::dict state, py::list held, py::tuple row, py::object grad, py::object dtype,
                    py::object stride, int64_t group, bool is_dtensor, bool copied) {
  Entry entry{};
  const auto pointer = [&](size_t i) { return reinterpret_cast<void*>(row[i].cast<uintptr_t>()); };
  entry.row = {pointer(0),
               pointer(1),
               pointer(2),
               static_cast<float*>(pointer(3)),
               static_cast<float*>(pointer(4)),
               static_cast<float*>(pointer(5)),
               row[6].cast<int64_t>(),
               row[7].cast<int32_t>(),
               0};
  entry.step = static_cast<float*>(pointer(8));
  for (const auto& item : held) {
    const auto pair = item.cast<py::tuple>();
    PyObject* key = pair[0].ptr();
    Py_INCREF(key);
    PyUnicode_InternInPlace(&key);  // kept for the life of the process: there are five such keys
    const py::object tensor = pair[1];
    entry.held.push_back(
        {key, tensor, address(local(tensor.ptr(), is_dtensor && py::hasattr(tensor, "_local_tensor")).ptr())});
  }
  entry.dtype = std::move(dtype);
  entry.param = std::move(param);
  entry.state = std::move(state);
  entry.grad = std::move(grad);
  entry.stride = std::move(stride);
  entry.group = group;
  entry.is_dtensor = is_dtensor;
  entry.copied = copied;
  entries_.push_back(std::move(entry));
}

void AdamTable::add_idle(py::object param) { idle_.push_back(std::move(param)); }

void AdamTable::seal(py::list param_groups, py::dict state) {
  groups_.clear();
  states_.clear();
  outputs_.clear();
  for (const auto& group : param_groups) {
    py::object params = group.cast<py::dict>()["params"];
    std::vector<PyObject*> items;
    for (const auto& item : params.cast<py::list>()) items.push_back(item.ptr());
    groups_.emplace_back(std::move(params), std::move(items));
  }
  for (const auto& item : state)
    states_.emplace_back(py::reinterpret_borrow<py::object>(item.first),
                         py::reinterpret_borrow<py::object>(item.second));
  state_ = state;
  for (const Entry& entry : entries_) {
    const AdamRow& row = entry.row;
    const int32_t format = row.kind >> 3;
    const auto add_output = [&](const void* data, int64_t size) {
      const auto begin = reinterpret_cast<uintptr_t>(data);
      if (data != nullptr && row.n > 0) outputs_.emplace_back(begin, begin + static_cast<uintptr_t>(row.n * size));
    };
    add_output(row.param, format == kF32 ? 4 : 2);
    add_output(row.low, format == kBf16Split ? 2 : 4);
    add_output(row.exp_avg, 4);
    add_output(row.exp_avg_sq, 4);
    add_output(row.max_exp_avg_sq, 4);
  }
  std::sort(outputs_.begin(), outputs_.end());
  collect();
}

bool AdamTable::overlaps_output(uintptr_t begin, uintptr_t end) const {
  const auto after = std::lower_bound(outputs_.begin(), outputs_.end(), std::make_pair(begin, uintptr_t{0}));
  if (after != outputs_.end() && after->first < end) return true;
  return after != outputs_.begin() && std::prev(after)->second > begin;
}

bool AdamTable::unchanged(const Entry& entry) const {
  if (!entry.copied) {
    const py::object param = local(entry.param.ptr(), entry.is_dtensor);
    if (address(param.ptr()) != reinterpret_cast<uintptr_t>(entry.row.param)) return false;
    if (integer(param.ptr(), names().numel) != entry.row.n) return false;
  }
  for (const Held& held : entry.held) {
    PyObject* value = PyDict_GetItemWithError(entry.state.ptr(), held.key);  // borrowed
    if (value != held.tensor.ptr()) return PyErr_Clear(), false;
    if (entry.is_dtensor && PyObject_HasAttr(value, names().local)) {
      if (address(attribute(value, names().local).ptr()) != held.address) return false;
    } else if (address(value) != held.address) {
      return false;
    }
  }
  return true;
}

bool AdamTable::accept(Entry& entry, PyObject* grad) {
  const py::object tensor = local(grad, entry.is_dtensor);
  if (attribute(tensor.ptr(), names().dtype).ptr() != entry.dtype.ptr()) return false;
  if (integer(tensor.ptr(), names().numel) != entry.row.n) return false;
  if (integer(tensor.ptr(), names().get_device) != integer(entry.held[0].tensor.ptr(), names().get_device))
    return false;
  if (!entry.copied) {
    if (entry.stride.is_none()) {
      if (call(tensor.ptr(), names().is_contiguous).ptr() != Py_True) return false;
    } else if (!call(tensor.ptr(), names().stride).equal(entry.stride)) {
      return false;
    }
    const uintptr_t begin = address(tensor.ptr());
    if (overlaps_output(begin, begin + grad_bytes(entry.row))) return false;
    entry.row.grad = reinterpret_cast<const void*>(begin);
  }
  entry.grad = py::reinterpret_borrow<py::object>(grad);
  return true;
}

bool AdamTable::refresh(py::list param_groups, py::dict state) {
  if (state.ptr() != state_.ptr() || param_groups.size() != groups_.size()) return false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* params = PyDict_GetItemWithError(PyList_GET_ITEM(param_groups.ptr(), i), names().params);
    const std::vector<PyObject*>& items = groups_[i].second;
    if (params == nullptr || !PyList_Check(params) ||
        PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(items.size())) {
      PyErr_Clear();
      return false;
    }
    for (size_t j = 0; j < items.size(); ++j)
      if (PyList_GET_ITEM(params, j) != items[j]) return false;
  }
  if (PyDict_Size(state.ptr()) != static_cast<Py_ssize_t>(states_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (const auto& expected : states_) {
    if (!PyDict_Next(state.ptr(), &position, &key, &value)) return false;
    if (key != expected.first.ptr() || value != expected.second.ptr()) return false;
  }
  try {
    for (const py::object& param : idle_)
      if (!attribute(param.ptr(), names().grad).is_none()) return false;
    for (Entry& entry : entries_) {
      if (!unchanged(entry)) return false;
      const py::object grad = attribute(entry.param.ptr(), names().grad);
      if (grad.is_none()) {
        entry.grad = grad;
        continue;
      }
      const bool same =
          grad.ptr() == entry.grad.ptr() && (entry.copied || address(local(grad.ptr(), entry.is_dtensor).ptr()) ==
                                                                 reinterpret_cast<uintptr_t>(entry.row.grad));
      if (!same && !accept(entry, grad.ptr())) return false;
    }
  } catch (py::error_already_set&) {
    return false;  // Python checks again, and says what is wrong
  }
  collect();
  return true;
}

void AdamTable::collect() {
  rows_.clear();
  active_.clear();
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].grad.is_none()) continue;
    rows_.push_back(entries_[i].row);
    active_.push_back(i);
  }
}

py::list AdamTable::active() const {
  py::list result;
  for (const size_t i : active_) result.append(i);
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

double AdamTable::square_sum(int threads) const {
  py::gil_scoped_release release;
  return cpu_square_sum(rows_.data(), count(), threads);
}

void AdamTable::count_step() {
  for (const size_t i : active_) *entries_[i].step += 1.0f;
}

void AdamTable::adam(double grad_scale, int threads) {
  std::vector<AdamScalars> scalars;
  for (const AdamHyper& hyper : hypers_) scalars.push_back(adam_scalars(hyper, grad_scale));
  count_step();
  py::gil_scoped_release release;
  cpu_adam(rows_.data(), count(), scalars.data(), threads);
}

void bind_table(py::module_& m) {
  py::class_<AdamTable>(m, "AdamTable")
      .def(py::init<>())
      .def("add", &AdamTable::add, py::arg("param"), py::arg("state"), py::arg("held"), py::arg("row"), py::arg("grad"),
           py::arg("dtype"), py::arg("stride"), py::arg("group"), py::arg("is_dtensor"), py::arg("copied"))
      .def("add_idle", &AdamTable::add_idle)
      .def("seal", &AdamTable::seal)
      .def("refresh", &AdamTable::refresh)
      .def("active", &AdamTable::active)
      .def("count", &AdamTable::count)
      .def("hypers_count", &AdamTable::hypers_count)
      .def("prepare", &AdamTable::prepare)
      .def("pack", &AdamTable::pack)
      .def("packed_size", &AdamTable::packed_size)
      .def("kinds", &AdamTable::kinds)
      .def("aligned", &AdamTable::aligned)
      .def("square_sum", &AdamTable::square_sum)
      .def("count_step", &AdamTable::count_step)
      .def("adam", &AdamTable::adam);
}

}  // namespace pyshard
