// Gradients of ragged attention for one block of rows, recomputed from the saved log-sum-exp
// (FlashAttention-2, arXiv 2307.08691, section 3.1.2). With s = scale * q k^T + bias,
//   p = exp(s - lse), ds = p * (dout v^T - delta), delta = sum of dout * out over the width,
//   dq = scale * ds k, dk = scale * ds^T q, dv = p^T dout.
// Seen from queries, rows are (q, dout) and columns (k, v); seen from keys the other way round. So
// one function serves both: first(row) . first(column) is the score, second . second is dp, and
// the sums over columns of ds * first(column) and p * second(column) are the gradients.
#pragma once
#include "cpu/attention_vector.h"

namespace hico::HICO_PATH {
namespace {

// base = lse and delta of every query and head, in the order of BackwardRows
template <typename T>
void backward_prepare(const BackwardRows& rows, int64_t query) {
  for (int64_t h = 0; h < rows.heads; ++h) {
    const int64_t at = (query * rows.heads + h) * rows.width;
    const T* out = static_cast<const T*>(rows.out) + at;
    const T* grad = static_cast<const T*>(rows.grad) + at;
    Lanes sum = {};
    for (int64_t c = 0; c < rows.width; c += kLanes) {
      sum += load_part(out, c, rows.width) * load_part(grad, c, rows.width);
    }
    const int64_t to = (h / rows.group * rows.queries + query) * rows.group + h % rows.group;
    rows.delta[to] = sum_of(sum);
    const float lse = rows.lse[h * rows.queries + query];
    rows.base[to] = lse == -INFINITY ? INFINITY : lse;  // exp(.. - inf) = 0: it saw nothing
  }
}

struct BackwardScratch {  // of one block of rows
  float *first, *second, *sum_first, *sum_second;
};

int64_t backward_scratch(int64_t rows, int64_t width) {
  const int64_t blocks = (rows + kRows - 1) / kRows, columns = round_up(width, kLanes);
  return blocks * kRows * 2 * (width + columns) + kTile * 2 * (width + columns) +
         2 * kRows * kScores;
}

template <typename T>
HICO_INLINE const T* row_of(const void* base, const BackwardSide& side, int64_t r) {
  return static_cast<const T*>(base) + r / side.heads * side.stride + r % side.heads * side.width;
}

// to = words of `count` rows from r on, padded with zero rows to `padded`
template <typename T, int kWidth>
HICO_INLINE void pack_side(const void* base, const BackwardSide& side, int64_t r, int64_t count,
                           float* to) {
  const T* row[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) row[i] = i < count ? row_of<T>(base, side, r + i) : nullptr;
  pack_words<T>(row, kWidth, side.width, kWidth, to);
}

// to = slabs as in pack_rows, of `count` rows from r on
template <typename T>
HICO_INLINE void pack_slabs(const void* base, const BackwardSide& side, int64_t r, int64_t count,
                            float* to) {
  for (int64_t i = 0; i < count; ++i) {
    pack_row(row_of<T>(base, side, r + i), i, side.width, kTile, to);
  }
}

// What a row or a column brings to a score, and to dp. Zero on the side that does not have it.
struct Terms {
  float bias, base, delta;
};
HICO_INLINE Terms terms_of(const BackwardSide& side, int64_t r) {
  return {side.bias ? side.bias[r] : 0, side.base ? side.base[r] : 0,
          side.delta ? side.delta[r] : 0};
}
struct TermsOfTile {
  float bias[kTile], base[kTile], delta[kTile];
};

// scores -> p and dp -> ds, in place, of the columns [from, to) that a row sees; 0 elsewhere
HICO_INLINE void weigh(float* scores, float* dp, int64_t begin, int64_t end, int64_t from,
                       int64_t to, float scale, const Terms& row, const TermsOfTile& column) {
  const Whole lane = lane_numbers();
  for (int64_t j = begin; j < end; j += kLanes) {
    // rounded as in the forward pass, so that the roundings in lse cancel
    const Lanes score = load(scores + j) * scale + (load(column.bias + j) + row.bias);
    Lanes p = exp_lanes(score - (load(column.base + j) + row.base));
    if (j < from || j + kLanes > to) {
      const Whole at = lane + static_cast<int32_t>(j);
      p = select((at >= static_cast<int32_t>(from)) & (at < static_cast<int32_t>(to)), p, Lanes{});
    }
    store(scores + j, p);
    store(dp + j, p * (load(dp + j) - (load(column.delta + j) + row.delta)));
  }
}

// out[i] += sum over k < depth of a[i][k] * b[k], in chains so short that roundings stay those of a
// blocked sum: the queries of a whole group of heads are summed here
template <int kN>
HICO_INLINE void add_sums(const float* a, const float* b, int64_t depth, int64_t stride,
                          float* out) {
  constexpr int64_t kChain = 32;
  Lanes total[kRows][kN] = {};
  for (int64_t k = 0; k < depth; k += kChain) {
    Lanes sum[kRows][kN] = {};
    const int64_t chain = depth - k < kChain ? depth - k : kChain;
    multiply<float, kScores, 1, kN>(a + k, b + k * kN * kLanes, chain, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) total[i][n] += sum[i][n];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int n = 0; n < kN; ++n) {
      float* at = out + i * stride + n * kLanes;
      store(at, load(at) + total[i][n]);
    }
  }
}

// out[i] += sum over the columns [from, to) of weights[i] * slab rows
HICO_INLINE void add_products(const float* weights, const float* slabs, int64_t from, int64_t to,
                              int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + kColumns <= columns; c += kColumns) {
    add_sums<kVectors>(weights + from, slabs + c * kTile + from * kColumns, to - from, columns,
                       out + c);
  }
  if (c < columns) {
    add_sums<1>(weights + from, slabs + c * kTile + from * kLanes, to - from, columns, out + c);
  }
}

