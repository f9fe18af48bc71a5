// The extension module ssl_kernels._C_cuda. Importing it registers the ops of this folder with torch's dispatcher; the
// module itself only tells how it was built.
#include <Python.h>

namespace {

PyObject* build(PyObject*, PyObject*) { return PyUnicode_FromString(SSLK_CUDA_BUILD); }

PyMethodDef methods[] = {
    {"build", build, METH_NOARGS, "The compiler and the architectures that it compiled for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
