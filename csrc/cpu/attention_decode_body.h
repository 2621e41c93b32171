// One block of decoding: one query of every head over the keys [first, first + count) of a cache.
//   partial = (out, top, total): out = sum of exp(score - top) v, total = sum of
//   exp(score - top)
// A row of keys is read once for all query heads that share it (kHeads at a time); the next rows
// are prefetched while these are used. Scores lie by key, then head, so that a softmax over keys
// needs no sums across lanes.
#pragma once
#include "cpu/attention_decode_rows.h"

namespace hico::HICO_PATH {
namespace {

constexpr int kFew = 64;  // keys at a time: asked for while the ones before are used
constexpr int kStep = 2;  // keys at a time: each vector of queries is loaded for both

HICO_INLINE int64_t query_words(int64_t width) {
  return round_up(width, 2 * kLanes);
}  // either depth

int64_t decode_scratch(int64_t heads, int64_t key_heads, int64_t width) {
  return key_heads * kFew * kGroup + heads * query_words(width);
}

struct FewKeys {  // of a block: the entries [at, at + count), one chunk of heads of every group
  int64_t at, count;
  int64_t first;   // head of the group
  const float* q;  // [heads][words]
  float* scores;   // [key_heads][kFew][kGroup]
};

// scores[k][j][i] = q of head (k, first + i) . key j of key head k. Goes through memory in order,
// and asks for the values that are needed next in the same order: the prefetcher of the hardware
// follows.
template <typename T, int kHeads>
void few_scores(const DecodeBlock& b, const FewKeys& few) {
  constexpr int64_t kWide = kLanes * Words<T>::kDepth;  // elements of a vector of words
  const int64_t words = query_words(b.width), group = b.heads / b.key_heads;
  const int64_t whole = b.width / kWide * kWide;
  Prefetcher values = prefetcher<T>(b.v, few.at, few.count, b.v_row, b.v_head, b);
  for (int64_t j = 0; j < few.count; j += kStep) {
    const T* key[kStep];
    for (int s = 0; s < kStep; ++s) {
      const int64_t at = few.at + (j + s < few.count ? j + s : j);  // never beyond the sequence
      key[s] = static_cast<const T*>(b.k) + at * b.k_row;
    }
    for (int64_t k = 0; k < b.key_heads; ++k) {
      const float* q = few.q + (k * group + few.first) * words;
      Lanes sum[kStep][kGroup] = {};
      const auto add = [&](int64_t c, const Lanes(&x)[kStep]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < kHeads; ++i) {
          const Lanes query = load(q + i * words + c / Words<T>::kDepth);
#pragma GCC unroll 2
          for (int s = 0; s < kStep; ++s) Words<T>::add_products(sum[s][i], query, x[s]);
        }
      };
      for (int64_t c = 0; c < whole; c += kWide) {
        Lanes x[kStep];
        for (int s = 0; s < kStep; ++s) {
          x[s] = Words<T>::vector(key[s] + k * b.k_head + c);
          values.next();
        }
        add(c, x);
      }
      if (whole < b.width) {
        Lanes x[kStep];
        for (int s = 0; s < kStep; ++s) {
          x[s] = Words<T>::part(key[s] + k * b.k_head + whole, b.width - whole);
        }
        add(whole, x);
      }
      float* to = few.scores + (k * kFew + j) * kGroup;
      for (int s = 0; s < kStep; ++s, to += kGroup) {
        const Eight sums = sums_of(sum[s]);
        std::memcpy(to, &sums, sizeof sums);
      }
    }
  }
}

// scores [count][kGroup] -> weights exp(score - top), in place; new tops and totals; the
// factors by which earlier sums shrink.
void few_weights(float* scores, int64_t count, float scale, int heads, float* top, float* total,
                 float* factor) {
  const int64_t filled = round_up(count, 2) * kGroup;  // two keys to a vector
  for (int64_t j = count * kGroup; j < filled; ++j) scores[j] = -INFINITY;
  Lanes most = Lanes{} - INFINITY, before = most, old_total = {};
  for (int i = 0; i < heads; ++i) {
    before[i] = before[i + kGroup] = top[i];
    old_total[i] = total[i];
  }
  for (int64_t j = 0; j < filled; j += kLanes) {
    const Lanes x = load(scores + j) * scale;
    store(scores + j, x);
    most = select(x > most, x, most);
  }
  const Lanes other = swap_halves(most);
  most = select(other > most, other, most);
  const Lanes now = select(most > before, most, before);
  const Lanes base = select(now == Lanes{} - INFINITY, Lanes{}, now);
  const Lanes shrink = exp_lanes(before - base);
  Lanes sum = {};
  for (int64_t j = 0; j < filled; j += kLanes) {
    const Lanes weight = exp_lanes(load(scores + j) - base);
    store(scores + j, weight);
    sum += weight;
  }
  store(factor, shrink);
  const Lanes new_total = old_total * shrink + sum + swap_halves(sum);
  for (int i = 0; i < heads; ++i) {
    top[i] = now[i];
    total[i] = new_total[i];
  }
}

// out[i] = out[i] * shrink[i] + sum over keys j of weights[j * kGroup + i] * values[j], of the
// columns from c on
template <typename T, int kHeads>
HICO_INLINE void few_values(const float* weights, const T* values, int64_t stride, int64_t count,
                            int64_t c, int64_t width, const float* shrink, int64_t columns,
                            Prefetcher& keys, float* out) {
  constexpr int kN = 2;
  const bool whole = c + kN * kLanes <= width;
  Lanes sum[kHeads][kN] = {};
  for (int64_t j = 0; j < count; ++j, values += stride, weights += kGroup) {
    Lanes value[kN];
    for (int64_t line = 0; line < kN * kLanes * static_cast<int64_t>(sizeof(T)); line += 64) {
      keys.next();
    }
    if (whole) {
      load_two(values + c, value);
    } else {
      T part[kN * kLanes] = {};
      for (int64_t i = c; i < width; ++i) part[i - c] = values[i];
      load_two(part, value);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kHeads; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) sum[i][n] += weights[i] * value[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHeads; ++i) {
    ordered(values, sum[i]);
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      if (c + n * kLanes >= width) continue;
      float* at = out + i * columns + c + n * kLanes;
      store(at, load(at) * shrink[i] + sum[i][n]);
    }
  }
}

template <typename T, int kHeads>
void few_keys(const DecodeBlock& b, const FewKeys& few) {
  few_scores<T, kHeads>(b, few);
  const int64_t columns = round_up(b.width, kLanes), group = b.heads / b.key_heads;
  const int64_t next = few.at + few.count, after = b.count + b.following - next;
  const int64_t left = after < kFew ? after : kFew;
  Prefetcher keys = prefetcher<T>(b.k, next, left, b.k_row, b.k_head, b);
  for (int64_t k = 0; k < b.key_heads; ++k) {
    const int64_t head = k * group + few.first;
    float* scores = few.scores + k * kFew * kGroup;
    float factor[kLanes];
    few_weights(scores, few.count, b.scale, kHeads, b.top + head, b.total + head, factor);
    const T* values = static_cast<const T*>(b.v) + few.at * b.v_row + k * b.v_head;
    for (int64_t c = 0; c < b.width; c += 2 * kLanes) {
      few_values<T, kHeads>(scores, values, b.v_row, few.count, c, b.width, factor, columns, keys,
                            b.out + head * columns);
    }
  }
}

template <typename T>
void decode(const DecodeBlock& b, float* scratch) {
  const int64_t group = b.heads / b.key_heads, columns = round_up(b.width, kLanes);
  const int64_t words = query_words(b.width);
  for (int64_t h = 0; h < b.heads; ++h) {
    b.top[h] = -INFINITY;
    b.total[h] = 0;
  }
  std::memset(b.out, 0, b.heads * columns * sizeof(float));
  float *scores = scratch, *q = scratch + b.key_heads * kFew * kGroup;
  std::memset(q, 0, b.heads * words * sizeof(float));
  for (int64_t h = 0; h < b.heads; ++h) {
    const T* from = static_cast<const T*>(b.q) + h * b.width;
    for (int64_t w = 0; w * Words<T>::kDepth < b.width; ++w) {
      q[h * words + w] = Words<T>::one(from, w, b.width);
    }
  }
  constexpr void (*kRun[kGroup])(const DecodeBlock&, const FewKeys&) = {
      few_keys<T, 1>, few_keys<T, 2>, few_keys<T, 3>, few_keys<T, 4>,
      few_keys<T, 5>, few_keys<T, 6>, few_keys<T, 7>, few_keys<T, 8>};
  for (int64_t at = 0; at < b.count; at += kFew) {
    const int64_t count = b.count - at < kFew ? b.count - at : kFew;
    for (int64_t first = 0; first < group; first += kGroup) {
      const int64_t heads = group - first < kGroup ? group - first : kGroup;
      kRun[heads - 1](b, {at, count, first, q, scores});
    }
  }
}

// out[d] of one head from the partial results of its blocks, in order
template <typename T>
void combine(const float* out, const float* top, const float* total, int64_t blocks,
             int64_t out_step, int64_t step, int64_t width, void* result) {
  float most = -INFINITY;
  for (int64_t b = 0; b < blocks; ++b) most = top[b * step] > most ? top[b * step] : most;
  if (most == -INFINITY) most = 0;
  float sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += std::exp(top[b * step] - most) * total[b * step];
  constexpr int kWide = 8;  // vectors of columns that share an exponential
  for (int64_t c = 0; c < width; c += kWide * kLanes) {
    Lanes x[kWide] = {};
    const int64_t left = (width - c + kLanes - 1) / kLanes, vectors = left < kWide ? left : kWide;
    for (int64_t b = 0; b < blocks; ++b) {
      const float share = std::exp(top[b * step] - most);
      for (int64_t i = 0; i < vectors; ++i)
        x[i] += share * load(out + b * out_step + c + i * kLanes);
    }
    for (int64_t i = 0; i < vectors; ++i) {
      const Lanes value = sum == 0 ? Lanes{} : x[i] * (1.0f / sum);
      store_part(static_cast<T*>(result), c + i * kLanes, width, value);
    }
  }
}

}  // namespace
}  // namespace hico::HICO_PATH
