// How many multiply-adds one thread can do: independent chains in registers, nothing in memory.
#include "host/fma_rate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <chrono>

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a function

namespace hico {
namespace {

using Lanes = float __attribute__((vector_size(64)));
constexpr int kLanes = 16, kChains = 20, kRepeats = 100000;

// A function that repeats `update` on kChains vectors and returns the seconds that it took. A
// macro, since a lambda does not take the target of the function around it.
#define HICO_CHAINS(name, target, update)                                                  \
  target double name() {                                                                   \
    Lanes x[kChains];                                                                      \
    for (int i = 0; i < kChains; ++i) x[i] = Lanes{} + static_cast<float>(i);              \
    const Lanes factor = Lanes{} + 0.999f, term = Lanes{} + 0.001f;                        \
    const auto start = std::chrono::steady_clock::now();                                   \
    for (int repeat = 0; repeat < kRepeats; ++repeat) {                                    \
      _Pragma("GCC unroll 20") for (int i = 0; i < kChains; ++i) x[i] = update;            \
    }                                                                                      \
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start; \
    volatile float sink = 0;                                                               \
    for (int i = 0; i < kChains; ++i) sink = sink + x[i][0];                               \
    return passed.count();                                                                 \
  }

HICO_CHAINS(baseline, , x[i] * factor + term)
#if defined(__x86_64__)
HICO_CHAINS(avx2, [[gnu::target("arch=x86-64-v3")]], x[i] * factor + term)
HICO_CHAINS(avx512, [[gnu::target("arch=x86-64-v4")]], x[i] * factor + term)
HICO_CHAINS(pairs, [[gnu::target("arch=x86-64-v4,avx512bf16")]],
            (Lanes)_mm512_dpbf16_ps((__m512)x[i], (__m512bh)factor, (__m512bh)term))
#endif

}  // namespace

double fma_rate(bool bfloat16) {
  double flops = 2.0 * kLanes * kChains * kRepeats;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    const bool dot = bfloat16 && __builtin_cpu_supports("avx512bf16");
    return dot ? 2 * flops / pairs() : flops / avx512();
  }
  if (__builtin_cpu_supports("x86-64-v3")) return flops / avx2();
#endif
  return flops / baseline();
}

}  // namespace hico
