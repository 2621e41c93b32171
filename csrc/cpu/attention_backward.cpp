// ragged_attention_backward: dq, dk and dv from the saved output and log-sum-exp.
// reference: hico_kernels/attention/reference.py
// Tasks are blocks of queries (with the heads of a group) that gather dq, and blocks of keys that
// gather dk and dv over all queries and heads of their group: every gradient is summed in one place
// in float32, in a fixed order, and rounded once. Bound by arithmetic: seven products a visible
// pair where five would do, since the two kinds of tasks share no scores.
#include <algorithm>
#include <tuple>

#include "cpu/attention_common.h"

namespace hico {
namespace {

constexpr int64_t kTileRows = 168;

struct Task {
  bool from_keys;
  int64_t sequence, key_head, begin, count, cost;
};

std::vector<Task> list_tasks(const AttentionBatch& batch) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < batch.sequences(); ++s) {
    BackwardTile tile{};
    tile.group = batch.at(s, 0);
    for (const bool from_keys : {false, true}) {
      tile.from_keys = from_keys;
      const int64_t rows = from_keys ? tile.group.keys : tile.group.queries * tile.group.heads;
      for (int64_t begin = 0; begin < rows; begin += kTileRows) {
        const int64_t count = std::min(kTileRows, rows - begin), last = begin + count - 1;
        const int64_t seen = std::max<int64_t>(0, tile.to(last) - tile.from(begin));
        const int64_t cost = seen * count * (from_keys ? 4 : 3);
        for (int64_t h = 0; h < batch.key_heads; ++h) {
          tasks.push_back({from_keys, s, h, begin, count, cost});
        }
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

}  // namespace

// grad, q and out [Sq, H, D], k and v [Sk, Hkv, D], lse [H, Sq] float32 -> dq, dk, dv
std::tuple<Tensor, Tensor, Tensor> ragged_attention_backward_cpu(
    const Tensor& grad_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_in,
    const Tensor& lse_in, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale,
    std::optional<Tensor> key_bias) {
  const AttentionBatch batch = attention_batch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                               max_seqlen_k, causal, scale, key_bias);
  for (const Tensor& x : {grad_in, out_in}) {
    STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), "grad and out must have the dtype of q");
    STD_TORCH_CHECK(
        x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2),
        "grad and out must have the shape of q");
  }
  HICO_CHECK_DTYPE(lse_in, Float);
  STD_TORCH_CHECK(lse_in.dim() == 2 && lse_in.size(0) == q.size(1) && lse_in.size(1) == q.size(0),
                  "lse must be [H, Sq]");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor out = torch::stable::contiguous(out_in), lse = torch::stable::contiguous(lse_in);

  const int64_t rows = q.size(0), heads = batch.heads, group = batch.group();
  Tensor dq = torch::stable::new_empty(q, {rows, heads, batch.width});
  Tensor dk = torch::stable::new_empty(q, {k.size(0), batch.key_heads, batch.width});
  Tensor dv = torch::stable::new_empty(q, {k.size(0), batch.key_heads, batch.width});
  Tensor derived = torch::stable::new_empty(q, {2, heads, rows}, ScalarType::Float);
  float* const base = mutable_data<float>(derived);
  float* const delta = base + heads * rows;

  const AttentionKernels& kernels = attention_kernels();
  const BackwardRows all{out.const_data_ptr(),
                         grad.const_data_ptr(),
                         data<float>(lse),
                         rows,
                         heads,
                         group,
                         batch.width,
                         base,
                         delta};
  const auto prepare = batch.bf16 ? kernels.prepare_bf16 : kernels.prepare_f32;
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) prepare(all, query);
  });

  if (heads == 0) {  // no query to gather from
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  const std::vector<Task> tasks = list_tasks(batch);
  const auto backward = batch.bf16 ? kernels.backward_bf16 : kernels.backward_f32;
  const char* const grad_base = static_cast<const char*>(grad.const_data_ptr());
  char* const grads[] = {static_cast<char*>(dq.mutable_data_ptr()),
                         static_cast<char*>(dk.mutable_data_ptr()),
                         static_cast<char*>(dv.mutable_data_ptr())};
  each_task(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    thread_local Scratch scratch;
    const Task& task = tasks[i];
    const AttentionGroup g = batch.at(task.sequence, task.key_head);
    const int64_t q0 = batch.queries[task.sequence], k0 = batch.keys[task.sequence];
    const int64_t head = task.key_head * group, derived_at = (task.key_head * rows + q0) * group;
    const BackwardSide queries{g.q,
                               batch.address(grad_base, q0, head, heads),
                               g.heads,
                               g.q_stride,
                               g.width,
                               nullptr,
                               base + derived_at,
                               delta + derived_at};
    const BackwardSide keys{g.k, g.v, 1, g.kv_stride, g.width, g.bias, nullptr, nullptr};
    BackwardTile tile{queries,    keys,    g,       task.from_keys, task.begin,
                      task.count, g.scale, nullptr, nullptr};
    if (task.from_keys) {
      std::swap(tile.rows, tile.columns);
      tile.grad_first = batch.address(grads[1], k0, task.key_head, batch.key_heads);
      tile.grad_second = batch.address(grads[2], k0, task.key_head, batch.key_heads);
    } else {
      tile.grad_first = batch.address(grads[0], q0, head, heads);
    }
    backward(tile, scratch.at_least(kernels.backward_scratch(task.count, batch.width)));
  });
  return {dq, dk, dv};
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("ragged_attention_backward", TORCH_BOX(&hico::ragged_attention_backward_cpu));
}
