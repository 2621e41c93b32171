// 16 float lanes in GCC's generic vectors, and rows of float32 or bfloat16 as such. Include it
// after defining HICO_PATH, inside the target pragma of the file: everything lives in namespace
// hico::HICO_PATH.
#pragma once
#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics' own headers
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function that is not inlined

namespace hico::HICO_PATH {

using Lanes = float __attribute__((vector_size(64)));
using Whole = int32_t __attribute__((vector_size(64)));
using Half = uint16_t __attribute__((vector_size(32)));
using Bits = uint32_t __attribute__((vector_size(64)));
constexpr int kLanes = 16;

struct BFloat16 {
  uint16_t bits;
};

template <typename V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Lanes load(const float* p) { return load_as<Lanes>(p); }
inline Lanes load(const BFloat16* p) {
#ifdef __AVX512F__  // one instruction where the compiler makes six of __builtin_convertvector
  const __m512i wide = _mm512_cvtepu16_epi32(load_as<__m256i>(p));
  return (Lanes)_mm512_slli_epi32(wide, 16);
#else
  return (Lanes)(__builtin_convertvector(load_as<Half>(p), Bits) << 16);
#endif
}
inline float load1(const float* p) { return *p; }
inline float load1(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* p, const Lanes& v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, const Lanes& v) {  // to nearest even, NaN stays NaN
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits result = ((bits & 0x7fffffffu) > 0x7f800000u) ? Bits{} + 0x7fc00000u : rounded;
#ifdef __AVX512F__
  const __m256i half = _mm512_cvtepi32_epi16((__m512i)(result >> 16));
#else
  const Half half = __builtin_convertvector(result >> 16, Half);
#endif
  std::memcpy(p, &half, sizeof half);
}
inline void store1(float* p, float v) { *p = v; }
inline void store1(BFloat16* p, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits = nan ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  p->bits = static_cast<uint16_t>(bits >> 16);
}

// Folds halves onto each other: a fixed order, and four steps where a loop over lanes has sixteen.
inline float reduce_add(Lanes v) {
  v += __builtin_shuffle(v, Whole{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  v += __builtin_shuffle(v, Whole{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  v += __builtin_shuffle(v, Whole{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  v += __builtin_shuffle(v, Whole{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
  return v[0];
}
inline Lanes larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }
inline float reduce_max(Lanes v) {
  v = larger(v, __builtin_shuffle(v, Whole{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = larger(v, __builtin_shuffle(v, Whole{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = larger(v, __builtin_shuffle(v, Whole{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  v = larger(v, __builtin_shuffle(v, Whole{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return v[0];
}

}  // namespace hico::HICO_PATH
