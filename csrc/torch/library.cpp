// The extension module ssl_kernels._C. Importing it registers the ops of this folder with torch's dispatcher; the
// module itself only tells what the processor is and which instruction set the kernels use.
#include <Python.h>

#include <stdexcept>

#include "../cpu/isa.h"

namespace {

PyObject* active_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(sslk::isa_name(sslk::active_isa()));
  } catch (const std::invalid_argument& error) {
    PyErr_Format(PyExc_ValueError, "SSL_KERNELS_ISA: %s", error.what());
    return nullptr;
  }
}

PyObject* cpu_vendor(PyObject*, PyObject*) { return PyUnicode_FromString(sslk::cpu_vendor()); }

PyMethodDef methods[] = {
    {"active_isa", active_isa, METH_NOARGS, "Name of the instruction set that the kernels run with."},
    {"cpu_vendor", cpu_vendor, METH_NOARGS, "\"intel\", \"amd\" or \"unknown\"."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
