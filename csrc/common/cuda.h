// Where a CUDA launch goes: the device of a tensor, on torch's current stream for it.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);

namespace hico {
struct Launch {
  explicit Launch(const Tensor& t) : guard(t.get_device_index()) {
    void* s = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s));
    stream = static_cast<cudaStream_t>(s);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};
}  // namespace hico
