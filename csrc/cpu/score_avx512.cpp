// Text-guided scoring on avx512. The body is in score_body.h.
#include <cstdint>
#include <cstring>

#include "cpu/score_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define HICO_PATH avx512
#define HICO_ROWS 8
#define HICO_VECTORS 2
#define HICO_FEW_ROWS 8
#include "cpu/score_body.h"
#pragma GCC pop_options

namespace hico {
const ScoreKernels score_avx512 = {avx512::pack_query<avx512::Multiply<float>>,
                                   avx512::pack_query<avx512::Multiply<avx512::BFloat16>>,
                                   avx512::weigh<avx512::Multiply<float>>,
                                   avx512::weigh<avx512::Multiply<avx512::BFloat16>>,
                                   avx512::add_rows,
                                   avx512::exp_difference};
}
#endif
