// Merging on baseline. The body is in merge_body.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/merge_kernels.h"

#define HICO_PATH baseline
#define HICO_ROWS 2
#define HICO_VECTORS 1
#define HICO_SLAB 2
#include "cpu/merge_body.h"

namespace hico {
const MergeKernels merge_baseline = HICO_MERGE_TABLE;
}
