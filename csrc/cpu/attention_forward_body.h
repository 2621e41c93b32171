// One tile of ragged attention: the queries [first, first + count) of all heads of a group.
//   out = softmax(scale * q k^T + bias) v, lse = log sum exp(scale * q k^T + bias)
// Online softmax over tiles of kTile keys, which are packed once for all rows of the tile; scores
// of kRows rows live in L1. Rows are ordered by query, then head, so a block of rows sees about the
// same keys and skips what lies beyond.
#pragma once
#include "cpu/attention_vector.h"

namespace hico::HICO_PATH {
namespace {

constexpr int kStats = kLanes;  // rows of a block, padded: kRows <= 16

struct ForwardScratch {  // of one block of rows
  float *q, *out, *top, *total;
};

int64_t forward_scratch(int64_t rows, int64_t width) {
  const int64_t blocks = (rows + kRows - 1) / kRows, columns = round_up(width, kLanes);
  const int64_t block = kRows * width + kRows * columns + kStats + kRows * kLanes;
  return blocks * block + kTile * (width + columns) + kRows * kScores;
}

// Scores of a block of rows -> weights exp(score - top), in place; the new tops and the
// factors by which what was summed before shrinks.
HICO_INLINE void softmax(float* scores, int64_t columns, const int64_t* visible, float scale,
                         const float* bias, float* top, float* total, float* shrink) {
  const Whole lane = lane_numbers();
  float tile_top[kStats] = {}, shift[kStats];
  for (int i = 0; i < kRows; ++i) {
    float* row = scores + i * kScores;
    Lanes most = Lanes{} - INFINITY;
    for (int64_t j = 0; j < columns; j += kLanes) {
      Lanes x = load(row + j) * scale;
      if (bias) x += load(bias + j);
      if (j + kLanes > visible[i]) {
        x = select(lane + static_cast<int32_t>(j) < static_cast<int32_t>(visible[i]), x,
                   Lanes{} - INFINITY);
      }
      store(row + j, x);
      most = select(x > most, x, most);
    }
    tile_top[i] = max_of(most);
  }
  const Lanes before = load(top), here = load(tile_top);
  const Lanes now = select(here > before, here, before);
  // a row that has seen nothing yet: -inf - 0 instead of -inf - -inf
  const Lanes base = select(now == Lanes{} - INFINITY, Lanes{}, now);
  store(shrink, exp_lanes(before - base));
  store(top, now);
  store(shift, base);
  for (int i = 0; i < kRows; ++i) {
    float* row = scores + i * kScores;
    Lanes sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Lanes weight = exp_lanes(load(row + j) - shift[i]);
      sum += weight;
      store(row + j, weight);
    }
    store(total + i * kLanes, load(total + i * kLanes) * shrink[i] + sum);
  }
}

template <int kN>
HICO_INLINE void add_values(const float* weights, const float* values, int64_t keys,
                            const float* shrink, int64_t stride, float* out) {
  Lanes sum[kRows][kN] = {};
  multiply<float, kScores, 1, kN>(weights, values, keys, sum);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      float* at = out + i * stride + n * kLanes;
      store(at, load(at) * shrink[i] + sum[i][n]);
    }
  }
}

