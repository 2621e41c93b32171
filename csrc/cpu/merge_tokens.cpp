// merge_tokens: repeated bipartite soft matching down to K tokens, and the mean of every token's
// members. reference: hico_kernels/merge/reference.py Plan, then merge: one pass over x gives the
// metric [T, C / heads]; all rounds run on it in cache; a second pass averages the members. Threads
// take clips, or rows where there are fewer clips than threads. Bound by memory (x read twice) plus
// arithmetic (a third of T * T * C / heads multiply-adds).
#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "cpu/merge_apply.h"
#include "cpu/merge_kernels.h"
#include "cpu/merge_match.h"
#include "cpu/pages.h"

namespace hico {
namespace {

struct Clip {              // one clip's pointers, and sizes common to all
  const char *x, *metric;  // of the tokens, and what is summed over heads
  char* tokens;
  int32_t *sizes, *assignment;
};

struct Shape {
  int64_t t, k, c, bytes;          // of x
  int64_t heads, d, metric_bytes;  // of the metric
};

struct Scratch {
  MatchScratch match;
  std::vector<float> metric, merged;
  std::vector<int32_t> position, order, first;
};

void plan(const Clip& clip, const Shape& s, Scratch& scratch) {
  const MergeKernels& kernels = merge_kernels();
  auto& [match, metric, merged, position, order, first] = scratch;
  metric.resize(s.t * s.d);
  merged.resize(s.t * s.d);
  position.resize(s.t);
  const auto head_sum = s.metric_bytes == 2 ? kernels.head_sum_bf16 : kernels.head_sum_f32;
  torch::stable::parallel_for(0, s.t, 64, [&](int64_t begin, int64_t end) {
    const int64_t line = s.heads * s.d * s.metric_bytes;
    head_sum(clip.metric + begin * line, end - begin, s.heads, s.d, metric.data() + begin * s.d);
  });
  std::iota(clip.assignment, clip.assignment + s.t, 0);
  for (int64_t t = s.t; t > s.k;) {
    const int64_t r = std::min(t - s.k, t / 2);
    match_round(metric.data(), t, s.d, r, {}, match, position.data());
    std::fill_n(merged.begin(), (t - r) * s.d, 0.0f);
    kernels.merge_rows(metric.data(), t, s.d, position.data(), merged.data());
    metric.swap(merged);
    for (int64_t i = 0; i < s.t; ++i) clip.assignment[i] = position[clip.assignment[i]];
    t -= r;
  }
}

void apply(const Clip& clip, const Shape& s, Scratch& scratch) {
  const MergeKernels& kernels = merge_kernels();
  std::vector<int32_t>&order = scratch.order, &first = scratch.first;
  order.resize(s.t);
  first.resize(s.k + 1);
  list_members(clip.assignment, s.t, s.k, order.data(), first.data());
  const auto mean = s.bytes == 2 ? kernels.mean_bf16 : kernels.mean_f32;
  const int64_t c = s.c;
  torch::stable::parallel_for(0, s.k, 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int32_t count = first[p + 1] - first[p];
      clip.sizes[p] = count;
      const int32_t next = first[p + 1] < s.t ? order[first[p + 1]] : 0;
      mean(clip.x, order.data() + first[p], count, nullptr, static_cast<float>(count), c, next,
           clip.tokens + p * c * s.bytes);
    }
  });
}

}  // namespace

// x [N, T, C] float32 or bfloat16, metric [N, T, D] (none: the mean over heads of x) -> tokens [N,
// K, C], sizes [N, K], assignment [N, T]
std::tuple<Tensor, Tensor, Tensor> merge_tokens_cpu(const Tensor& x_in, int64_t k, int64_t heads,
                                                    const std::optional<Tensor>& metric_in) {
  HICO_CHECK_DIM(x_in, 3);
  const int64_t n = x_in.size(0), t = x_in.size(1), c = x_in.size(2);
  STD_TORCH_CHECK(1 <= k && k <= t, "num_tokens must be in [1, ", t, "], got ", k);
  STD_TORCH_CHECK(heads >= 1 && c % heads == 0, "num_heads must divide ", c, ", got ", heads);
  const bool bf16 = x_in.scalar_type() == ScalarType::BFloat16;
  if (!bf16) HICO_CHECK_DTYPE(x_in, Float);
  const Tensor x = torch::stable::contiguous(x_in);
  Shape s{t, k, c, bf16 ? 2 : 4, heads, c / heads, bf16 ? 2 : 4};
  Tensor metric = x;
  if (metric_in) {
    STD_TORCH_CHECK(metric_in->dim() == 3 && metric_in->size(0) == n && metric_in->size(1) == t,
                    "metric must be [N, T, D] with N and T of x");
    const bool narrow = metric_in->scalar_type() == ScalarType::BFloat16;
    metric = torch::stable::contiguous(narrow ? *metric_in
                                              : torch::stable::to(*metric_in, ScalarType::Float));
    s.heads = 1, s.d = metric.size(2), s.metric_bytes = narrow ? 2 : 4;
  }
  Tensor tokens = on_huge_pages(torch::stable::new_empty(x, {n, k, c}));
  Tensor sizes = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  Tensor assignment = torch::stable::new_empty(x, {n, t}, ScalarType::Int);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const char* like = static_cast<const char*>(metric.const_data_ptr());
  char* to = static_cast<char*>(tokens.mutable_data_ptr());
  int32_t *count = mutable_data<int32_t>(sizes), *position = mutable_data<int32_t>(assignment);
  const auto merge = [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const Clip clip{from + i * t * c * s.bytes, like + i * t * s.heads * s.d * s.metric_bytes,
                      to + i * k * c * s.bytes, count + i * k, position + i * t};
      plan(clip, s, scratch);
      if (k == t) {
        std::copy_n(clip.x, t * c * s.bytes, clip.tokens);
        std::fill_n(clip.sizes, k, 1);
      } else {
        apply(clip, s, scratch);
      }
    }
  };
  if (n >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, n, 1, merge);
  } else {
    merge(0, n);
  }
  return {tokens, sizes, assignment};
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("merge_tokens", TORCH_BOX(&hico::merge_tokens_cpu));
}