template <typename T>
HICO_INLINE void scores_of(const float* a, const float* panels, int64_t begin, int64_t end,
                           int64_t depth, float* scores) {
  for (int64_t j = begin; j < end; j += kColumns) {
    Lanes sum[kRows][kVectors] = {};
    multiply<T, 1, kRows, kVectors>(a, panels + j * depth, depth, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) store(scores + i * kScores + j + n * kLanes, sum[i][n]);
    }
  }
}

template <typename T>
void write_rows(const float* sums, float factor, const BackwardSide& side, int64_t r, int64_t count,
                void* base) {
  const int64_t columns = round_up(side.width, kLanes);
  for (int64_t i = 0; i < count; ++i) {
    T* to = const_cast<T*>(row_of<T>(base, side, r + i));
    for (int64_t c = 0; c < side.width; c += kLanes) {
      store_part(to, c, side.width, load(sums + i * columns + c) * factor);
    }
  }
}

template <typename T>
void backward(const BackwardTile& tile, float* scratch) {
  const BackwardSide &rows = tile.rows, &cols = tile.columns;
  const int64_t width = rows.width, depth = words<T>(width), columns = round_up(width, kLanes);
  const int64_t blocks = (tile.count + kRows - 1) / kRows;
  const bool both = tile.grad_second != nullptr;

  float* first = scratch;  // panels of words
  float* second = first + kTile * width;
  float* first_rows = second + kTile * width;  // slabs of columns
  float* second_rows = first_rows + kTile * columns;
  float* scores = second_rows + kTile * columns;
  float* dp = scores + kRows * kScores;
  float* packed = dp + kRows * kScores;
  const auto part = [&](int64_t block) {
    float* at = packed + block * kRows * 2 * (depth + columns);
    float* sums = at + kRows * 2 * depth;
    return BackwardScratch{at, at + kRows * depth, sums, sums + kRows * columns};
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const BackwardScratch to = part(b);
    const int64_t r = b * kRows;
    pack_side<T, kRows>(rows.first, rows, tile.begin + r, tile.count - r, to.first);
    pack_side<T, kRows>(rows.second, rows, tile.begin + r, tile.count - r, to.second);
    std::memset(to.sum_first, 0, 2 * kRows * columns * sizeof(float));
  }

  const int64_t last = tile.to(tile.begin + tile.count - 1);
  for (int64_t c0 = tile.from(tile.begin); c0 < last; c0 += kTile) {
    const int64_t count = last - c0 < kTile ? last - c0 : kTile;
    for (int64_t j = 0; j < count; j += kColumns) {
      pack_side<T, kColumns>(cols.first, cols, c0 + j, count - j, first + j * depth);
      pack_side<T, kColumns>(cols.second, cols, c0 + j, count - j, second + j * depth);
    }
    pack_slabs<T>(cols.first, cols, c0, count, first_rows);
    if (both) pack_slabs<T>(cols.second, cols, c0, count, second_rows);
    TermsOfTile column = {};
    for (int64_t j = 0; j < count; ++j) {
      const Terms terms = terms_of(cols, c0 + j);
      column.bias[j] = terms.bias;
      column.base[j] = terms.base;
      column.delta[j] = terms.delta;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const BackwardScratch at = part(b);
      const int64_t r = tile.begin + b * kRows;
      const int64_t in_block = tile.count - b * kRows < kRows ? tile.count - b * kRows : kRows;
      const auto inside = [&](int64_t c) { return c < c0 ? 0 : c - c0 < count ? c - c0 : count; };
      const int64_t from = inside(tile.from(r)), to = inside(tile.to(r + in_block - 1));
      if (from >= to) continue;
      const int64_t begin = from / kColumns * kColumns;
      scores_of<T>(at.first, first, begin, to, depth, scores);
      scores_of<T>(at.second, second, begin, to, depth, dp);
      for (int64_t i = 0; i < in_block; ++i) {
        weigh(scores + i * kScores, dp + i * kScores, begin, round_up(to, kLanes),
              inside(tile.from(r + i)), inside(tile.to(r + i)), tile.scale, terms_of(rows, r + i),
              column);
      }
      add_products(dp, first_rows, from, to, columns, at.sum_first);
      if (both) add_products(scores, second_rows, from, to, columns, at.sum_second);
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const BackwardScratch from = part(b);
    const int64_t r = tile.begin + b * kRows;
    const int64_t count = tile.count - b * kRows < kRows ? tile.count - b * kRows : kRows;
    write_rows<T>(from.sum_first, tile.scale, rows, r, count, tile.grad_first);
    if (both) write_rows<T>(from.sum_second, 1, rows, r, count, tile.grad_second);
  }
}

}  // namespace
}  // namespace hico::HICO_PATH