template <typename T>
void forward(const ForwardTile& tile, float* scratch) {
  const AttentionGroup& g = tile.group;
  const int64_t rows = tile.count * g.heads, depth = words<T>(g.width);
  const int64_t columns = round_up(g.width, kLanes);
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const T* q = static_cast<const T*>(g.q) + tile.first * g.q_stride;

  float* keys = scratch;  // [panel][word][kColumns]
  float* values = keys + kTile * g.width;
  float* scores = values + kTile * columns;
  float* packed = scores + kRows * kScores;
  const int64_t block_size = kRows * (depth + columns + kLanes) + kStats;
  const auto part = [&](int64_t block) {
    float* at = packed + block * block_size;
    float* out = at + kRows * depth;
    return ForwardScratch{at, out, out + kRows * columns, out + kRows * columns + kStats};
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const ForwardScratch to = part(b);
    const T* row[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = b * kRows + i;
      row[i] = r < rows ? q + r / g.heads * g.q_stride + r % g.heads * g.width : nullptr;
    }
    pack_words<T>(row, kRows, g.width, kRows, to.q);
    std::memset(to.out, 0, kRows * columns * sizeof(float));
    std::memset(to.total, 0, kRows * kLanes * sizeof(float));
    store(to.top, Lanes{} - INFINITY);
  }

  const int64_t last = g.visible(tile.first + tile.count - 1);
  for (int64_t k0 = 0; k0 < last; k0 += kTile) {
    const int64_t count = last - k0 < kTile ? last - k0 : kTile;
    const T* k = static_cast<const T*>(g.k) + k0 * g.kv_stride;
    for (int64_t j = 0; j < count; j += kColumns) {
      const T* row[kColumns];
      for (int64_t i = 0; i < kColumns; ++i) {
        row[i] = j + i < count ? k + (j + i) * g.kv_stride : nullptr;
      }
      pack_words<T>(row, kColumns, g.width, kColumns, keys + j * depth);
    }
    for (int64_t j = 0; j < count; ++j) {
      const T* row = static_cast<const T*>(g.v) + (k0 + j) * g.kv_stride;
      pack_row(row, j, g.width, kTile, values);
    }
    float bias[kTile] = {};
    if (g.bias) std::memcpy(bias, g.bias + k0, count * sizeof(float));

    for (int64_t b = 0; b < blocks; ++b) {
      const ForwardScratch to = part(b);
      int64_t visible[kRows], most = 0;  // keys of this tile that each row sees
      for (int i = 0; i < kRows; ++i) {
        const int64_t r = b * kRows + i;
        const int64_t limit = r < rows ? g.visible(tile.first + r / g.heads) - k0 : 0;
        visible[i] = limit < 0 ? 0 : limit < count ? limit : count;
        if (visible[i] > most) most = visible[i];
      }
      if (most == 0) continue;
      for (int64_t j = 0; j < most; j += kColumns) {
        Lanes sum[kRows][kVectors] = {};
        multiply<T, 1, kRows, kVectors>(to.q, keys + j * depth, depth, sum);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
          for (int n = 0; n < kVectors; ++n)
            store(scores + i * kScores + j + n * kLanes, sum[i][n]);
        }
      }
      float shrink[kStats];
      softmax(scores, round_up(most, kLanes), visible, g.scale, g.bias ? bias : nullptr, to.top,
              to.total, shrink);
      int64_t c = 0;
      for (; c + kColumns <= columns; c += kColumns) {
        add_values<kVectors>(scores, values + c * kTile, most, shrink, columns, to.out + c);
      }
      if (c < columns) add_values<1>(scores, values + c * kTile, most, shrink, columns, to.out + c);
    }
  }

  for (int64_t b = 0; b < blocks; ++b) {
    const ForwardScratch from = part(b);
    for (int64_t r = b * kRows; r < rows && r < (b + 1) * kRows; ++r) {
      const int64_t i = r - b * kRows, query = tile.first + r / g.heads, head = r % g.heads;
      const float total = sum_of(load(from.total + i * kLanes)), top = from.top[i];
      const bool empty = total == 0;
      T* out = static_cast<T*>(tile.out) + query * g.q_stride + head * g.width;
      for (int64_t c = 0; c < g.width; c += kLanes) {
        const Lanes x = load(from.out + i * columns + c) * (1.0f / total);
        store_part(out, c, g.width, empty ? Lanes{} : x);
      }
      // all scores NaN leave the top at -inf and the total NaN
      tile.lse[head * tile.lse_stride + query] =
          empty ? -INFINITY : (top == -INFINITY ? 0.0f : top) + std::log(total);
    }
  }
}

}  // namespace
}  // namespace hico::HICO_PATH
