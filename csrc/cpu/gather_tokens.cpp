// gather_tokens: y[m] = x[index[m]], rows of any dtype.  reference:
// hico_kernels/select/reference.py One memcpy per row when a row is contiguous, else element by
// element; threads take blocks of rows. Bound by memory: reads and writes M * C elements once.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/tensor.h"
#include "cpu/merge_apply.h"
#include "cpu/merge_kernels.h"
#include "cpu/pages.h"

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
  Tensor y = on_huge_pages(torch::stable::new_empty(x, {picked, channels}));
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

// grad [M, C] float32 or bfloat16, index [M] int64 -> [rows, C]
Tensor gather_tokens_backward_cpu(const Tensor& grad_in, const Tensor& index_in, int64_t rows) {
  HICO_CHECK_DIM(grad_in, 2);
  HICO_CHECK_DIM(index_in, 1);
  HICO_CHECK_DTYPE(index_in, Long);
  const bool bf16 = grad_in.scalar_type() == ScalarType::BFloat16;
  if (!bf16) HICO_CHECK_DTYPE(grad_in, Float);
  const int64_t picked = index_in.size(0), c = grad_in.size(1);
  STD_TORCH_CHECK(grad_in.size(0) == picked, "grad must have a row for each index");
  STD_TORCH_CHECK(0 <= rows && std::max(rows, picked) < std::numeric_limits<int32_t>::max(),
                  "num_rows must be in [0, 2^31), got ", rows);
  const Tensor grad = torch::stable::contiguous(grad_in),
               index = torch::stable::contiguous(index_in);
  const int64_t* at = data<int64_t>(index);
  std::vector<int32_t> target(picked), order(picked), first(rows + 1);
  for (int64_t m = 0; m < picked; ++m) {
    STD_TORCH_CHECK(0 <= at[m] && at[m] < rows, "index out of range: must lie in [0, ", rows,
                    "), got ", at[m]);
    target[m] = static_cast<int32_t>(at[m]);
  }
  list_members(target.data(), picked, rows, order.data(), first.data());
  Tensor x = on_huge_pages(torch::stable::new_empty(grad, {rows, c}));
  const auto mean = bf16 ? merge_kernels().mean_bf16 : merge_kernels().mean_f32;
  const int64_t line = (bf16 ? 2 : 4) * c;
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(x.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {  // a mean over a total of 1 is a sum
      const int32_t next = first[row + 1] < picked ? order[first[row + 1]] : 0;
      mean(from, order.data() + first[row], first[row + 1] - first[row], nullptr, 1.0f, c, next,
           to + row * line);
    }
  });
  return x;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&hico::gather_tokens_cpu));
  m.impl("gather_tokens_backward", TORCH_BOX(&hico::gather_tokens_backward_cpu));
}
