// Ragged attention on baseline. The bodies are in attention_*_body.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.h"

#define HICO_PATH baseline
#define HICO_ROWS 2
#define HICO_VECTORS 1
#include "cpu/attention_body.h"

namespace hico {
const AttentionKernels attention_baseline = HICO_ATTENTION_TABLE;
}
