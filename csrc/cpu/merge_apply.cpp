// merge_apply: y[n, k] = mean of x[n, t] over assignment[n, t] == k, weighted by sizes when given.
// reference: hico_kernels/merge/reference.py
// A counting sort lists the members of every position in token order (so the sum has one order
// whatever the number of threads); then each position adds its rows in float32 and rounds once.
// Threads take positions. Bound by memory: reads x once, writes y once.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "common/tensor.h"

namespace hico {
namespace {

struct BFloat16 {
  uint16_t bits;
};

HICO_SIMD void add_row(const float* __restrict__ x, float weight, float* __restrict__ sum,
                       int64_t n) {
  for (int64_t c = 0; c < n; ++c) sum[c] += weight * x[c];
}

HICO_SIMD void add_row(const BFloat16* __restrict__ x, float weight, float* __restrict__ sum,
                       int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t bits = static_cast<uint32_t>(x[c].bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    sum[c] += weight * value;
  }
}

HICO_SIMD void store_row(const float* __restrict__ sum, float total, float* __restrict__ y,
                         int64_t n) {
  for (int64_t c = 0; c < n; ++c) y[c] = sum[c] / total;
}

HICO_SIMD void store_row(const float* __restrict__ sum, float total, BFloat16* __restrict__ y,
                         int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const float value = sum[c] / total;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest even
    y[c].bits = static_cast<uint16_t>(bits >> 16);
  }
}

// order[n * T + i]: tokens of clip n sorted by position; first[n * (K + 1) + k]: where position k
// begins among them.
void list_members(const int32_t* assignment, int64_t n, int64_t t, int64_t k, int32_t* order,
                  int32_t* first) {
  std::fill_n(first, n * (k + 1), 0);
  for (int64_t b = 0; b < n; ++b) {
    const int32_t* to = assignment + b * t;
    int32_t* start = first + b * (k + 1);
    for (int64_t i = 0; i < t; ++i) {
      STD_TORCH_CHECK(0 <= to[i] && to[i] < k, "assignment must lie in [0, ", k, "), got ", to[i]);
      ++start[to[i] + 1];
    }
    for (int64_t p = 0; p < k; ++p) start[p + 1] += start[p];
    std::vector<int32_t> next(start, start + k);
    for (int64_t i = 0; i < t; ++i) order[b * t + next[to[i]]++] = static_cast<int32_t>(i);
  }
}

template <typename T>
void mean_rows(const Tensor& x, const float* weights, const int32_t* order, const int32_t* first,
               int64_t k, Tensor& y) {
  const int64_t n = x.size(0), t = x.size(1), c = x.size(2);
  const T* from = data<T>(x);
  T* to = mutable_data<T>(y);
  torch::stable::parallel_for(0, n * k, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(c);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / k;
      const int32_t* start = first + b * (k + 1) + row % k;
      float total = 0;
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int32_t i = start[0]; i < start[1]; ++i) {
        const int64_t token = b * t + order[b * t + i];
        const float weight = weights ? weights[token] : 1.0f;
        total += weight;
        add_row(from + token * c, weight, sum.data(), c);
      }
      if (total == 0.0f) {
        std::fill_n(to + row * c, c, T{});
      } else {
        store_row(sum.data(), total, to + row * c, c);
      }
    }
  });
}

}  // namespace

// x [N, T, C], assignment [N, T] int32, sizes [N, T] int32 or the dtype of x -> [N, K, C], [N, K]
std::tuple<Tensor, Tensor> merge_apply_cpu(const Tensor& x_in, const Tensor& assignment_in,
                                           int64_t num_tokens,
                                           const std::optional<Tensor>& sizes_in) {
  HICO_CHECK_DIM(x_in, 3);
  HICO_CHECK_DIM(assignment_in, 2);
  HICO_CHECK_DTYPE(assignment_in, Int);
  const int64_t n = x_in.size(0), t = x_in.size(1);
  STD_TORCH_CHECK(assignment_in.size(0) == n && assignment_in.size(1) == t,
                  "assignment must be [N, T] of x");
  STD_TORCH_CHECK(num_tokens >= 0, "num_tokens must be at least 0, got ", num_tokens);
  const Tensor x = torch::stable::contiguous(x_in),
               assignment = torch::stable::contiguous(assignment_in);
  std::vector<int32_t> order(n * t), first(n * (num_tokens + 1));
  list_members(data<int32_t>(assignment), n, t, num_tokens, order.data(), first.data());

  std::optional<Tensor> weights;
  Tensor merged = torch::stable::new_empty(x, {n, num_tokens}, ScalarType::Int);
  if (sizes_in) {
    STD_TORCH_CHECK(sizes_in->dim() == 2 && sizes_in->size(0) == n && sizes_in->size(1) == t,
                    "sizes must be [N, T]");
    weights = torch::stable::contiguous(torch::stable::to(*sizes_in, ScalarType::Float));
  }
  const float* pw = weights ? data<float>(*weights) : nullptr;
  Tensor y = torch::stable::new_empty(x, {n, num_tokens, x.size(2)});
  if (x.scalar_type() == ScalarType::Float) {
    mean_rows<float>(x, pw, order.data(), first.data(), num_tokens, y);
  } else {
    HICO_CHECK_DTYPE(x, BFloat16);
    mean_rows<BFloat16>(x, pw, order.data(), first.data(), num_tokens, y);
  }
  Tensor totals = torch::stable::new_empty(x, {n, num_tokens}, ScalarType::Float);
  float* sum = mutable_data<float>(totals);
  int32_t* count = mutable_data<int32_t>(merged);
  for (int64_t row = 0; row < n * num_tokens; ++row) {
    const int64_t b = num_tokens ? row / num_tokens : 0;
    const int32_t* start = first.data() + b * (num_tokens + 1) + row % num_tokens;
    count[row] = start[1] - start[0];
    sum[row] = 0;
    for (int32_t i = start[0]; pw && i < start[1]; ++i) sum[row] += pw[b * t + order[b * t + i]];
  }
  if (sizes_in) merged = torch::stable::to(totals, sizes_in->scalar_type());
  return {y, merged};
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("merge_apply", TORCH_BOX(&hico::merge_apply_cpu));
}
