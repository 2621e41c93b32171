// Merging on avx512. The body is in merge_body.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/merge_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define HICO_PATH avx512
#define HICO_ROWS 12
#define HICO_VECTORS 2
#define HICO_SLAB 16
#include "cpu/merge_body.h"
#pragma GCC pop_options

namespace hico {
const MergeKernels merge_avx512 = HICO_MERGE_TABLE;
}
#endif
