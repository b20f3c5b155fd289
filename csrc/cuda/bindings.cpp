#include "bindings.h"
namespace pyshard {
void bind_cuda(pybind11::module_&) {}
}
