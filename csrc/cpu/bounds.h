// Where the sequences of a packed batch begin and end.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "common/tensor.h"

namespace hico {

// Cumulative lengths [B + 1] of int32 or int64, checked to rise from 0 to total. `name` is the
// schema's.
inline std::vector<int64_t> bounds_of(const char* name, const Tensor& cu_seqlens, int64_t total) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, name, " must be [B+1]");
  const bool narrow = cu_seqlens.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || cu_seqlens.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  const int64_t n = cu_seqlens.size(0), step = cu_seqlens.stride(0);
  std::vector<int64_t> bounds(n);
  for (int64_t i = 0; i < n; ++i) {
    bounds[i] = narrow ? data<int32_t>(cu_seqlens)[i * step] : data<int64_t>(cu_seqlens)[i * step];
  }
  const bool rises = std::is_sorted(bounds.begin(), bounds.end());
  if (!rises || bounds.front() != 0 || bounds.back() != total) {
    std::string values;
    for (int64_t i = 0; i < n; ++i) values += (i ? ", " : "") + std::to_string(bounds[i]);
    STD_TORCH_CHECK(false, name, " must rise from 0 to ", total, ", got [", values, "]");
  }
  return bounds;
}

}  // namespace hico
