// exp on 16 lanes, for logits below their maximum. For the same files as vector.h.
#pragma once
#include "cpu/vector.h"

namespace hico::HICO_PATH {

// exp(x) to 1 ulp for x <= 88: 0 below -87, so for -inf too; NaN stays NaN.
inline Lanes exp_lanes(const Lanes& x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23: rounds, and leaves n + 127 below
  const Lanes y = x * 1.44269504f + kMagic;
  const Lanes n = y - kMagic;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Lanes power = (Lanes)((Whole)y << 23);
  return x < Lanes{} - 87.0f ? Lanes{} : p * power;
}

}  // namespace hico::HICO_PATH
