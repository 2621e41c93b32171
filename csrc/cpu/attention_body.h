// All bodies of ragged attention for one CPU path, and its table of them.
#include "cpu/attention_backward_body.h"
#include "cpu/attention_decode_body.h"
#include "cpu/attention_forward_body.h"

#define HICO_ATTENTION_TABLE                         \
  {HICO_PATH::forward<float>,                        \
   HICO_PATH::forward<HICO_PATH::BFloat16>,          \
   HICO_PATH::forward_scratch,                       \
   HICO_PATH::decode<float>,                         \
   HICO_PATH::decode<HICO_PATH::BFloat16>,           \
   HICO_PATH::decode_scratch,                        \
   HICO_PATH::combine<float>,                        \
   HICO_PATH::combine<HICO_PATH::BFloat16>,          \
   HICO_PATH::backward_prepare<float>,               \
   HICO_PATH::backward_prepare<HICO_PATH::BFloat16>, \
   HICO_PATH::backward<float>,                       \
   HICO_PATH::backward<HICO_PATH::BFloat16>,         \
   HICO_PATH::backward_scratch}
