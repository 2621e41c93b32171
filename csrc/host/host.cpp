// hico_kernels._host: what runs on the host without tensors. No torch header may be included under
// csrc/host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "host/fma_rate.h"

namespace py = pybind11;

// The instruction sets that the CPU kernels choose between, best first; the first one is what they
// run.
static std::vector<std::string> cpu_paths() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512_bf16");
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back("avx512");
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back("avx2");
#endif
  found.push_back("baseline");
  return found;
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side facts without torch.";
  m.def("cpu_paths", &cpu_paths, "Instruction sets of this CPU that the kernels know, best first.");
  m.def("fma_rate", &hico::fma_rate, py::arg("bfloat16"), py::call_guard<py::gil_scoped_release>(),
        "FLOPs per second that the calling thread reaches in registers, measured now.");
  m.attr("compiler") = __VERSION__;
}
