// What the attention bodies share: exp, reductions, packed operands and the product of packed
// operands. An operand is packed in words of 4 bytes: a float, or a pair of bfloat16 along the
// summed dimension where the path has a dot product for them (HICO_BF16_DOT).
// The including file defines HICO_PATH, HICO_ROWS (rows of a product held in registers) and
// HICO_VECTORS (vectors of columns held beside them).
#pragma once
#include <cmath>

#include "cpu/attention_kernels.h"
#include "cpu/exp.h"
#include "cpu/vector.h"

// a function that returns vectors and is not inlined would change the ABI from path to path
#define HICO_INLINE inline __attribute__((always_inline))

namespace hico::HICO_PATH {
namespace {

using Four = float __attribute__((vector_size(16)));
constexpr int kRows = HICO_ROWS, kVectors = HICO_VECTORS, kColumns = kVectors * kLanes;
constexpr int kTile = 128;           // columns of scores (keys, say) that are packed at a time
constexpr int kScores = kTile + 16;  // floats from one row of scores to the next
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

HICO_INLINE Lanes select(const Whole& mask, const Lanes& a, const Lanes& b) { return mask ? a : b; }

HICO_INLINE Whole lane_numbers() {
  Whole lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

template <typename Combine>
HICO_INLINE float reduce(const Lanes& x, Combine combine) {
  using Eight = float __attribute__((vector_size(32)));
  const Eight a = combine(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  const Four b =
      combine(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
  const Four c = combine(b, __builtin_shufflevector(b, b, 2, 3, 0, 1));
  return combine(c, __builtin_shufflevector(c, c, 1, 0, 3, 2))[0];
}
HICO_INLINE float sum_of(const Lanes& x) {
  return reduce(x, [](const auto& a, const auto& b) { return a + b; });
}
HICO_INLINE float max_of(const Lanes& x) {  // of the lanes that are numbers, if lane 0 is one
  return reduce(x, [](const auto& a, const auto& b) { return a > b ? a : b; });
}

// --- words

// 16 floats of a row from column c on, zero from column d on
template <typename T>
HICO_INLINE Lanes load_part(const T* row, int64_t c, int64_t d) {
  if (c + kLanes <= d) return load(row + c);
  Lanes part = {};
  for (int64_t i = c; i < d; ++i) part[i - c] = load1(row + i);
  return part;
}

template <typename T>
HICO_INLINE void store_part(T* row, int64_t c, int64_t d, const Lanes& x) {
  if (c + kLanes <= d) return store(row + c, x);
  for (int64_t i = c; i < d; ++i) store1(row + i, x[i - c]);
}

template <typename T>
struct Words {  // float, and bfloat16 that is widened while packing
  static constexpr int kDepth = 1;
  static HICO_INLINE float one(const T* row, int64_t w, int64_t) { return load1(row + w); }
  static HICO_INLINE Four four(const float* row) { return load_as<Four>(row); }
  static HICO_INLINE Four four(const BFloat16* row) {
    using Short = uint16_t __attribute__((vector_size(8)));
    using Long = uint32_t __attribute__((vector_size(16)));
    return (Four)(__builtin_convertvector(load_as<Short>(row), Long) << 16);
  }
  static HICO_INLINE Lanes vector(const T* row) { return load(row); }  // 16 words
  static HICO_INLINE Lanes part(const T* row, int64_t left) { return load_part(row, 0, left); }
  static HICO_INLINE void add_product(Lanes& sum, const float* a, const Lanes& b) { sum += *a * b; }
  static HICO_INLINE void add_products(Lanes& sum, const Lanes& a, const Lanes& b) { sum += a * b; }
};

#ifdef HICO_BF16_DOT
template <>
struct Words<BFloat16> {
  static constexpr int kDepth = 2;
  static HICO_INLINE float one(const BFloat16* row, int64_t w, int64_t d) {
    const uint32_t low = row[2 * w].bits, high = 2 * w + 1 < d ? row[2 * w + 1].bits : 0;
    return __builtin_bit_cast(float, low | high << 16);
  }
  static HICO_INLINE Four four(const BFloat16* row) { return load_as<Four>(row); }
  static HICO_INLINE Lanes vector(const BFloat16* row) { return load_as<Lanes>(row); }
  static HICO_INLINE Lanes part(const BFloat16* row, int64_t left) {
    Lanes part = {};
    std::memcpy(&part, row, left * sizeof(BFloat16));
    return part;
  }
  static HICO_INLINE void add_product(Lanes& sum, const float* a, const Lanes& b) {
    add_products(sum, (Lanes)(Whole{} + load_as<int32_t>(a)), b);
  }
  static HICO_INLINE void add_products(Lanes& sum, const Lanes& a, const Lanes& b) {
    sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <typename T>
constexpr int64_t words(int64_t d) {
  return (d + Words<T>::kDepth - 1) / Words<T>::kDepth;
}

// to[w * width + i] = word w of row i; a null row is zero.
template <typename T>
HICO_INLINE void pack_words(const T* const* rows, int64_t count, int64_t d, int64_t width,
                            float* to) {
  const int64_t all = words<T>(d), whole = d / Words<T>::kDepth / 4 * 4;
  int64_t i = 0;
  for (; i + 4 <= count && rows[i + 3]; i += 4) {  // null rows come last
    for (int64_t w = 0; w < whole; w += 4) {
      const int64_t at = w * Words<T>::kDepth;
      const Four a = Words<T>::four(rows[i] + at), b = Words<T>::four(rows[i + 1] + at);
      const Four c = Words<T>::four(rows[i + 2] + at), e = Words<T>::four(rows[i + 3] + at);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Four ce = __builtin_shufflevector(c, e, 0, 4, 1, 5);
      const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four ce2 = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      const Four column[4] = {__builtin_shufflevector(ab, ce, 0, 1, 4, 5),
                              __builtin_shufflevector(ab, ce, 2, 3, 6, 7),
                              __builtin_shufflevector(ab2, ce2, 0, 1, 4, 5),
                              __builtin_shufflevector(ab2, ce2, 2, 3, 6, 7)};
      for (int j = 0; j < 4; ++j) std::memcpy(to + (w + j) * width + i, &column[j], sizeof(Four));
    }
    for (int64_t w = whole; w < all; ++w) {
      for (int64_t j = i; j < i + 4; ++j) to[w * width + j] = Words<T>::one(rows[j], w, d);
    }
  }
  for (; i < count; ++i) {
    for (int64_t w = 0; w < all; ++w) {
      to[w * width + i] = rows[i] ? Words<T>::one(rows[i], w, d) : 0.0f;
    }
  }
}

// Row i of `to`, float32 in slabs for products that sum over rows: slab [i][kColumns] of the
// columns from c on lies at c * capacity; what remains at the right takes slabs [i][kLanes].
template <typename T>
HICO_INLINE void pack_row(const T* row, int64_t i, int64_t d, int64_t capacity, float* to) {
  int64_t c = 0;
  for (; c + kColumns - kLanes < d; c += kColumns) {
    for (int n = 0; n < kVectors; ++n) {
      store(to + c * capacity + i * kColumns + n * kLanes, load_part(row, c + n * kLanes, d));
    }
  }
  for (; c < d; c += kLanes) store(to + c * capacity + i * kLanes, load_part(row, c, d));
}

// sum[i][n] = sum over k < depth of a[i * kAcross + k * kAlong] * (vector n of b at k)
template <typename T, int kAcross, int kAlong, int kN>
HICO_INLINE void multiply(const float* a, const float* b, int64_t depth, Lanes (&sum)[kRows][kN]) {
  for (int64_t k = 0; k < depth; ++k, a += kAlong, b += kN * kLanes) {
    Lanes column[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) column[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) Words<T>::add_product(sum[i][n], a + i * kAcross, column[n]);
    }
  }
}

}  // namespace
}  // namespace hico::HICO_PATH
