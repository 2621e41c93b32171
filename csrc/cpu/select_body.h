// The bodies of SelectKernels for a path without compressing stores. The file that includes this
// defines HICO_PATH.
#include "cpu/select_kernels.h"

namespace hico::HICO_PATH {

int64_t collect(const float* scores, int64_t n, uint32_t low, uint32_t high, int64_t* above,
                uint32_t* out) {
  int64_t found = 0, more = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = score_key(scores[i]);
    out[found] = key;
    found += key - low <= high - low;
    more += key > high;
  }
  *above = more;
  return found;
}

void emit(const float* scores, int64_t n, uint32_t threshold, int64_t ties, int64_t first,
          int64_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = score_key(scores[i]);
    const bool tie = key == threshold && ties > 0;
    ties -= tie;
    if (key > threshold || tie) *out++ = first + i;
  }
}

}  // namespace hico::HICO_PATH
