// uniform_indices: torch.linspace(0, n - 1, keep, dtype=long) of the CPU, in closed form.
// reference: hico_kernels/select/reference.py
// Bound by writing 8 bytes an index; registered for all backends, since no tensor tells the
// dispatcher which.
#include <algorithm>

#include "common/tensor.h"

namespace hico {

namespace {

// One source, three machine codes, chosen when the module is loaded: only AVX-512 can convert eight
// at once.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#endif
void fill(int64_t* out, int64_t begin, int64_t end, double start, double step, int64_t origin) {
  for (int64_t i = begin; i < end; ++i) {
    out[i] = static_cast<int64_t>(start + step * static_cast<double>(i - origin));
  }
}

}  // namespace

Tensor uniform_indices_cpu(int64_t num_tokens, int64_t keep, torch::stable::Device device) {
  STD_TORCH_CHECK(0 <= keep && keep <= num_tokens, "keep must be in [0, ", num_tokens, "], got ",
                  keep);
  STD_TORCH_CHECK(num_tokens <= int64_t{1} << 53, "num_tokens must be at most 2^53, got ",
                  num_tokens);
  STD_TORCH_CHECK(device.is_cpu(), "device must be the CPU");
  Tensor index = torch::stable::empty({keep}, ScalarType::Long, std::nullopt, device);
  int64_t* out = mutable_data<int64_t>(index);
  const double last = static_cast<double>(num_tokens - 1);
  const double step = keep > 1 ? last / static_cast<double>(keep - 1) : 0.0;
  torch::stable::parallel_for(0, keep, 1 << 16, [&](int64_t begin, int64_t end) {
    const int64_t middle = keep == 1 ? 1 : keep / 2;  // from both ends, as torch rounds
    fill(out, begin, std::min(end, middle), 0.0, step, 0);
    fill(out, std::max(begin, middle), end, last, step, keep - 1);
  });
  return index;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CompositeExplicitAutograd, m) {
  m.impl("uniform_indices", TORCH_BOX(&hico::uniform_indices_cpu));
}
