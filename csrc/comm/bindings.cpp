// Whatever may take long runs without the interpreter's lock; a signal handler's exception that ends it goes on.
#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "mailbox.h"

namespace py = pybind11;

namespace pyshard {
namespace {

bool signalled() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <class F>
auto unlocked(F work) {
  try {
    py::gil_scoped_release release;
    return work();
  } catch (const Interrupt&) {
    throw py::error_already_set();
  }
}

// None, or why there are no results.
using Exchanged = std::pair<std::optional<Trouble>, std::vector<py::bytes>>;

Exchanged exchange(Mailbox& mailbox, const py::bytes& payload, const std::string& operation, double timeout) {
  const std::string_view bytes = payload;
  std::vector<py::bytes> results;
  std::vector<char*> addresses;
  for (size_t rank = 0; rank < mailbox.world(); ++rank) {
    results.push_back(
        py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes.size()))));
    if (!results.back()) throw py::error_already_set();
    addresses.push_back(PyBytes_AS_STRING(results.back().ptr()));  // nobody else knows them yet
  }
  auto trouble = unlocked([&] { return mailbox.exchange(bytes, operation, timeout, addresses); });
  return {std::move(trouble), std::move(results)};
}

}  // namespace

void bind_comm(py::module_& m) {
  py::class_<SharedMemory, std::shared_ptr<SharedMemory>>(m, "SharedMemory", py::buffer_protocol())
      .def(py::init([](size_t bytes) {
             return unlocked([&] { return std::make_shared<SharedMemory>(bytes, Interrupts(signalled)); });
           }),
           py::arg("bytes"))
      .def(py::init<pid_t, int, size_t>(), py::arg("pid"), py::arg("fd"), py::arg("bytes"))
      .def_property_readonly("fd", &SharedMemory::fd)
      .def("seal_off", &SharedMemory::seal_off)
      .def("populate", [](SharedMemory& memory) { unlocked([&] { return memory.populate(Interrupts(signalled)); }); })
      .def_buffer([](SharedMemory& memory) {
        const auto bytes = static_cast<py::ssize_t>(memory.bytes());
        return py::buffer_info(memory.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {bytes}, {1});
      });

  py::class_<Counters>(m, "Counters")
      .def(py::init<std::vector<std::shared_ptr<SharedMemory>>, size_t, size_t, size_t>(), py::arg("memories"),
           py::arg("rank"), py::arg("offset"), py::arg("count"))
      .def("reached", &Counters::reached, py::arg("index"), py::arg("target"));

  py::class_<Trouble>(m, "Trouble")
      .def_readonly("kind", &Trouble::kind)
      .def_readonly("rank", &Trouble::rank)
      .def_readonly("late", &Trouble::late)
      .def_readonly("witness", &Trouble::witness);

  // Texts of peers are bytes: they may have been cut inside a character.
  py::class_<Mailbox>(m, "Mailbox")
      .def(py::init([](std::vector<std::shared_ptr<SharedMemory>> memories, const std::vector<pid_t>& pids,
                       size_t rank) { return std::make_unique<Mailbox>(std::move(memories), pids, rank, signalled); }),
           py::arg("memories"), py::arg("pids"), py::arg("rank"))
      .def_property_readonly_static("block_bytes", [](const py::object&) { return Mailbox::block_bytes(); })
      .def("exchange", &exchange, py::arg("payload"), py::arg("operation"), py::arg("timeout"))
      .def(
          "wait",
          [](Mailbox& mailbox, const Counters& counters, size_t index, uint64_t target, const std::string& operation,
             double timeout) {
            return unlocked([&] { return mailbox.wait(counters, index, target, operation, timeout); });
          },
          py::arg("counters"), py::arg("index"), py::arg("target"), py::arg("operation"), py::arg("timeout"))
      .def("advance", &Mailbox::advance, py::arg("counters"), py::arg("index"), py::arg("operation"))
      .def("abort", &Mailbox::abort, py::arg("message"))
      .def("close", &Mailbox::close)
      .def("operation", [](const Mailbox& mailbox, size_t rank) { return py::bytes(mailbox.operation(rank)); })
      .def("waiting", &Mailbox::waiting)
      .def("message", [](const Mailbox& mailbox, size_t rank) { return py::bytes(mailbox.message(rank)); });
}

}  // namespace pyshard
