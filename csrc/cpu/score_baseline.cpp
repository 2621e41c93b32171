// Text-guided scoring on baseline. The body is in score_body.h.
#include <cstdint>
#include <cstring>

#include "cpu/score_kernels.h"

#define HICO_PATH baseline
#define HICO_ROWS 2
#define HICO_VECTORS 1
#define HICO_FEW_ROWS 0
#include "cpu/score_body.h"

namespace hico {
const ScoreKernels score_baseline = {baseline::pack_query<baseline::Multiply<float>>,
                                     baseline::pack_query<baseline::Multiply<baseline::BFloat16>>,
                                     baseline::weigh<baseline::Multiply<float>>,
                                     baseline::weigh<baseline::Multiply<baseline::BFloat16>>,
                                     baseline::add_rows,
                                     baseline::exp_difference};
}
