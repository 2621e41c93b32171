// gather_tokens: y[m] = x[index[m]], rows of any dtype.  reference:
// hico_kernels/select/reference.py One memcpy per row when a row is contiguous, else element by
// element; threads take blocks of rows. Bound by memory: reads and writes M * C elements once.
#include <cstring>

#include "common/tensor.h"

namespace hico {

Tensor gather_tokens_cpu(const Tensor& x,
                         const Tensor& index) {  // x [S, C] any strides, index [M] int64
  HICO_CHECK_DIM(x, 2);
  HICO_CHECK_DIM(index, 1);
  HICO_CHECK_DTYPE(index, Long);
  const int64_t rows = x.size(0), channels = x.size(1), picked = index.size(0),
                step = index.stride(0);
  const int64_t* at = data<int64_t>(index);
  for (int64_t m = 0; m < picked;
       ++m) {  // before the parallel loop: a message thrown inside it is lost
    const int64_t row = at[m * step];
    STD_TORCH_CHECK(0 <= row && row < rows, "index out of range: must lie in [0, ", rows, "), got ",
                    row);
  }
  Tensor y = torch::stable::new_empty(x, {picked, channels});
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  const int64_t across = x.stride(0) * bytes, along = x.stride(1) * bytes, line = channels * bytes;
  if (picked == 0 || line == 0) return y;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());

  const int64_t grain = (1 << 16) / line + 1;  // 64 KiB a task
  torch::stable::parallel_for(0, picked, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const char* source = from + at[m * step] * across;
      char* target = to + m * line;
      if (along == bytes || channels == 1) {
        std::memcpy(target, source, line);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          std::memcpy(target + c * bytes, source + c * along, bytes);
      }
    }
  });
  return y;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&hico::gather_tokens_cpu));
}
