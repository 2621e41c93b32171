// The bodies of ScoreKernels for one CPU path. The file that includes this defines HICO_PATH (its
// namespace), HICO_ROWS (query rows held in registers), HICO_VECTORS (vectors of keys beside them)
// and HICO_FEW_ROWS (up to how many rows keys are not packed; 0: registers do not suffice).
//
// Keys are the columns: a block is transposed once into a panel [step][key], and every query row of
// its group multiplies it, so that keys are read once for all heads and rows and never repeated.
// For few rows the transposing would cost more than the products: there keys are multiplied as they
// lie.
#include "cpu/exp.h"
#include "cpu/score_kernels.h"
#include "cpu/vector.h"

namespace hico::HICO_PATH {

// A step of a product is one channel, widened to float32 when the panel is packed.
template <typename T>
struct Multiply {
  using Element = T;
  static constexpr int kChannels = 1;
  static Lanes load_steps(const T* k) { return load(k); }
  static void pack_step(const T* q, int, void* step) {
    const float value = load1(q);
    std::memcpy(step, &value, sizeof value);
  }
  static void add(Lanes& sum, const float* query, const Lanes& keys) { sum += *query * keys; }
  static void add(Lanes& sum, const Lanes& query, const Lanes& keys) { sum += query * keys; }
};

// rows[0..15] of 16 lanes -> their transpose. Pairs within 128 bits first, then the 128-bit
// quarters: of the ways to do it in 64 shuffles, the one whose shuffles are single cheap
// instructions.
inline void transpose(Lanes* rows) {
  constexpr Whole kLow1 = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Whole kHigh1 = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr Whole kLow2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Whole kHigh2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  constexpr Whole kEven = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr Whole kOdd = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  Lanes x[kLanes], y[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    x[i] = __builtin_shuffle(rows[i], rows[i + 1], kLow1);
    x[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], kHigh1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // y[i + c]: column c of every quarter, of rows i to i + 3
    y[i] = __builtin_shuffle(x[i], x[i + 2], kLow2);
    y[i + 1] = __builtin_shuffle(x[i], x[i + 2], kHigh2);
    y[i + 2] = __builtin_shuffle(x[i + 1], x[i + 3], kLow2);
    y[i + 3] = __builtin_shuffle(x[i + 1], x[i + 3], kHigh2);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Lanes even = __builtin_shuffle(y[c], y[c + 4], kEven);  // quarters 0 and 2 of rows 0 to 7
    const Lanes odd = __builtin_shuffle(y[c], y[c + 4], kOdd);
    const Lanes even8 = __builtin_shuffle(y[c + 8], y[c + 12], kEven);
    const Lanes odd8 = __builtin_shuffle(y[c + 8], y[c + 12], kOdd);
    rows[c] = __builtin_shuffle(even, even8, kEven);
    rows[c + 4] = __builtin_shuffle(odd, odd8, kEven);
    rows[c + 8] = __builtin_shuffle(even, even8, kOdd);
    rows[c + 12] = __builtin_shuffle(odd, odd8, kOdd);
  }
}

// k [keys] rows `stride` elements apart -> panel [step][kScoreKeys]; missing keys and channels are
// zero
template <typename Step>
void pack_keys(const typename Step::Element* k, int64_t keys, int64_t stride, int64_t width,
               float* panel) {
  constexpr int kSpan = kLanes * Step::kChannels;
  for (int64_t j = 0; j < kScoreKeys; j += kLanes) {
    for (int64_t c = 0; c < width; c += kSpan) {
      Lanes tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const auto* row = k + (j + i) * stride + c;
        if (j + i < keys && c + kSpan <= width) {
          tile[i] = Step::load_steps(row);
        } else {
          typename Step::Element padded[kSpan] = {};
          if (j + i < keys)
            std::memcpy(padded, row, (width - c < kSpan ? width - c : kSpan) * sizeof *row);
          tile[i] = Step::load_steps(padded);
        }
      }
      transpose(tile);
      float* to = panel + c / Step::kChannels * kScoreKeys + j;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + i * kScoreKeys, tile[i]);
    }
  }
}

