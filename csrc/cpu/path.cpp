// Which machine code the CPU kernels run, and a way for tests to run the others.
#include "cpu/path.h"

#include <array>
#include <atomic>
#include <string>
#include <string_view>

#include "common/tensor.h"

namespace hico {
namespace {

constexpr std::array<std::string_view, 4> kNames = {"baseline", "avx2", "avx512", "avx512_bf16"};

CpuPath best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuPath::avx512_bf16 : CpuPath::avx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return CpuPath::avx2;
#endif
  return CpuPath::baseline;
}

std::atomic<CpuPath>& current() {
  static std::atomic<CpuPath> path{best()};
  return path;
}

// The path in use. `force` sets it first: a name, "best", or "" to leave it.
std::string use_cpu_path(const std::string& force) {
  if (force == "best") current() = best();
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (force != kNames[i]) continue;
    const auto asked = static_cast<CpuPath>(i);
    STD_TORCH_CHECK(asked <= best(), "this CPU cannot run ", force);
    current() = asked;
    return force;
  }
  STD_TORCH_CHECK(force.empty() || force == "best", "no CPU path is named ", force);
  return std::string(kNames[static_cast<size_t>(cpu_path())]);
}

}  // namespace

CpuPath cpu_path() { return current().load(std::memory_order_relaxed); }

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CompositeExplicitAutograd, m) {
  m.impl("use_cpu_path", TORCH_BOX(&hico::use_cpu_path));
}
