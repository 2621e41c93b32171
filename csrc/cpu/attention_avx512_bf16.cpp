// Ragged attention on avx512_bf16. The bodies are in attention_*_body.h.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define HICO_BF16_DOT
#define HICO_PATH avx512_bf16
#define HICO_ROWS 12
#define HICO_VECTORS 2
#include "cpu/attention_body.h"
#pragma GCC pop_options

namespace hico {
const AttentionKernels attention_avx512_bf16 = HICO_ATTENTION_TABLE;
}
#endif
