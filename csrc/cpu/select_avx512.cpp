// Top-k selection on AVX-512: 16 keys at once, compressed in registers (a compressing store to
// memory is slow).
#include "cpu/select_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <initializer_list>
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics' own headers
#pragma GCC target("arch=x86-64-v4")

namespace hico::avx512 {
namespace {

inline __mmask16 tail(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

inline __m512i keys(const float* scores, __mmask16 valid) {
  const __m512i lowest = _mm512_set1_epi32(static_cast<int>(0xff800000u));
  __m512i bits = _mm512_mask_loadu_epi32(lowest, valid, scores);
  const __m512 values = _mm512_castsi512_ps(bits);
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), lowest);
  bits = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7fffffff)), bits);
  const __m512i sign = _mm512_srai_epi32(bits, 31);  // all ones when negative
  return _mm512_xor_si512(bits, _mm512_or_si512(sign, _mm512_set1_epi32(INT32_MIN)));
}

}  // namespace

int64_t collect(const float* scores, int64_t n, uint32_t low, uint32_t high, int64_t* above,
                uint32_t* out) {
  const __m512i least = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i most = _mm512_set1_epi32(static_cast<int>(high));
  int64_t found = 0, more = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = tail(n - i);
    const __m512i key = keys(scores + i, valid);
    const __mmask16 over = _mm512_mask_cmpgt_epu32_mask(valid, key, most);
    const __mmask16 hit = _mm512_mask_cmpge_epu32_mask(valid, key, least) & ~over;
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(hit, key));
    found += __builtin_popcount(hit);
    more += __builtin_popcount(over);
  }
  *above = more;
  return found;
}

void emit(const float* scores, int64_t n, uint32_t threshold, int64_t ties, int64_t first,
          int64_t* out) {
  const __m512i at = _mm512_set1_epi32(static_cast<int>(threshold));
  const __m512i eight = _mm512_set1_epi64(8);
  __m512i row =
      _mm512_add_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(first));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = tail(n - i);
    const __m512i key = keys(scores + i, valid);
    uint32_t tie = _mm512_mask_cmpeq_epi32_mask(valid, key, at);
    while (__builtin_popcount(tie) > ties) tie &= ~(1u << (31 - __builtin_clz(tie)));
    ties -= __builtin_popcount(tie);
    const uint32_t take = _mm512_mask_cmpgt_epu32_mask(valid, key, at) | tie;
    for (const uint32_t half : {take & 0xffu, take >> 8}) {
      const int count = __builtin_popcount(half);
      const auto written = static_cast<__mmask8>((1u << count) - 1);
      const __m512i rows = _mm512_maskz_compress_epi64(static_cast<__mmask8>(half), row);
      _mm512_mask_storeu_epi64(out, written, rows);
      out += count;
      row = _mm512_add_epi64(row, eight);
    }
  }
}

}  // namespace hico::avx512
#pragma GCC pop_options

namespace hico {
const SelectKernels select_avx512 = {avx512::collect, avx512::emit};
}
#endif
