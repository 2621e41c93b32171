// bipartite_soft_matching: even tokens look for their most similar odd token, the r best pairs
// merge. reference: hico_kernels/merge/reference.py Both sides are brought to length 1; side b is
// packed into panels of 32 columns; products and their running maximum stay in registers. Threads
// take clips, or blocks of rows where there are fewer clips than threads. Bound by arithmetic: t *
// t / 2 * d FLOPs a clip.
#include "cpu/merge_match.h"

#include <algorithm>
#include <numeric>

#include "common/tensor.h"
#include "cpu/merge_kernels.h"
#include "cpu/path.h"

namespace hico {

const MergeKernels& merge_kernels() {
#if defined(__x86_64__)
  if (cpu_path() >= CpuPath::avx512) return merge_avx512;
  if (cpu_path() == CpuPath::avx2) return merge_avx2;
#endif
  return merge_baseline;
}

void match_round(const float* metric, int64_t t, int64_t d, int64_t r, Protected keep,
                 MatchScratch& scratch, int32_t* position) {
  if (r == 0) {
    std::iota(position, position + t, 0);
    return;
  }
  const MergeKernels& kernels = merge_kernels();
  const int64_t first_a = keep.class_token, first_b = keep.distill_token;
  const int64_t odd = t / 2, na = t - odd - first_a, nb = odd - first_b;
  auto& [a, b, panels, best, into, order] = scratch;
  a.resize(na * d);
  b.resize(nb * d);
  panels.resize((nb + kPanel - 1) / kPanel * kPanel * d);
  best.resize(na);
  into.resize(na);
  order.resize(na);

  kernels.unit_rows(metric + 2 * first_a * d, na, 2, d, a.data());
  kernels.unit_rows(metric + (2 * first_b + 1) * d, nb, 2, d, b.data());
  kernels.pack_panels(b.data(), nb, d, panels.data());
  torch::stable::parallel_for(0, na, 96, [&](int64_t begin, int64_t end) {
    kernels.best_match(a.data() + begin * d, end - begin, d, panels.data(), nb, best.data() + begin,
                       into.data() + begin);
  });

  std::iota(order.begin(), order.end(), 0);
  if (r < na) {  // else every token of side a merges and its order does not matter
    const auto better = [&](int32_t i, int32_t j) {
      return best[i] > best[j] || (best[i] == best[j] && i < j);
    };
    if (keep.class_token) {  // those that stay keep their places: which merge is all that counts
      std::nth_element(order.begin(), order.begin() + r, order.end(), better);
      std::sort(order.begin() + r, order.end());
    } else {
      std::sort(order.begin(), order.end(), better);
    }
  }
  const int64_t stay = na - r + first_a;
  const auto target = [&](int64_t j) {  // of the j-th odd token
    return static_cast<int32_t>(keep.distill_token && j == 0 ? 1 : stay + j);
  };
  if (keep.class_token) position[0] = 0;
  for (int64_t i = 0; i < na; ++i) {
    const int64_t token = 2 * (order[i] + first_a), rank = i - r + first_a;
    if (i < r) {
      position[token] = target(into[order[i]] + first_b);
    } else {
      position[token] = static_cast<int32_t>(keep.distill_token && rank > 0 ? rank + 1 : rank);
    }
  }
  for (int64_t j = 0; j < odd; ++j) position[2 * j + 1] = target(j);
}

// metric [N, T, D] -> assignment [N, T]
Tensor bipartite_soft_matching_cpu(const Tensor& metric_in, int64_t r, bool class_token,
                                   bool distill_token) {
  HICO_CHECK_DIM(metric_in, 3);
  const int64_t n = metric_in.size(0), t = metric_in.size(1), d = metric_in.size(2);
  const Protected keep{class_token, distill_token};
  STD_TORCH_CHECK(!distill_token || class_token, "distill_token needs class_token");
  const int64_t most = std::max<int64_t>(t - class_token - distill_token, 0) / 2;
  STD_TORCH_CHECK(0 <= r && r <= most, "r must be in [0, ", most, "], got ", r);
  const Tensor metric = torch::stable::contiguous(torch::stable::to(metric_in, ScalarType::Float));
  Tensor assignment = torch::stable::new_empty(metric, {n, t}, ScalarType::Int);
  const float* from = data<float>(metric);
  int32_t* to = mutable_data<int32_t>(assignment);
  const auto match = [&](int64_t begin, int64_t end) {
    thread_local MatchScratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      match_round(from + i * t * d, t, d, r, keep, scratch, to + i * t);
    }
  };
  if (n >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, n, 1, match);
  } else {
    match(0, n);
  }
  return assignment;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("bipartite_soft_matching", TORCH_BOX(&hico::bipartite_soft_matching_cpu));
}
