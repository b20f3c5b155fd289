#pragma once
#include <pybind11/pybind11.h>
namespace pyshard {
void bind_cuda(pybind11::module_& m);
}
