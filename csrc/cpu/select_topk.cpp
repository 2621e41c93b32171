// select_topk: the rows of the keep[b] largest scores of each sequence, ascending.
// reference: hico_kernels/select/reference.py
// Radix select: a histogram of the keys' top 11 bits finds the bucket of the k-th largest; only its
// keys are looked at for the middle 11 and the low 10; then one ordered pass writes the rows. Long
// sequences are cut into blocks of fixed size that threads take. Bound by a few passes over scores
// that sit in cache.
#include <algorithm>
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

constexpr int64_t kBlock = 1 << 16, kBuckets = 1 << kTopBits;

// The bucket, from the top, in which the count reaches `need`; `need` becomes the rank within it.
uint32_t find_bucket(const uint32_t* counts, int64_t buckets, int64_t& need) {
  int64_t b = buckets - 1;
  for (; counts[b] < need; --b) need -= counts[b];
  return static_cast<uint32_t>(b);
}

struct Scratch {
  std::vector<uint32_t> counts, keys;
  std::vector<int64_t> found, above, equal;
};

// k >= 1 rows of `scores` [n], written to out [k] with `first` added.
void select(const float* scores, int64_t n, int64_t k, int64_t first, Scratch& scratch,
            int64_t* out) {
  const SelectKernels& kernels = select_kernels();
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  auto& [counts, keys, found, above, equal] = scratch;
  const auto each_block = [&](auto&& body) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(b, b * kBlock, std::min(kBlock, n - b * kBlock));
    });
  };

  counts.assign((blocks + 1) * kBuckets, 0);
  each_block([&](int64_t b, int64_t at, int64_t size) {
    kernels.count_top(scores + at, size, counts.data() + (b + 1) * kBuckets);
  });
  for (int64_t b = 1; b <= blocks; ++b) {
    for (int64_t i = 0; i < kBuckets; ++i) counts[i] += counts[b * kBuckets + i];
  }
  int64_t need = k;
  const uint32_t top = find_bucket(counts.data(), kBuckets, need);

  keys.resize(blocks * (kBlock + 16));
  found.resize(blocks);
  each_block([&](int64_t b, int64_t at, int64_t size) {
    found[b] = kernels.collect(scores + at, size, top, keys.data() + b * (kBlock + 16));
  });
  uint32_t threshold = top;
  for (const int bits : {kMidBits, kLowBits}) {
    const int rest = bits == kMidBits ? kLowBits : 0;
    std::fill_n(counts.begin(), kBuckets, 0);
    for (int64_t b = 0; b < blocks; ++b) {
      const uint32_t* key = keys.data() + b * (kBlock + 16);
      for (int64_t i = 0; i < found[b]; ++i) {
        counts[(key[i] >> rest) & ((1u << bits) - 1)] += key[i] >> (bits + rest) == threshold;
      }
    }
    threshold = threshold << bits | find_bucket(counts.data(), int64_t{1} << bits, need);
  }

  above.resize(blocks);
  equal.resize(blocks);
  if (blocks > 1) {
    each_block([&](int64_t b, int64_t at, int64_t size) {
      kernels.count_at(scores + at, size, threshold, &above[b], &equal[b]);
    });
  }
  found.assign(blocks, need);  // from here: how many ties a block takes
  for (int64_t b = 0, ties = need; b < blocks && blocks > 1; ++b) {
    found[b] = std::min(ties, equal[b]);
    ties -= found[b];
    above[b] += found[b];
  }
  each_block([&](int64_t b, int64_t at, int64_t size) {
    int64_t* to = out;
    for (int64_t i = 0; i < b; ++i) to += above[i];
    kernels.emit(scores + at, size, threshold, found[b], first + at, to);
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
