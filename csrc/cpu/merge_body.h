// The bodies of MergeKernels for one CPU path. The file that includes this defines HICO_PATH (its
// namespace), HICO_ROWS (rows of `a` held in registers), HICO_VECTORS (vectors of columns held
// beside them) and HICO_SLAB (vectors of channels summed at once), all sized to the register file.
#include <cmath>

#include "cpu/merge_kernels.h"
#include "cpu/vector.h"

namespace hico::HICO_PATH {

template <typename T>
void head_sum(const void* x_, int64_t rows, int64_t heads, int64_t d, float* sums) {
  const T* x = static_cast<const T*>(x_);
  constexpr int kBlock = 4;  // 64 channels: one head of UMT-L
  for (int64_t t = 0; t < rows; ++t, x += heads * d, sums += d) {
    int64_t k = 0;
    for (; k + kBlock * kLanes <= d; k += kBlock * kLanes) {
      Lanes sum[kBlock] = {};
      for (int64_t h = 0; h < heads; ++h) {
        const T* part = x + h * d + k;
        // Two rows ahead: a row of UMT-L is a page, and hardware prefetchers stop at its end.
        const char* ahead = reinterpret_cast<const char*>(part + 2 * heads * d);
#pragma GCC unroll 4
        for (size_t line = 0; line < kBlock * kLanes * sizeof(T); line += 64)
          __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) sum[i] += load(part + i * kLanes);
      }
      for (int i = 0; i < kBlock; ++i) store(sums + k + i * kLanes, sum[i]);
    }
    for (; k + kLanes <= d; k += kLanes) {
      Lanes sum = {};
      for (int64_t h = 0; h < heads; ++h) sum += load(x + h * d + k);
      store(sums + k, sum);
    }
    for (; k < d; ++k) {
      float sum = 0;
      for (int64_t h = 0; h < heads; ++h) sum += load1(x + h * d + k);
      sums[k] = sum;
    }
  }
}

void unit_rows(const float* sums, int64_t rows, int64_t stride, int64_t d, float* out) {
  for (int64_t i = 0; i < rows; ++i, sums += stride * d, out += d) {
    Lanes square = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) square += load(sums + k) * load(sums + k);
    float total = 0;
    for (; k < d; ++k) total += sums[k] * sums[k];
    for (int lane = 0; lane < kLanes; ++lane) total += square[lane];
    const float length = std::sqrt(total);
    if (length == 0) {
      std::memset(out, 0, d * sizeof(float));
      continue;
    }
    const float scale = 1.0f / length;
    for (k = 0; k + kLanes <= d; k += kLanes) store(out + k, load(sums + k) * scale);
    for (; k < d; ++k) out[k] = sums[k] * scale;
  }
}

void pack_panels(const float* unit, int64_t rows, int64_t d, float* panels) {
  for (int64_t j0 = 0; j0 < rows; j0 += kPanel, panels += d * kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const float* row = unit + (j0 + j) * d;
      for (int64_t k = 0; k < d; ++k) panels[k * kPanel + j] = j0 + j < rows ? row[k] : 0.0f;
    }
  }
}

// Products of `kRows` rows of a with the panels, kVectors vectors of columns at a time; the running
// maximum and its column stay per lane and are reduced at the end. The score matrix is never in
// memory.
template <int kRows>
void match_rows(const float* __restrict__ a, int64_t d, const float* __restrict__ panels,
                int64_t columns, float* best, int32_t* into) {
  constexpr int kVectors = HICO_VECTORS, kStep = kVectors * kLanes;
  Lanes top[kRows];
  Whole where[kRows];
  Whole lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int i = 0; i < kRows; ++i) {
    top[i] = Lanes{} - INFINITY;
    where[i] = lane;
  }
  for (int64_t j = 0; j < columns; j += kStep) {
    const float* b = panels + (j / kPanel) * d * kPanel + j % kPanel;
    Lanes sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < d; ++k, b += kPanel) {
      Lanes column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += a[i * d + k] * column[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int32_t first = static_cast<int32_t>(j) + v * kLanes;
      const Whole here = lane + first;
      const Whole inside = here < Whole{} + static_cast<int32_t>(columns);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Whole better = (sum[i][v] > top[i]) & inside;  // false for NaN
        top[i] = better ? sum[i][v] : top[i];
        where[i] = better ? here : where[i];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    best[i] = top[i][0];
    into[i] = where[i][0];
    for (int l = 1; l < kLanes; ++l) {
      if (top[i][l] > best[i] || (top[i][l] == best[i] && where[i][l] < into[i])) {
        best[i] = top[i][l];
        into[i] = where[i][l];
      }
    }
    if (best[i] == -INFINITY) into[i] = 0;  // nothing but NaN: the first
  }
}

