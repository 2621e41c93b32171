// Merging on avx2. The body is in merge_body.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/merge_kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define HICO_PATH avx2
#define HICO_ROWS 6
#define HICO_VECTORS 1
#define HICO_SLAB 4
#include "cpu/merge_body.h"
#pragma GCC pop_options

namespace hico {
const MergeKernels merge_avx2 = HICO_MERGE_TABLE;
}
#endif
