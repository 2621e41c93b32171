// select_topk: the rows of the keep[b] largest scores of each sequence, ascending.
// reference: hico_kernels/select/reference.py
// A sample of the scores tells between which two keys the k-th largest very likely lies. One pass
// keeps the keys between them and counts those above; histograms of what is kept, 11 bits at a
// time, find the key; then one ordered pass writes the rows. Where the sample misled, the first
// pass is repeated on the side that holds the key. Long sequences are cut into blocks of fixed size
// that threads take. Bound by two passes over scores that sit in cache.
#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "common/tensor.h"
#include "cpu/bounds.h"
#include "cpu/path.h"
#include "cpu/select_kernels.h"

namespace hico {

const SelectKernels& select_kernels() {
#if defined(__x86_64__)
  if (cpu_path() >= CpuPath::avx512) return select_avx512;
  if (cpu_path() == CpuPath::avx2) return select_avx2;
#endif
  return select_baseline;
}

namespace {

constexpr int64_t kBlock = 1 << 16;
constexpr int kBits = 11;  // of a key that one histogram tells apart
constexpr int64_t kBuckets = 1 << kBits;
constexpr int64_t kSample = 1024, kMargin = 48;  // the rank in a sample is off by 16 at one sigma

struct Bracket {  // of keys, both ends included
  uint32_t low = 0, high = UINT32_MAX;
};

// The keys between which the k-th largest of n scores very likely lies.
Bracket guess(const float* scores, int64_t n, int64_t k) {
  if (n < 8 * kSample) return {};
  uint32_t sample[kSample];
  for (int64_t i = 0; i < kSample; ++i) sample[i] = score_key(scores[n / kSample * i]);
  const auto at = [&](int64_t rank) {
    std::nth_element(sample, sample + rank, sample + kSample, std::greater<>());
    return sample[rank];
  };
  const auto rank = static_cast<int64_t>(static_cast<double>(k) / n * kSample);
  Bracket bracket;
  if (rank >= kMargin) bracket.high = at(rank - kMargin);
  if (rank + kMargin < kSample) bracket.low = at(rank + kMargin);
  return bracket;
}

struct Scratch {
  std::vector<uint32_t> counts, keys;
  std::vector<int64_t> found, above;
};

// k >= 1 rows of `scores` [n], written to out [k] with `first` added.
void select(const float* scores, int64_t n, int64_t k, int64_t first, Scratch& scratch,
            int64_t* out) {
  const SelectKernels& kernels = select_kernels();
  const int64_t blocks = (n + kBlock - 1) / kBlock, room = std::min(n, kBlock) + 16;
  auto& [counts, keys, found, above] = scratch;
  const auto each_block = [&](auto&& body) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(b, b * kBlock, std::min(kBlock, n - b * kBlock));
    });
  };

  keys.resize(blocks * room);
  found.resize(blocks);
  above.resize(blocks);
  auto [low, high] = guess(scores, n, k);
  int64_t need = 0;  // rank of the key among those between low and high
  for (;;) {
    each_block([&](int64_t b, int64_t at, int64_t size) {
      found[b] = kernels.collect(scores + at, size, low, high, &above[b], keys.data() + b * room);
    });
    need = k - std::accumulate(above.begin(), above.end(), int64_t{0});
    if (need <= 0) {
      low = high + 1, high = UINT32_MAX;
    } else if (need > std::accumulate(found.begin(), found.end(), int64_t{0})) {
      high = low - 1, low = 0;
    } else {
      break;
    }
  }
  for (;;) {
    const int shift = high - low < kBuckets ? 0 : 32 - kBits - __builtin_clz(high - low);
    counts.assign(kBuckets, 0);
    for (int64_t b = 0; b < blocks; ++b) {
      uint32_t* const key = keys.data() + b * room;
      int64_t kept = 0, more = 0;
      for (int64_t i = 0; i < found[b]; ++i) {
        const uint32_t here = key[i];
        more += here > high;
        if (here - low > high - low) continue;
        ++counts[(here - low) >> shift];
        key[kept++] = here;
      }
      found[b] = kept;
      above[b] += more;
    }
    if (low == high) break;
    uint32_t bucket = kBuckets - 1;
    for (; counts[bucket] < need; --bucket) need -= counts[bucket];
    low += bucket << shift;
    high = low + std::min(high - low, (1u << shift) - 1);
  }
  for (int64_t b = 0, ties = need; b < blocks; ++b) {  // found: how many ties a block takes
    found[b] = std::min(ties, found[b]);
    ties -= found[b];
    above[b] += found[b];
  }
  each_block([&](int64_t b, int64_t at, int64_t size) {
    int64_t* to = out;
    for (int64_t i = 0; i < b; ++i) to += above[i];
    kernels.emit(scores + at, size, low, found[b], first + at, to);
  });
}

}  // namespace

// scores [S] float32, cu_seqlens [B + 1], keep [B] -> [sum of keep] int64
Tensor select_topk_cpu(const Tensor& scores_in, const Tensor& cu_seqlens,
                       std::vector<int64_t> keep) {
  HICO_CHECK_DIM(scores_in, 1);
  HICO_CHECK_DTYPE(scores_in, Float);
  const Tensor scores = torch::stable::contiguous(scores_in);
  const std::vector<int64_t> at = bounds_of("cu_seqlens", cu_seqlens, scores.size(0));
  const int64_t sequences = static_cast<int64_t>(at.size()) - 1;
  STD_TORCH_CHECK(static_cast<int64_t>(keep.size()) == sequences,
                  "keep must have one count per sequence");
  std::vector<int64_t> to(sequences + 1, 0);
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(0 <= keep[b] && keep[b] <= at[b + 1] - at[b],
                    "keep must be at most the sequence's ", at[b + 1] - at[b], " scores, got ",
                    keep[b]);
    to[b + 1] = to[b] + keep[b];
  }
  Tensor rows = torch::stable::new_empty(scores, {to[sequences]}, ScalarType::Long);
  const float* from = data<float>(scores);
  int64_t* out = mutable_data<int64_t>(rows);
  const auto run = [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t b = begin; b < end; ++b) {
      if (keep[b] > 0)
        select(from + at[b], at[b + 1] - at[b], keep[b], at[b], scratch, out + to[b]);
    }
  };
  if (sequences >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, sequences, 1, run);
  } else {
    run(0, sequences);
  }
  return rows;
}

}  // namespace hico

STABLE_TORCH_LIBRARY_IMPL(hico, CPU, m) {
  m.impl("select_topk", TORCH_BOX(&hico::select_topk_cpu));
}
