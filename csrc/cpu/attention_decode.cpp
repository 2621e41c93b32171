// ragged_decode_attention: one query per sequence over the first kv_lengths[b] entries of its
// cache. reference: hico_kernels/attention/reference.py A task is a block of kBlock entries of one
// sequence with all heads, so that memory is read in order; it leaves unnormalised sums, which a
// second pass combines in the order of the blocks. The blocks do not depend on threads. Bound by
// memory: keys and values are read once.
#include <algorithm>

#include "cpu/attention_common.h"

namespace hico {
namespace {

constexpr int64_t kBlock = 512;

std::vector<int64_t> lengths_of(const Tensor& kv_lengths, int64_t b, int64_t longest) {
  STD_TORCH_CHECK(kv_lengths.dim() == 1 && kv_lengths.size(0) == b, "kv_lengths must be [", b, "]");
  const bool narrow = kv_lengths.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || kv_lengths.scalar_type() == ScalarType::Long,
                  "kv_lengths must be int32 or int64");
  const int64_t step = kv_lengths.stride(0);
  std::vector<int64_t> lengths(b);
  for (int64_t i = 0; i < b; ++i) {
    lengths[i] = narrow ? data<int32_t>(kv_lengths)[i * step] : data<int64_t>(kv_lengths)[i * step];
    STD_TORCH_CHECK(0 <= lengths[i] && lengths[i] <= longest, "kv_lengths must lie in [0, ",
                    longest, "], got ", lengths[i]);
  }
  return lengths;
}

}  // namespace

// q [B, H, D], k_cache and v_cache [B, L, Hkv, D] any strides, kv_lengths [B] -> [B, H, D]
Tensor ragged_decode_attention_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                   const Tensor& kv_lengths, double scale) {
  HICO_CHECK_DIM(q_in, 3);
  HICO_CHECK_DIM(k_in, 4);
  HICO_CHECK_DIM(v_in, 4);
  const bool bf16 = q_in.scalar_type() == ScalarType::BFloat16;
  if (!bf16) HICO_CHECK_DTYPE(q_in, Float);
  STD_TORCH_CHECK(
      k_in.scalar_type() == q_in.scalar_type() && v_in.scalar_type() == q_in.scalar_type(),
      "k_cache and v_cache must have the dtype of q");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(v_in.size(i) == k_in.size(i), "v_cache must have the shape of k_cache");
  }
  const int64_t sequences = q_in.size(0), heads = q_in.size(1), width = q_in.size(2);
  const int64_t longest = k_in.size(1), key_heads = k_in.size(2);
  STD_TORCH_CHECK(k_in.size(0) == sequences && k_in.size(3) == width && key_heads >= 1 &&
                      heads % key_heads == 0,
                  "k_cache must be [B, L, Hkv, D] with B and D of q and Hkv dividing its heads");
  const std::vector<int64_t> lengths = lengths_of(kv_lengths, sequences, longest);

  // copying a cache costs as much as reading it: only where an entry itself is scattered
  const auto rows = [](const Tensor& x) {
    return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
  };
  const Tensor q = torch::stable::contiguous(q_in), k = rows(k_in), v = rows(v_in);
  Tensor out = torch::stable::new_empty(q, {sequences, heads, width});
  if (sequences == 0 || heads == 0) return out;

  struct Task {
    int64_t sequence, first, count;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_task(sequences + 1);
  for (int64_t b = 0; b < sequences; ++b) {
    first_task[b] = static_cast<int64_t>(tasks.size());
    for (int64_t at = 0; at < lengths[b]; at += kBlock) {
      tasks.push_back({b, at, std::min(kBlock, lengths[b] - at)});
    }
  }
  const int64_t n = static_cast<int64_t>(tasks.size());
  first_task[sequences] = n;

  // of every task: out [heads, columns], top [heads], total [heads]
  const int64_t columns = (width + 15) / 16 * 16, step = heads * (columns + 2);
  Tensor partial = torch::stable::new_empty(q, {n * step}, ScalarType::Float);
  float* const base = mutable_data<float>(partial);
  const AttentionKernels& kernels = attention_kernels();
  const int64_t bytes = bf16 ? 2 : 4;
  const auto address = [&](const Tensor& x, int64_t b, int64_t row) {
    const int64_t at = b * x.stride(0) + row * x.stride(1);
    return static_cast<const char*>(x.const_data_ptr()) + at * bytes;
  };
  const auto decode = bf16 ? kernels.decode_bf16 : kernels.decode_f32;
  each_task(n, [&](int64_t i) {
    thread_local Scratch scratch;
    const auto [b, first, count] = tasks[i];
    float* sums = base + i * step;
    const DecodeBlock block{
        static_cast<const char*>(q.const_data_ptr()) + b * heads * width * bytes,
        address(k, b, first),
        address(v, b, first),
        k.stride(1),
        k.stride(2),
        v.stride(1),
        v.stride(2),
        count,
        lengths[b] - first - count,
        heads,
        key_heads,
        width,
        static_cast<float>(scale),
        sums,
        sums + heads * columns,
        sums + heads * (columns + 1)};
    decode(block, scratch.at_least(kernels.decode_scratch(heads, key_heads, width)));
  });

  char* const result = static_cast<char*>(out.mutable_data_ptr());
  const auto combine = bf16 ? kernels.combine_bf16 : kernels.combine_f32;
  torch::stable::parallel_for(0, sequences * heads, heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads, first = first_task[b];
      const float* sums = base + first * step;
      combine(sums + h * columns, sums + heads * columns + h, sums + heads * (columns + 1) + h,
              first_task[b + 1] - first, step, step, width, result + i * width * bytes);
    }
  });
  return out;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("ragged_decode_attention", TORCH_BOX(&hico::ragged_decode_attention_cpu));
}
