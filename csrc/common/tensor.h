// What every kernel file needs from torch's stable ABI, and nothing else from torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace hico {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
}  // namespace hico

// Python gives the user-facing messages; these stop a direct torch.ops call from reading out of
// bounds. An argument that is made contiguous first is called `x_in` here and `x` by its schema.
namespace hico {
inline std::string argument_name(std::string name) {
  return name.ends_with("_in") ? name.substr(0, name.size() - 3) : name;
}
}  // namespace hico
#define HICO_CHECK_DIM(t, n)                                                                       \
  STD_TORCH_CHECK((t).dim() == (n), hico::argument_name(#t), " must be " #n "-D, got ", (t).dim(), \
                  "-D")
#define HICO_CHECK_DTYPE(t, d) \
  STD_TORCH_CHECK((t).scalar_type() == ScalarType::d, hico::argument_name(#t), " must be " #d)
