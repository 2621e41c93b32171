// The inner loops of merging, one table of them per CPU path. Rows of tokens are float32 or
// bfloat16.
#pragma once
#include <cstdint>

namespace hico {

constexpr int kPanel = 32;  // columns of a packed panel

struct MergeKernels {
  // sums[t, 0:d] = sum over heads of x[t, h * d : (h + 1) * d]
  using HeadSum = void (*)(const void* x, int64_t rows, int64_t heads, int64_t d, float* sums);
  HeadSum head_sum_f32, head_sum_bf16;
  // out[i] = row i * stride of sums at length 1; a zero row stays zero
  void (*unit_rows)(const float* sums, int64_t rows, int64_t stride, int64_t d, float* out);
  // panels[j / kPanel][k][j % kPanel] = unit row j, zero beyond `rows`
  void (*pack_panels)(const float* unit, int64_t rows, int64_t d, float* panels);
  // for every row of a: its largest product with the `columns` packed rows, and the first place of
  // it
  void (*best_match)(const float* a, int64_t rows, int64_t d, const float* panels, int64_t columns,
                     float* best, int32_t* into);
  // out[position[t]] += sums[t], in the order of t
  void (*merge_rows)(const float* sums, int64_t rows, int64_t d, const int32_t* position,
                     float* out);
  // y = sum of weight[m] * x[m] over the members m, divided by total; null weights are ones. The
  // row `next` of x is fetched meanwhile.
  using Mean = void (*)(const void* x, const int32_t* member, int64_t count, const float* weight,
                        float total, int64_t c, int32_t next, void* y);
  Mean mean_f32, mean_bf16;
  // y = factor * x
  using ScaleRow = void (*)(const void* x, float factor, int64_t c, void* y);
  ScaleRow scale_row_f32, scale_row_bf16;
};

const MergeKernels& merge_kernels();  // of the CPU path in use (merge_match.cpp)
extern const MergeKernels merge_avx512, merge_avx2, merge_baseline;

}  // namespace hico
