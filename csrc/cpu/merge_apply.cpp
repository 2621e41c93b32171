// merge_apply: y[n, k] = mean of x[n, t] over assignment[n, t] == k, weighted by sizes when given,
// and its gradient. reference: hico_kernels/merge/reference.py
// A counting sort lists the members of every position in token order, so that a sum has one order
// whatever the number of threads; the first member's thread adds the rows of its position in
// registers, in float32, and rounds once, or copies the row where it is alone. Threads take tokens.
// Bound by memory: reads x once, writes y once.
#include "cpu/merge_apply.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "cpu/merge_kernels.h"
#include "cpu/pages.h"

namespace hico {

void list_members(const int32_t* assignment, int64_t t, int64_t k, int32_t* order, int32_t* first) {
  std::fill_n(first, k + 1, 0);
  for (int64_t i = 0; i < t; ++i) ++first[assignment[i] + 1];
  for (int64_t p = 0; p < k; ++p) first[p + 1] += first[p];
  for (int64_t i = 0; i < t; ++i) order[first[assignment[i]]++] = static_cast<int32_t>(i);
  for (int64_t p = k; p > 0; --p) first[p] = first[p - 1];  // filling moved every start to the next
  first[0] = 0;
}

namespace {

bool is_bf16(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return true;
  HICO_CHECK_DTYPE(x, Float);
  return false;
}

void check_assignment(const Tensor& assignment, int64_t k) {
  const int32_t* to = data<int32_t>(assignment);
  for (int64_t i = 0; i < assignment.numel(); ++i) {
    STD_TORCH_CHECK(0 <= to[i] && to[i] < k, "assignment must lie in [0, ", k, "), got ", to[i]);
  }
}

std::optional<Tensor> as_float(const std::optional<Tensor>& sizes, int64_t n, int64_t t) {
  if (!sizes) return std::nullopt;
  STD_TORCH_CHECK(sizes->dim() == 2 && sizes->size(0) == n && sizes->size(1) == t,
                  "sizes must be [N, T]");
  return torch::stable::contiguous(torch::stable::to(*sizes, ScalarType::Float));
}

}  // namespace

// x [N, T, C], assignment [N, T] int32, sizes [N, T] -> [N, K, C], [N, K]
std::tuple<Tensor, Tensor> merge_apply_cpu(const Tensor& x_in, const Tensor& assignment_in,
                                           int64_t k, const std::optional<Tensor>& sizes) {
  HICO_CHECK_DIM(x_in, 3);
  HICO_CHECK_DIM(assignment_in, 2);
  HICO_CHECK_DTYPE(assignment_in, Int);
  const int64_t n = x_in.size(0), t = x_in.size(1), c = x_in.size(2);
  STD_TORCH_CHECK(assignment_in.size(0) == n && assignment_in.size(1) == t,
                  "assignment must be [N, T] of x");
  STD_TORCH_CHECK(0 <= k && k <= std::numeric_limits<int32_t>::max(),
                  "num_tokens must be in [0, 2^31), got ", k);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor assignment = torch::stable::contiguous(assignment_in);
  check_assignment(assignment, k);
  const std::optional<Tensor> weights = as_float(sizes, n, t);
  const float* weight = weights ? data<float>(*weights) : nullptr;

  // The output first: torch says so when it is too large, before anything smaller is asked for.
  Tensor y = on_huge_pages(torch::stable::new_empty(x, {n, k, c}));
  std::vector<int32_t> order(n * t), first(n * (k + 1));
  for (int64_t i = 0; i < n; ++i) {
    list_members(data<int32_t>(assignment) + i * t, t, k, order.data() + i * t,
                 first.data() + i * (k + 1));
  }
  Tensor totals = torch::stable::new_empty(x, {n, k}, ScalarType::Float);
  const bool bf16 = is_bf16(x);
  const auto mean = bf16 ? merge_kernels().mean_bf16 : merge_kernels().mean_f32;
  const int64_t bytes = bf16 ? 2 : 4;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  float* total = mutable_data<float>(totals);
  const int32_t* position = data<int32_t>(assignment);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* start = first.data() + i * (k + 1);
    for (int64_t p = 0; p < k; ++p) {
      if (start[p] != start[p + 1]) continue;
      total[i * k + p] = 0;
      std::fill_n(to + (i * k + p) * c * bytes, c * bytes, 0);
    }
  }
  // In the order of the tokens, each position with its first: where few tokens merge, x is then
  // read page after page, and not every second page twice over.
  torch::stable::parallel_for(0, n * t, 32, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t i = token / t, row = i * k + position[token];
      const int32_t* start = first.data() + i * (k + 1) + position[token];
      const int32_t* member = order.data() + i * t + start[0];
      const int32_t own_place = static_cast<int32_t>(token - i * t);
      if (member[0] != own_place) continue;
      const int64_t count = start[1] - start[0];
      const float* own = weight ? weight + i * t : nullptr;
      total[row] = 0;
      for (int64_t m = 0; m < count; ++m) total[row] += own ? own[member[m]] : 1.0f;
      if (total[row] == 0) {
        std::fill_n(to + row * c * bytes, c * bytes, 0);
      } else if (count == 1 && std::isfinite(total[row])) {
        std::copy_n(from + token * c * bytes, c * bytes, to + row * c * bytes);
      } else {
        mean(from + i * t * c * bytes, member, count, own, total[row], c,
             std::min<int32_t>(own_place + 1, t - 1), to + row * c * bytes);
      }
    }
  });
  return {y, torch::stable::to(totals, sizes ? sizes->scalar_type() : ScalarType::Int)};
}

// grad [N, K, C], assignment [N, T] int32, merged_sizes [N, K], sizes [N, T] -> gradient of x [N,
// T, C]
Tensor merge_backward_cpu(const Tensor& grad_in, const Tensor& assignment_in,
                          const Tensor& merged_sizes, const std::optional<Tensor>& sizes) {
  HICO_CHECK_DIM(grad_in, 3);
  HICO_CHECK_DIM(assignment_in, 2);
  HICO_CHECK_DTYPE(assignment_in, Int);
  const int64_t n = grad_in.size(0), k = grad_in.size(1), c = grad_in.size(2);
  const int64_t t = assignment_in.size(1);
  STD_TORCH_CHECK(assignment_in.size(0) == n, "assignment must be [N, T] of grad");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor assignment = torch::stable::contiguous(assignment_in);
  check_assignment(assignment, k);
  const Tensor totals = *as_float(merged_sizes, n, k);
  const std::optional<Tensor> weights = as_float(sizes, n, t);
  const float *weight = weights ? data<float>(*weights) : nullptr, *total = data<float>(totals);

  Tensor y = on_huge_pages(torch::stable::new_empty(grad, {n, t, c}));
  const bool bf16 = is_bf16(grad);
  const auto scale = bf16 ? merge_kernels().scale_row_bf16 : merge_kernels().scale_row_f32;
  const int64_t line = (bf16 ? 2 : 4) * c;
  const int32_t* position = data<int32_t>(assignment);
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, n * t, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t source = row / t * k + position[row];
      const float share = total[source] == 0 ? 0 : (weight ? weight[row] : 1.0f) / total[source];
      scale(from + source * line, share, c, to + row * line);
    }
  });
  return y;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("merge_apply", TORCH_BOX(&hico::merge_apply_cpu));
  m.impl("merge_backward", TORCH_BOX(&hico::merge_backward_cpu));
}
