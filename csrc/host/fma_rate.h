// How fast one thread multiplies and adds.
#pragma once

namespace hico {

// FLOPs per second, measured over some milliseconds: in float32, or of bfloat16 pairs added in
// float32 where the CPU has an instruction for that.
double fma_rate(bool bfloat16);

}  // namespace hico
