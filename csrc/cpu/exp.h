// exp on 16 lanes, for logits below their maximum. For the same files as vector.h.
#pragma once
#include "cpu/vector.h"

namespace hico::HICO_PATH {

// Cody-Waite reduction to |r| <= ln(2) / 2 and a polynomial of degree 6: at most 2 ulp for x in
// [-87, 88]. Below -87, where the result would be subnormal, 0; NaN stays NaN.
inline Lanes exp_lanes(const Lanes& x) {
  const Lanes magic = Lanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Lanes shifted = x * 1.44269504f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = Lanes{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Lanes scale =
      (Lanes)(((Whole)shifted << 23) + (127 << 23));  // 2^n: the magic bits shift out
  const Lanes result = p * scale;
  return x < Lanes{} - 87.0f ? Lanes{} : result;
}

}  // namespace hico::HICO_PATH
