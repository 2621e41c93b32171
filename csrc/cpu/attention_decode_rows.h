// What decoding does with rows of a cache: ask for them ahead, widen them, sum across lanes.
#pragma once
#include "cpu/attention_vector.h"

namespace hico::HICO_PATH {
namespace {

using Eight = float __attribute__((vector_size(32)));
constexpr int kGroup = 8;  // heads that share a vector of scores

// Lane i of the result = sum of the lanes of x[i].
HICO_INLINE Eight sums_of(const Lanes (&x)[kGroup]) {
  Eight half[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    half[i] = __builtin_shufflevector(x[i], x[i], 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(x[i], x[i], 8, 9, 10, 11, 12, 13, 14, 15);
  }
  Eight two[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const Eight a = half[2 * i], b = half[2 * i + 1];
    two[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
             __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Eight a = two[2 * i], b = two[2 * i + 1];
    four[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

HICO_INLINE Lanes swap_halves(const Lanes& x) {
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Asks for the cache lines of some rows in the order of memory, a few at a time between arithmetic.
// Measured at 64k keys: 10 GB/s by whole rows and heads at once, 25 this way. Into L2: what is
// asked for at a time is larger than L1.
struct Prefetcher {
  const char* row;
  int64_t row_bytes, head_bytes, bytes, heads, rows;
  int64_t at = 0, head = 0;

  HICO_INLINE void next() {
    if (rows <= 0) return;
    __builtin_prefetch(row + head * head_bytes + at, 0, 2);
    if ((at += 64) < bytes) return;
    at = 0;
    if (++head < heads) return;
    head = 0;
    row += row_bytes;
    --rows;
  }
};

template <typename T>
HICO_INLINE Prefetcher prefetcher(const void* x, int64_t first, int64_t rows, int64_t row_stride,
                                  int64_t head_stride, const DecodeBlock& b) {
  constexpr int64_t kSize = sizeof(T);
  return {static_cast<const char*>(x) + first * row_stride * kSize,
          row_stride * kSize,
          head_stride * kSize,
          b.width * kSize,
          b.key_heads,
          rows};
}

// Two vectors of a row from column c on. Even and odd columns of bfloat16 come apart by a shift and
// a mask; `ordered` brings sums of them back into order.
HICO_INLINE void load_two(const float* row, Lanes (&x)[2]) {
  x[0] = load(row);
  x[1] = load(row + kLanes);
}
HICO_INLINE void load_two(const BFloat16* row, Lanes (&x)[2]) {
  const Bits pairs = load_as<Bits>(row);
  x[0] = (Lanes)(pairs << 16);
  x[1] = (Lanes)(pairs & 0xffff0000u);
}
HICO_INLINE void ordered(const float*, Lanes (&)[2]) {}
HICO_INLINE void ordered(const BFloat16*, Lanes (&x)[2]) {
  const Lanes even = x[0], odd = x[1];
  x[0] = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  x[1] = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                 15, 31);
}

}  // namespace
}  // namespace hico::HICO_PATH
