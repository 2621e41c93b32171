// An empty CPython module: importing it runs the STABLE_TORCH_LIBRARY_IMPL initialisers of its
// other files.
#include <Python.h>
#define HICO_CAT_(a, b) a##b
#define HICO_CAT(a, b) HICO_CAT_(a, b)
#define HICO_STR_(x) #x
#define HICO_STR(x) HICO_STR_(x)
extern "C" PyObject* HICO_CAT(PyInit_, HICO_MODULE)() {
  static struct PyModuleDef def = {PyModuleDef_HEAD_INIT,
                                   HICO_STR(HICO_MODULE),
                                   nullptr,
                                   0,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&def);
}
