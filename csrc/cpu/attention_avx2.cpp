// Ragged attention on avx2. The bodies are in attention_*_body.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define HICO_PATH avx2
#define HICO_ROWS 6
#define HICO_VECTORS 1
#include "cpu/attention_body.h"
#pragma GCC pop_options

namespace hico {
const AttentionKernels attention_avx2 = HICO_ATTENTION_TABLE;
}
#endif
