// text_guided_scores: softmax(scale * q k^T) over all keys of a sequence, mean over heads and text
// rows. reference: hico_kernels/select/reference.py Pass 1, by blocks of 64 keys: logits of all
// rows, weights exp(logit - the block's top), and the weights' sum. Then every row's log-sum-exp
// over its blocks, in the order of the blocks. Pass 2: the weights times exp(top - lse), summed
// over rows. Keys are read once; weights are kept between the passes, for at most kRows rows of a
// group at a time, so memory stays bounded. Threads take blocks. Bound by reading k for one text
// row, by the products for many.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "cpu/bounds.h"
#include "cpu/pages.h"
#include "cpu/path.h"
#include "cpu/score_kernels.h"

namespace hico {

const ScoreKernels& score_kernels() {
#if defined(__x86_64__)
  if (cpu_path() == CpuPath::avx512_bf16) return score_avx512_bf16;
  if (cpu_path() == CpuPath::avx512) return score_avx512;
  if (cpu_path() == CpuPath::avx2) return score_avx2;
#endif
  return score_baseline;
}

namespace {

constexpr int64_t kKept = 1 << 23;  // floats of weights that a thread keeps from call to call
constexpr int64_t kRows = 64;       // rows of a group whose weights are kept at once

struct Scratch {
  std::vector<float> queries, weights, top, sum, lse, factor;
};

// Room for the weights of `room` query rows and keys. A long video's is not kept after the call.
float* room_for_weights(int64_t room, const Tensor& like, Scratch& scratch,
                        std::optional<Tensor>& large) {
  if (room <= kKept) {
    scratch.weights.resize(room);
    return scratch.weights.data();
  }
  large = on_huge_pages(torch::stable::new_empty(like, {room}, ScalarType::Float));
  return mutable_data<float>(*large);
}

// Adds the weights of some query rows of one sequence to its scores.
void add_scores(const void* queries, const char* k, int64_t keys, const ScoreShape& shape,
                bool bf16, float mean, float* weights, Scratch& scratch, float* scores) {
  const ScoreKernels& kernels = score_kernels();
  const auto weigh = bf16 ? kernels.weigh_bf16 : kernels.weigh_f32;
  const int64_t rows = shape.groups * shape.rows, blocks = (keys + kScoreKeys - 1) / kScoreKeys;
  const int64_t line = shape.groups * shape.width * (bf16 ? 2 : 4);
  auto& [unused, kept, top, sum, lse, factor] = scratch;
  top.resize(blocks * rows);
  sum.resize(blocks * rows);
  lse.resize(rows);
  factor.resize(blocks * rows);
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> panel;
    panel.resize(kScoreKeys * score_steps(shape.width));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kScoreKeys;
      weigh(queries, k + first * line, std::min<int64_t>(kScoreKeys, keys - first), shape,
            panel.data(), weights + b * rows * kScoreKeys, top.data() + b * rows,
            sum.data() + b * rows);
    }
  });
  std::vector<float>& largest = lse;  // becomes the log-sum-exp once the sums are known
  std::copy_n(top.begin(), rows, largest.begin());
  for (int64_t b = 1; b < blocks; ++b) {
    for (int64_t r = 0; r < rows; ++r) largest[r] = std::max(largest[r], top[b * rows + r]);
  }
  std::vector<float> total(rows, 0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    float* share = factor.data() + b * rows;
    kernels.exp_difference(top.data() + b * rows, largest.data(), rows, share);
    for (int64_t r = 0; r < rows; ++r) total[r] += share[r] * sum[b * rows + r];
  }
  for (int64_t r = 0; r < rows; ++r) total[r] = mean / total[r];
  torch::stable::parallel_for(0, blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* share = factor.data() + b * rows;
      for (int64_t r = 0; r < rows; ++r) share[r] *= total[r];
      alignas(64) float block[kScoreKeys] = {};
      const int64_t first = b * kScoreKeys, count = std::min<int64_t>(kScoreKeys, keys - first);
      std::copy_n(scores + first, count, block);
      kernels.add_rows(weights + b * rows * kScoreKeys, share, rows, block);
      std::copy_n(block, count, scores + first);
    }
  });
}

}  // namespace

// q [R, H, D], k [S, Hkv, D] float32 or bfloat16 -> [S] float32
Tensor text_guided_scores_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, double scale) {
  HICO_CHECK_DIM(q_in, 3);
  HICO_CHECK_DIM(k_in, 3);
  const bool bf16 = q_in.scalar_type() == ScalarType::BFloat16;
  if (!bf16) HICO_CHECK_DTYPE(q_in, Float);
  STD_TORCH_CHECK(k_in.scalar_type() == q_in.scalar_type(), "k must have the dtype of q");
  const int64_t heads = q_in.size(1), groups = k_in.size(1), width = q_in.size(2);
  STD_TORCH_CHECK(groups >= 1 && heads >= 1 && heads % groups == 0 && k_in.size(2) == width,
                  "k must fit the heads of q");
  const std::vector<int64_t> text = bounds_of("cu_seqlens_q", cu_seqlens_q, q_in.size(0));
  const std::vector<int64_t> keys = bounds_of("cu_seqlens_k", cu_seqlens_k, k_in.size(0));
  STD_TORCH_CHECK(text.size() == keys.size(),
                  "cu_seqlens_q and cu_seqlens_k must have equal length");
  const Tensor q = torch::stable::contiguous(q_in), k = torch::stable::contiguous(k_in);
  Tensor scores = torch::stable::new_zeros(k, {k.size(0)}, ScalarType::Float);
  const int64_t bytes = bf16 ? 2 : 4, share = heads / groups, steps = score_steps(width);
  const char* from = static_cast<const char*>(q.const_data_ptr());
  const char* rows_of_k = static_cast<const char*>(k.const_data_ptr());
  float* to = mutable_data<float>(scores);
  const auto pack = bf16 ? score_kernels().pack_bf16 : score_kernels().pack_f32;

  const auto run = [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = text[b + 1] - text[b], first = keys[b], length = keys[b + 1] - first;
      if (count == 0 || length == 0) continue;
      const int64_t most = std::max<int64_t>(kRows / share, 1), turns = (count + most - 1) / most;
      const int64_t at_once = (count + turns - 1) / turns;
      const int64_t blocks = (length + kScoreKeys - 1) / kScoreKeys;
      std::optional<Tensor> large;
      float* weights = room_for_weights(blocks * kScoreKeys * heads * at_once, k, scratch, large);
      for (int64_t r0 = 0; r0 < count; r0 += at_once) {
        const int64_t now = std::min(at_once, count - r0);
        const ScoreShape shape{now * share, groups, width, static_cast<float>(scale)};
        scratch.queries.resize(groups * shape.rows * steps);
        for (int64_t r = 0; r < now; ++r) {
          for (int64_t h = 0; h < heads; ++h) {  // [group][text row][head of the group]
            const int64_t row = (h / share * now + r) * share + h % share;
            pack(from + ((text[b] + r0 + r) * heads + h) * width * bytes, width,
                 scratch.queries.data() + row * steps);
          }
        }
        add_scores(scratch.queries.data(), rows_of_k + first * groups * width * bytes, length,
                   shape, bf16, 1.0f / static_cast<float>(count * heads), weights, scratch,
                   to + first);
      }
    }
  };
  const int64_t sequences = static_cast<int64_t>(keys.size()) - 1;
  if (sequences >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, sequences, 1, run);
  } else {
    run(0, sequences);
  }
  return scores;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("text_guided_scores", TORCH_BOX(&hico::text_guided_scores_cpu));
}
