// Text-guided scoring on avx512_bf16. The body is in score_body.h.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

#include "cpu/score_kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define HICO_PATH avx512_bf16
#define HICO_ROWS 8
#define HICO_VECTORS 2
#define HICO_FEW_ROWS 8
#include "cpu/score_body.h"

namespace hico::avx512_bf16 {

// A step is a pair of channels, multiplied and added in float32 by one instruction.
struct DotPairs {
  using Element = BFloat16;
  static constexpr int kChannels = 2;
  static Lanes load_steps(const BFloat16* k) { return load_as<Lanes>(k); }
  static void pack_step(const BFloat16* q, int left, void* step) { std::memcpy(step, q, 2 * left); }
  static void add(Lanes& sum, const Lanes& query, const Lanes& keys) {
    sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)keys);
  }
  static void add(Lanes& sum, const float* query, const Lanes& keys) {
    add(sum, (Lanes)_mm512_set1_epi32(load_as<int32_t>(query)), keys);
  }
};

}  // namespace hico::avx512_bf16
#pragma GCC pop_options

namespace hico {
const ScoreKernels score_avx512_bf16 = {avx512_bf16::pack_query<avx512_bf16::Multiply<float>>,
                                        avx512_bf16::pack_query<avx512_bf16::DotPairs>,
                                        avx512_bf16::weigh<avx512_bf16::Multiply<float>>,
                                        avx512_bf16::weigh<avx512_bf16::DotPairs>,
                                        avx512_bf16::add_rows,
                                        avx512_bf16::exp_difference};
}
#endif
