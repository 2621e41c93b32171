// Top-k selection on avx2. The body is in select_body.h.
#include "cpu/select_kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define HICO_PATH avx2
#include "cpu/select_body.h"
#pragma GCC pop_options

namespace hico {
const SelectKernels select_avx2 = {avx2::collect, avx2::emit};
}
#endif
