// Top-k selection on baseline. The body is in select_body.h.
#include "cpu/select_kernels.h"

#define HICO_PATH baseline
#include "cpu/select_body.h"

namespace hico {
const SelectKernels select_baseline = {baseline::collect, baseline::emit};
}
