// The inner loops of text-guided scoring, one table of them per CPU path.
#pragma once
#include <cstdint>

namespace hico {

constexpr int kScoreKeys = 64;  // keys of a block

struct ScoreShape {
  int64_t rows;    // text rows times the query heads that share a key head
  int64_t groups;  // key heads
  int64_t width;   // head width
  float scale;
};

struct ScoreKernels {
  // Query rows as the products want them: 4 bytes a step, `score_steps` of them for a row of
  // `width` channels.
  using Pack = void (*)(const void* q, int64_t width, void* steps);
  // A block of `keys` keys of one sequence, k [keys][groups][width], against all queries
  // [groups][rows]: weights[row][key] = exp(logit - top[row]) with top the row's largest logit of
  // the block, sum of the weights in sum[row]. `panel` has room for kScoreKeys * score_steps
  // floats.
  using Weigh = void (*)(const void* queries, const void* k, int64_t keys, const ScoreShape& shape,
                         float* panel, float* weights, float* top, float* sum);
  Pack pack_f32, pack_bf16;
  Weigh weigh_f32, weigh_bf16;
  // scores[key] += sum over rows of factor[row] * weights[row][key], for kScoreKeys keys
  void (*add_rows)(const float* weights, const float* factor, int64_t rows, float* scores);
  // out[i] = exp(x[i] - y[i])
  void (*exp_difference)(const float* x, const float* y, int64_t n, float* out);
};

inline int64_t score_steps(int64_t width) { return (width + 15) / 16 * 16; }

const ScoreKernels& score_kernels();  // of the CPU path in use (text_guided_scores.cpp)
extern const ScoreKernels score_avx512_bf16, score_avx512, score_avx2, score_baseline;

}  // namespace hico
