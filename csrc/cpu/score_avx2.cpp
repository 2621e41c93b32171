// Text-guided scoring on avx2. The body is in score_body.h.
#include <cstdint>
#include <cstring>

#include "cpu/score_kernels.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define HICO_PATH avx2
#define HICO_ROWS 4
#define HICO_VECTORS 1
#define HICO_FEW_ROWS 0
#include "cpu/score_body.h"
#pragma GCC pop_options

namespace hico {
const ScoreKernels score_avx2 = {avx2::pack_query<avx2::Multiply<float>>,
                                 avx2::pack_query<avx2::Multiply<avx2::BFloat16>>,
                                 avx2::weigh<avx2::Multiply<float>>,
                                 avx2::weigh<avx2::Multiply<avx2::BFloat16>>,
                                 avx2::add_rows,
                                 avx2::exp_difference};
}
#endif
