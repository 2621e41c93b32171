// ragged_attention: out = softmax(scale * q k^T + bias) v for every sequence of a packed batch.
// reference: hico_kernels/attention/reference.py
// A task is a block of queries of one sequence with all query heads that share a key head, so that
// keys and values are packed once for all of them. Blocks are fixed and the dearest are taken
// first: threads change who computes, not what. Bound by arithmetic: 4 * width FLOPs a visible
// pair; in bfloat16 the scores take the bf16 dot product, weights times values stays in float32.
#include <algorithm>
#include <tuple>

#include "cpu/attention_common.h"

namespace hico {
namespace {

constexpr int64_t kTileRows = 168;  // queries times heads of a task: packing a key tile is 1/40

struct Task {
  int64_t sequence, key_head, first, count, cost;
};

std::vector<Task> list_tasks(const AttentionBatch& batch) {
  const int64_t step = std::max<int64_t>(1, kTileRows / batch.group());
  std::vector<Task> tasks;
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    const AttentionGroup g = batch.at(s, 0);
    for (int64_t first = 0; first < g.queries; first += step) {
      const int64_t count = std::min(step, g.queries - first);
      const int64_t cost = g.visible(first + count - 1) * count;
      for (int64_t h = 0; h < batch.key_heads; ++h) tasks.push_back({s, h, first, count, cost});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

}  // namespace

// q [Sq, H, D], k and v [Sk, Hkv, D], key_bias [Sk] -> out [Sq, H, D], lse [H, Sq]
std::tuple<Tensor, Tensor> ragged_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& cu_seqlens_q,
                                                const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                int64_t max_seqlen_k, bool causal, double scale,
                                                std::optional<Tensor> key_bias) {
  const AttentionBatch batch = attention_batch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                               max_seqlen_k, causal, scale, key_bias);
  const int64_t rows = q.size(0), heads = batch.heads, group = batch.group();
  Tensor out = torch::stable::new_empty(q, {rows, heads, batch.width});
  Tensor lse = torch::stable::new_empty(q, {heads, rows}, ScalarType::Float);
  if (rows == 0 || heads == 0) return {out, lse};
  char* const out_base = static_cast<char*>(out.mutable_data_ptr());
  float* const lse_base = mutable_data<float>(lse);

  const std::vector<Task> tasks = list_tasks(batch);
  const AttentionKernels& kernels = attention_kernels();
  const auto forward = batch.bf16 ? kernels.forward_bf16 : kernels.forward_f32;
  each_task(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    thread_local Scratch scratch;
    const Task& task = tasks[i];
    const int64_t q0 = batch.queries[task.sequence], head = task.key_head * group;
    const ForwardTile tile{batch.at(task.sequence, task.key_head),
                           task.first,
                           task.count,
                           batch.address(out_base, q0, head, heads),
                           lse_base + head * rows + q0,
                           rows};
    forward(tile, scratch.at_least(kernels.forward_scratch(task.count * group, batch.width)));
  });
  return {out, lse};
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&hico::ragged_attention_cpu));
}
