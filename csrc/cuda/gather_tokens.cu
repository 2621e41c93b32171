// gather_tokens: y[m] = x[index[m]], rows of any dtype.  reference:
// hico_kernels/select/reference.py One block per 4 rows, one warp per row, 16 bytes a lane where
// rows are aligned to that, else one element. Bound by memory: reads and writes M * C elements
// once. An index outside x reads row 0 of nothing: it writes zeros.
#include "common/cuda.h"

namespace hico {

constexpr int kWarps = 4;

template <typename Word>  // a row is `words` Words, consecutive rows of x are `across` Words apart
__global__ void gather_rows(const Word* __restrict__ x, int64_t rows, int64_t across, int64_t along,
                            const int64_t* __restrict__ index, int64_t step, int64_t picked,
                            int64_t words, Word* __restrict__ y) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (m >= picked) return;
  const int64_t row = index[m * step];
  const bool inside = 0 <= row && row < rows;
  const Word* source = x + (inside ? row : 0) * across;
  for (int64_t c = threadIdx.x % 32; c < words; c += 32)
    y[m * words + c] = inside ? source[c * along] : Word{};
}

template <typename Word>
void launch(const Tensor& x, const Tensor& index, Tensor& y, cudaStream_t stream) {
  const int64_t ratio = sizeof(Word) / x.element_size(), picked = index.size(0);
  const auto blocks = static_cast<unsigned>((picked + kWarps - 1) / kWarps);
  gather_rows<Word><<<blocks, 32 * kWarps, 0, stream>>>(
      static_cast<const Word*>(x.const_data_ptr()), x.size(0), x.stride(0) / ratio,
      ratio > 1 ? 1 : x.stride(1), data<int64_t>(index), index.stride(0), picked, x.size(1) / ratio,
      static_cast<Word*>(y.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor gather_tokens_cuda(const Tensor& x,
                          const Tensor& index) {  // x [S, C] any strides, index [M] int64
  HICO_CHECK_DIM(x, 2);
  HICO_CHECK_DIM(index, 1);
  HICO_CHECK_DTYPE(index, Long);
  STD_TORCH_CHECK(x.get_device_index() == index.get_device_index(),
                  "index must be on the device of x");
  const Launch on(x);
  Tensor y = torch::stable::new_empty(x, {index.size(0), x.size(1)});
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  if (y.numel() == 0) return y;
  STD_TORCH_CHECK(x.size(0) > 0, "index out of range: x has no rows");
  const bool wide = x.stride(1) == 1 && x.size(1) * bytes % 16 == 0 &&
                    x.stride(0) * bytes % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  if (wide) {
    launch<uint4>(x, index, y, on.stream);
  } else if (bytes == 8) {
    launch<uint64_t>(x, index, y, on.stream);
  } else if (bytes == 4) {
    launch<uint32_t>(x, index, y, on.stream);
  } else if (bytes == 2) {
    launch<uint16_t>(x, index, y, on.stream);
  } else {
    STD_TORCH_CHECK(bytes == 1, "x must have elements of 1, 2, 4 or 8 bytes, got ", bytes);
    launch<uint8_t>(x, index, y, on.stream);
  }
  return y;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CUDA, m) {
  m.impl("gather_tokens", TORCH_BOX(&hico::gather_tokens_cuda));
}