// The lines from `next` on are fetched meanwhile, two a step: rows of keys are too far apart for a
// hardware prefetcher to follow, and here the memory would otherwise rest.
template <typename Step, int kRows, bool kFetch>
void multiply(const float* query, int64_t line, int64_t steps, const float* panel, float scale,
              const char* next, float* logits) {
  constexpr int kVectors = HICO_VECTORS;
  for (int j = 0; j < kScoreKeys; j += kVectors * kLanes) {
    Lanes sum[kRows][kVectors] = {};
    const float* column = panel + j;
    for (int64_t s = 0; s < steps; ++s, column += kScoreKeys) {
      if constexpr (kFetch) {
        constexpr int kLines =
            2 * Step::kChannels * kVectors * kLanes * sizeof(typename Step::Element) / 128;
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
      }
      Lanes keys[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) keys[v] = load(column + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Step::add(sum[i][v], query + i * line + s, keys[v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(logits + i * kScoreKeys + j + v * kLanes, sum[i][v] * scale);
      }
    }
  }
}

template <typename Step>
void multiply_rows(int64_t rows, const float* query, int64_t line, int64_t steps,
                   const float* panel, float scale, const char* next, float* logits) {
  bool fetch = true;
  while (rows > 0) {
    const int64_t tiles = (rows + HICO_ROWS - 1) / HICO_ROWS, now = (rows + tiles - 1) / tiles;
    switch (now) {
#define HICO_TILE(n)                                                              \
  case n:                                                                         \
    if constexpr (n <= HICO_ROWS) {                                               \
      if (fetch) {                                                                \
        multiply<Step, n, true>(query, line, steps, panel, scale, next, logits);  \
      } else {                                                                    \
        multiply<Step, n, false>(query, line, steps, panel, scale, next, logits); \
      }                                                                           \
    }                                                                             \
    break;
      HICO_TILE(1)
      HICO_TILE(2) HICO_TILE(3) HICO_TILE(4) HICO_TILE(5) HICO_TILE(6) HICO_TILE(7) HICO_TILE(8)
#undef HICO_TILE
    }
    fetch = false;
    rows -= now;
    query += now * line;
    logits += now * kScoreKeys;
  }
}

// Lanes of a and b that differ in bit kBit of their number, added: those with the bit clear hold
// sums of a, the others of b. Folding 16 vectors pairwise, bits 8, 4, 2, 1, leaves the sum of
// vector i in lane i.
template <int kBit>
inline Lanes fold(const Lanes& a, const Lanes& b) {
  Whole keep, swap;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    keep[i] = i & kBit ? kLanes + i : i;
    swap[i] = i & kBit ? kLanes + i - kBit : i + kBit;
  }
  return __builtin_shuffle(a, b, keep) + __builtin_shuffle(a, b, swap);
}

// Products of kRows query rows with keys as they lie, whose rows are full vectors. Four keys at a
// time: each vector that is loaded serves four products.
template <typename Step, int kRows>
void multiply_unpacked(const float* query, int64_t line, const typename Step::Element* k,
                       int64_t keys, int64_t stride, int64_t width, float scale, const char* next,
                       float* logits) {
  constexpr int kSpan = kLanes * Step::kChannels, kHalf = (kRows + 1) / 2;
  constexpr int kLines = 4 * kSpan * sizeof *k / 64 / (kRows > 1 ? 2 : 1);
  for (int64_t j = 0; j < kScoreKeys; j += kLanes) {
    Lanes part[4][kRows];
    for (int i = 0; i < 4; ++i) {
      const typename Step::Element* row[4];
      for (int m = 0; m < 4; ++m) {
        const int64_t key = j + i + 4 * m;
        row[m] = k + (key < keys ? key : keys - 1) * stride;
      }
      const auto half = [&](const int first, const int count) __attribute__((always_inline)) {
        Lanes sum[kHalf][4] = {};
        const float* q = query + first * line;
        for (int64_t c = 0; c < width; c += kSpan, q += kLanes) {
          Lanes key[4];
#pragma GCC unroll 4
          for (int m = 0; m < 4; ++m) key[m] = Step::load_steps(row[m] + c);
#pragma GCC unroll 4
          for (int l = 0; l < kLines; ++l, next += 64) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
          for (int r = 0; r < count; ++r) {
            const Lanes steps = load(q + r * line);
#pragma GCC unroll 4
            for (int m = 0; m < 4; ++m) Step::add(sum[r][m], steps, key[m]);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) {
          part[i][first + r] =
              fold<4>(fold<8>(sum[r][0], sum[r][2]), fold<8>(sum[r][1], sum[r][3]));
        }
      };
      half(0, kHalf);
      if constexpr (kRows > 1) half(kHalf, kRows - kHalf);
    }
    for (int r = 0; r < kRows; ++r) {
      const Lanes sums = fold<1>(fold<2>(part[0][r], part[2][r]), fold<2>(part[1][r], part[3][r]));
      store(logits + r * kScoreKeys + j, sums * scale);
    }
  }
}

// Whether the rows were few enough, and the keys' rows full vectors.
template <typename Step>
bool multiply_few(int64_t rows, const float* query, int64_t line, const typename Step::Element* k,
                  int64_t keys, int64_t stride, int64_t width, float scale, const char* next,
                  float* logits) {
  if (width % (kLanes * Step::kChannels) != 0) return false;
  switch (rows) {
#define HICO_FEW(n)                                                                         \
  case n:                                                                                   \
    if constexpr (n <= HICO_FEW_ROWS) {                                                     \
      multiply_unpacked<Step, n>(query, line, k, keys, stride, width, scale, next, logits); \
      return true;                                                                          \
    }                                                                                       \
    break;
    HICO_FEW(1) HICO_FEW(2) HICO_FEW(3) HICO_FEW(4) HICO_FEW(5) HICO_FEW(6) HICO_FEW(7) HICO_FEW(8)
#undef HICO_FEW
  }
  return false;
}

// One row of logits -> weights, their top and sum. Keys beyond `keys` weigh 0; a NaN makes the sum
// NaN.
inline void weigh_row(float* row, int64_t keys, float* top, float* sum) {
  constexpr int kVectors = kScoreKeys / kLanes;
  for (int64_t j = keys; j < kScoreKeys; ++j) row[j] = -__builtin_inff();
  Lanes most = load(row);
  for (int v = 1; v < kVectors; ++v) most = larger(load(row + v * kLanes), most);
  *top = reduce_max(most);
  Lanes total = {};
  for (int v = 0; v < kVectors; ++v) {
    const Lanes weight = exp_lanes(load(row + v * kLanes) - *top);
    store(row + v * kLanes, weight);
    total += weight;
  }
  *sum = reduce_add(total);
}

template <typename Step>
void weigh(const void* queries, const void* k_, int64_t keys, const ScoreShape& s, float* panel,
           float* weights, float* top, float* sum) {
  const auto* k = static_cast<const typename Step::Element*>(k_);
  const int64_t line = score_steps(s.width),
                steps = (s.width + Step::kChannels - 1) / Step::kChannels;
  for (int64_t g = 0; g < s.groups; ++g) {
    const float* query = static_cast<const float*>(queries) + g * s.rows * line;
    float* logits = weights + g * s.rows * kScoreKeys;
    const int64_t stride = s.groups * s.width;
    const auto* next =
        k + kScoreKeys * stride + g * kScoreKeys * s.width;  // its share of the next block
    if (!multiply_few<Step>(s.rows, query, line, k + g * s.width, keys, stride, s.width, s.scale,
                            reinterpret_cast<const char*>(next), logits)) {
      pack_keys<Step>(k + g * s.width, keys, stride, s.width, panel);
      multiply_rows<Step>(s.rows, query, line, steps, panel, s.scale,
                          reinterpret_cast<const char*>(next), logits);
    }
    for (int64_t r = 0; r < s.rows; ++r) {
      weigh_row(logits + r * kScoreKeys, keys, top + g * s.rows + r, sum + g * s.rows + r);
    }
  }
}

template <typename Step>
void pack_query(const void* q_, int64_t width, void* steps) {
  const auto* q = static_cast<const typename Step::Element*>(q_);
  std::memset(steps, 0, score_steps(width) * sizeof(float));
  for (int64_t c = 0; c < width; c += Step::kChannels) {
    const int left = static_cast<int>(width - c < Step::kChannels ? width - c : Step::kChannels);
    Step::pack_step(q + c, left, static_cast<float*>(steps) + c / Step::kChannels);
  }
}

// Rows are summed sixteen at a time, so that the error of many does not grow with their number.
void add_rows(const float* weights, const float* factor, int64_t rows, float* scores) {
  constexpr int kVectors = kScoreKeys / kLanes, kTogether = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kTogether) {
    Lanes sum[kVectors] = {};
    for (int64_t r = r0; r < rows && r < r0 + kTogether; ++r, weights += kScoreKeys) {
      for (int v = 0; v < kVectors; ++v) sum[v] += factor[r] * load(weights + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) {
      store(scores + v * kLanes, load(scores + v * kLanes) + sum[v]);
    }
  }
}

void exp_difference(const float* x, const float* y, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_lanes(load(x + i) - load(y + i)));
  if (i == n) return;
  float tail[2][kLanes] = {};
  std::memcpy(tail[0], x + i, (n - i) * sizeof(float));
  std::memcpy(tail[1], y + i, (n - i) * sizeof(float));
  store(tail[0], exp_lanes(load(tail[0]) - load(tail[1])));
  std::memcpy(out + i, tail[0], (n - i) * sizeof(float));
}

}  // namespace hico::HICO_PATH
