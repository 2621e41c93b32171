// The inner loops of ragged attention, one table of them per CPU path.
#pragma once
#include <cstdint>

namespace hico {

// What one sequence and one group of query heads that share a key head have in common. Tensors are
// contiguous; pointers are at the sequence's first position and the group's first head.
struct AttentionGroup {
  const void *q, *k, *v;        // [queries, .., width], [keys, .., width]
  const float* bias;            // [keys] or null
  int64_t queries, keys;        // of the sequence
  int64_t heads, width;         // query heads of the group
  int64_t q_stride, kv_stride;  // elements from one position to the next
  int64_t seen;                 // keys that query 0 sees; query i sees i more (if causal)
  bool causal;
  float scale;

  int64_t visible(int64_t query) const {  // keys [0, visible) are seen
    const int64_t limit = causal ? seen + query : keys;
    return limit < 0 ? 0 : limit < keys ? limit : keys;
  }
};

// out and lse of the queries [first, first + count)
struct ForwardTile {
  AttentionGroup group;
  int64_t first, count;
  void* out;           // like q
  float* lse;          // of query 0 and the first head
  int64_t lse_stride;  // from one head to the next
};

// One sequence's query over count entries of its cache: partial results, before the division.
struct DecodeBlock {
  const void *q, *k, *v;                 // [heads, width] contiguous; the block's first entry
  int64_t k_row, k_head, v_row, v_head;  // strides in elements
  int64_t count, following;  // entries; entries of the sequence behind them, to prefetch
  int64_t heads, key_heads, width;
  float scale;
  float *out, *top, *total;  // [heads, width to 16], [heads], [heads]
};

// All queries and heads of a batch, contiguous, and what the backward pass derives for each.
struct BackwardRows {
  const void *out, *grad;                // [queries, heads, width]
  const float* lse;                      // [heads, queries]
  int64_t queries, heads, group, width;  // group: query heads of a key head
  float *base, *delta;                   // [heads / group, queries, group]
};

// The queries (times the heads of a group) or the keys of a sequence.
struct BackwardSide {
  const void *first, *second;        // q and dout, or k and v: [rows / heads, .., width]
  int64_t heads, stride, width;      // row r is head r % heads at position r / heads
  const float *bias, *base, *delta;  // [rows] or null: p = exp(score + bias - base)
};

// Gradients of the rows [begin, begin + count) from all columns.
struct BackwardTile {
  BackwardSide rows, columns;
  AttentionGroup group;
  bool from_keys;  // rows are keys
  int64_t begin, count;
  float scale;
  void *grad_first, *grad_second;  // like rows.first and rows.second; the second may be null

  // row r sees the columns [from, to)
  int64_t from(int64_t r) const {
    const int64_t query = from_keys && group.causal ? r - group.seen + 1 : 0;
    return query > 0 ? query * group.heads : 0;
  }
  int64_t to(int64_t r) const {
    return from_keys ? group.queries * group.heads : group.visible(r / group.heads);
  }
};

struct AttentionKernels {
  using Forward = void (*)(const ForwardTile& tile, float* scratch);
  Forward forward_f32, forward_bf16;
  // floats of scratch that `forward` needs for `rows` = queries * heads of a tile
  int64_t (*forward_scratch)(int64_t rows, int64_t width);

  using Decode = void (*)(const DecodeBlock& block, float* scratch);
  Decode decode_f32, decode_bf16;
  int64_t (*decode_scratch)(int64_t heads, int64_t key_heads, int64_t width);
  // the result of one head from its blocks' partial ones, `out_step` and `step` floats apart
  using Combine = void (*)(const float* out, const float* top, const float* total, int64_t blocks,
                           int64_t out_step, int64_t step, int64_t width, void* result);
  Combine combine_f32, combine_bf16;

  using Prepare = void (*)(const BackwardRows& rows, int64_t query);
  Prepare prepare_f32, prepare_bf16;
  using Backward = void (*)(const BackwardTile& tile, float* scratch);
  Backward backward_f32, backward_bf16;
  int64_t (*backward_scratch)(int64_t rows, int64_t width);
};

const AttentionKernels& attention_kernels();  // of the CPU path in use (attention.cpp)
extern const AttentionKernels attention_avx512_bf16, attention_avx512, attention_avx2,
    attention_baseline;

}  // namespace hico
