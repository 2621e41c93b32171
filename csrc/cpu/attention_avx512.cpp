// Ragged attention on avx512. The bodies are in attention_*_body.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define HICO_PATH avx512
#define HICO_ROWS 12
#define HICO_VECTORS 2
#include "cpu/attention_body.h"
#pragma GCC pop_options

namespace hico {
const AttentionKernels attention_avx512 = HICO_ATTENTION_TABLE;
}
#endif
