// The inner loops of top-k selection, one table of them per CPU path.
//
// A score is ranked by its `key`: the float's bits, made to rise with the value as an unsigned
// number, with NaN as -inf and -0 as +0. So equal scores have equal keys, and the smaller index
// decides.
#pragma once
#include <cstdint>
#include <cstring>

namespace hico {

inline uint32_t score_key(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct SelectKernels {
  // the keys from `low` to `high`, in order; returns how many, and how many lie above. `out` has
  // room for n + 16.
  int64_t (*collect)(const float* scores, int64_t n, uint32_t low, uint32_t high, int64_t* above,
                     uint32_t* out);
  // first + i for every key above `threshold` and the first `ties` that equal it, ascending;
  // exactly as many are written as there are
  void (*emit)(const float* scores, int64_t n, uint32_t threshold, int64_t ties, int64_t first,
               int64_t* out);
};

const SelectKernels& select_kernels();  // of the CPU path in use (select_topk.cpp)
extern const SelectKernels select_avx512, select_avx2, select_baseline;

}  // namespace hico
