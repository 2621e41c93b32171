// One round of bipartite soft matching on the metric of one clip, in float32.
#pragma once
#include <cstdint>
#include <vector>

namespace hico {

struct MatchScratch {  // kept between calls by each thread: allocating it costs more than a round
  std::vector<float> a, b, panels, best;
  std::vector<int32_t> into, order;
};

struct Protected {  // tokens that stay in front and take no part
  bool class_token = false, distill_token = false;
};

// position[t] = where token t goes, below t - r.  metric [t, d]; r <= (t - protected) / 2.
void match_round(const float* metric, int64_t t, int64_t d, int64_t r, Protected keep,
                 MatchScratch& scratch, int32_t* position);

}  // namespace hico
