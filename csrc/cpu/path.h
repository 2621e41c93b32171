// Run-time choice of machine code. A kernel body is written once on 16-lane vectors and compiled
// once per path in a file of its own (merge_avx512.cpp and so on); the compiler splits the vectors
// where registers are narrower.
#pragma once

namespace hico {

enum class CpuPath { baseline, avx2, avx512, avx512_bf16 };

CpuPath cpu_path();  // the best this CPU has, or the one that a test forces (path.cpp)

}  // namespace hico
