// Checks and layout of a batch of packed sequences, and the choice of machine code.
#include "cpu/attention_common.h"

#include <algorithm>
#include <string>

#include "cpu/bounds.h"
#include "cpu/path.h"

namespace hico {

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  switch (cpu_path()) {
    case CpuPath::avx512_bf16:
      return attention_avx512_bf16;
    case CpuPath::avx512:
      return attention_avx512;
    case CpuPath::avx2:
      return attention_avx2;
    case CpuPath::baseline:
      break;
  }
#endif
  return attention_baseline;
}

namespace {

void check_longest(const char* name, int64_t given, const std::vector<int64_t>& bounds) {
  int64_t longest = 0;
  for (size_t i = 1; i < bounds.size(); ++i) longest = std::max(longest, bounds[i] - bounds[i - 1]);
  STD_TORCH_CHECK(given >= longest, name, " must be at least the longest sequence, ", longest,
                  ", got ", given);
}

}  // namespace

AttentionGroup AttentionBatch::at(int64_t sequence, int64_t key_head) const {
  const int64_t q0 = queries[sequence], k0 = keys[sequence];
  AttentionGroup g;
  g.q = address(static_cast<const char*>(q.const_data_ptr()), q0, key_head * group(), heads);
  g.k = address(static_cast<const char*>(k.const_data_ptr()), k0, key_head, key_heads);
  g.v = address(static_cast<const char*>(v.const_data_ptr()), k0, key_head, key_heads);
  g.bias = bias ? data<float>(*bias) + k0 : nullptr;
  g.queries = queries[sequence + 1] - q0;
  g.keys = keys[sequence + 1] - k0;
  g.heads = group();
  g.width = width;
  g.q_stride = heads * width;
  g.kv_stride = key_heads * width;
  g.seen = g.keys - g.queries + 1;  // bottom right: the last query sees every key
  g.causal = causal;
  g.scale = scale;
  return g;
}

AttentionBatch attention_batch(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                               int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
                               double scale, const std::optional<Tensor>& key_bias) {
  HICO_CHECK_DIM(q, 3);
  HICO_CHECK_DIM(k, 3);
  HICO_CHECK_DIM(v, 3);
  const bool bf16 = q.scalar_type() == ScalarType::BFloat16;
  if (!bf16) HICO_CHECK_DTYPE(q, Float);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "k and v must have the dtype of q");
  STD_TORCH_CHECK(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, "k must have heads that divide ",
                  q.size(1), ", got ", k.size(1));
  STD_TORCH_CHECK(k.size(2) == q.size(2), "k must have the head width of q");
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(v.size(i) == k.size(i), "v must have the shape of k");
  }
  const auto contiguous = [](const Tensor& x) { return torch::stable::contiguous(x); };
  std::optional<Tensor> bias;
  if (key_bias) {
    STD_TORCH_CHECK(key_bias->dim() == 1 && key_bias->size(0) == k.size(0), "key_bias must be [",
                    k.size(0), "]");
    bias = contiguous(torch::stable::to(*key_bias, ScalarType::Float));
  }
  AttentionBatch batch{contiguous(q),
                       contiguous(k),
                       contiguous(v),
                       bias,
                       bounds_of("cu_seqlens_q", cu_seqlens_q, q.size(0)),
                       bounds_of("cu_seqlens_k", cu_seqlens_k, k.size(0)),
                       q.size(1),
                       k.size(1),
                       q.size(2),
                       causal,
                       bf16,
                       static_cast<float>(scale)};
  STD_TORCH_CHECK(batch.keys.size() == batch.queries.size(), "cu_seqlens_k must describe the ",
                  batch.queries.size() - 1, " sequences of cu_seqlens_q, got ",
                  batch.keys.size() - 1);
  check_longest("max_seqlen_q", max_seqlen_q, batch.queries);
  check_longest("max_seqlen_k", max_seqlen_k, batch.keys);
  return batch;
}

}  // namespace hico