void best_match(const float* a, int64_t rows, int64_t d, const float* panels, int64_t columns,
                float* best, int32_t* into) {
  int64_t i = 0;
  for (; i + HICO_ROWS <= rows; i += HICO_ROWS) {
    match_rows<HICO_ROWS>(a + i * d, d, panels, columns, best + i, into + i);
  }
  constexpr int kFew = HICO_ROWS > 4 ? 4 : 1;  // the rest in small tiles, not row by row
  for (; i + kFew <= rows; i += kFew) {
    match_rows<kFew>(a + i * d, d, panels, columns, best + i, into + i);
  }
  for (; i < rows; ++i) match_rows<1>(a + i * d, d, panels, columns, best + i, into + i);
}

template <typename T>
void mean(const void* x_, const int32_t* member, int64_t count, const float* weight, float total,
          int64_t c, int32_t next, void* y_) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const float scale = 1.0f / total;
  int64_t k = 0;
  for (; k + HICO_SLAB * kLanes <= c; k += HICO_SLAB * kLanes) {
    Lanes sum[HICO_SLAB] = {};
    const char* ahead = reinterpret_cast<const char*>(x + next * c + k);
#pragma GCC unroll 16
    for (size_t line = 0; line < HICO_SLAB * kLanes * sizeof(T); line += 64)
      __builtin_prefetch(ahead + line);
    for (int64_t m = 0; m < count; ++m) {
      const T* row = x + member[m] * c + k;
      const float w = weight ? weight[member[m]] : 1.0f;
#pragma GCC unroll 16
      for (int i = 0; i < HICO_SLAB; ++i) sum[i] += w * load(row + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < HICO_SLAB; ++i) store(y + k + i * kLanes, sum[i] * scale);
  }
  for (; k < c; ++k) {
    float sum = 0;
    for (int64_t m = 0; m < count; ++m) {
      const float w = weight ? weight[member[m]] : 1.0f;
      sum += w * load1(x + member[m] * c + k);
    }
    store1(y + k, sum * scale);
  }
}

void merge_rows(const float* sums, int64_t rows, int64_t d, const int32_t* position, float* out) {
  for (int64_t t = 0; t < rows; ++t, sums += d) {
    float* to = out + position[t] * d;
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) store(to + k, load(to + k) + load(sums + k));
    for (; k < d; ++k) to[k] += sums[k];
  }
}

template <typename T>
void scale_row(const void* x_, float factor, int64_t c, void* y_) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  int64_t k = 0;
  for (; k + kLanes <= c; k += kLanes) store(y + k, load(x + k) * factor);
  for (; k < c; ++k) store1(y + k, load1(x + k) * factor);
}

}  // namespace hico::HICO_PATH

#define HICO_MERGE_TABLE                                                  \
  {HICO_PATH::head_sum<float>,  HICO_PATH::head_sum<HICO_PATH::BFloat16>, \
   HICO_PATH::unit_rows,        HICO_PATH::pack_panels,                   \
   HICO_PATH::best_match,       HICO_PATH::merge_rows,                    \
   HICO_PATH::mean<float>,      HICO_PATH::mean<HICO_PATH::BFloat16>,     \
   HICO_PATH::scale_row<float>, HICO_PATH::scale_row<HICO_PATH::BFloat16>}
