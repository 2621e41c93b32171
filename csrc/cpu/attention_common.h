// What the drivers of the attention operations share: the checked batch, and who computes what.
#pragma once
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "cpu/attention_kernels.h"

namespace hico {

// A packed batch, checked and contiguous.
struct __attribute__((visibility("hidden"))) AttentionBatch {  // like torch::stable::Tensor
  Tensor q, k, v;                                              // [Sq, H, D], [Sk, Hkv, D] twice
  std::optional<Tensor> bias;                                  // [Sk] float32
  std::vector<int64_t> queries;  // [B + 1]: where each sequence begins
  std::vector<int64_t> keys;
  int64_t heads, key_heads, width;
  bool causal, bf16;
  float scale;

  int64_t sequences() const { return static_cast<int64_t>(queries.size()) - 1; }
  int64_t group() const { return heads / key_heads; }  // query heads of a key head
  // of a sequence and a key head
  AttentionGroup at(int64_t sequence, int64_t key_head) const;
  // address of row `row`, head `head` of a contiguous tensor [.., heads, D] of the batch's dtype
  template <typename Pointer>
  auto address(Pointer base, int64_t row, int64_t head, int64_t of) const {
    return base + (row * of + head) * width * (bf16 ? 2 : 4);
  }
};

AttentionBatch attention_batch(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                               int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
                               double scale, const std::optional<Tensor>& key_bias);

class Scratch {  // kept between calls by each thread
 public:
  float* at_least(int64_t size) {
    if (static_cast<int64_t>(floats_.size()) < size + 16) floats_.resize(size + 16);
    const auto address = reinterpret_cast<uintptr_t>(floats_.data());
    return floats_.data() + (-address % 64) / sizeof(float);  // vectors do not cross cache lines
  }

 private:
  std::vector<float> floats_;
};

// run(task) for every task below n, each taken by the next free thread: tasks differ in cost. What
// a task computes must not depend on who runs it.
template <typename Run>
void each_task(int64_t n, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, n < threads ? n : threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < n; task = next++) run(task);
  });
}

}  // namespace hico
