// The transport part of pyshard._C: memory that processes share, and what they tell each other through it.
#pragma once

#include <pybind11/pybind11.h>

namespace pyshard {

// Adds SharedMemory, Counters, Mailbox and Trouble; pyshard/comm/shm.py is their only user.
void bind_comm(pybind11::module_& m);

}  // namespace pyshard
