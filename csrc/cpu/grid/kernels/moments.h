// Moments of the keys of a window about rows: for each row, with p_j = 2^(t_j + shift) as in tiled_rows and offsets
// d_f = k_jf - x_f in packed units,
//   sum_j p,   sum_j p d_f,   sum_j p d_f d_g (f <= g),   and for each channel sum_j p v,   sum_j p v d_f
// About the row itself little cancels in the covariances that are made of them.

#pragma once

#include "../../dense/tiled_scores.h"
#include "tasks.h"

namespace nwfast {
namespace NWFAST_ISA {

template <typename T>
constexpr T kLeastScore = sizeof(T) == 4 ? T(-64) : T(-200);  // weights of less are 0, see least_score

// Sums of the vectors of a tile are kept in double, lane by lane, up to the last tile.
template <typename T>
NWFAST_INLINE void add_wide(Vec<T> x, Vec<double>& to) {
  if constexpr (sizeof(T) == 8) {
    to += x;
  } else {
    Vec<double> lower, upper;
    widen(x, lower, upper);
    to += lower + upper;
  }
}

// Of the weights of a tile, which are left in the place of the scores, and of the first channel. `sums`: the
// weights, then all in their order.
template <typename T, int kFeatures>
NWFAST_INLINE void sum_offsets(const TiledData<T>& data, const T* query, int64_t begin, int64_t count, T top, T* scores,
                               Vec<double>* sums) {
  constexpr int kPairs = kFeatures * (kFeatures + 1) / 2;
  Vec<T> sum = {}, first[kFeatures] = {}, second[kPairs] = {}, value = {}, by_value[kFeatures] = {};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vec<T> weight = exp2<T>(drop_below<T>(load(scores + j) - top, kLeastScore<T>));
    store<T>(scores + j, weight);
    sum += weight;
    Vec<T> offset[kFeatures];
#pragma GCC unroll 3
    for (int f = 0, pair = 0; f < kFeatures; ++f) {
      offset[f] = load(data.key + f * data.pitch + begin + j) - query[f];
      const Vec<T> heavy = weight * offset[f];
      first[f] += heavy;
#pragma GCC unroll 3
      for (int g = 0; g <= f; ++g, ++pair) second[pair] += heavy * offset[g];
    }
    const Vec<T> height = weight * load(data.value_columns + begin + j);
    value += height;
#pragma GCC unroll 3
    for (int f = 0; f < kFeatures; ++f) by_value[f] += height * offset[f];
  }
  add_wide<T>(sum, sums[0]);
  for (int f = 0; f < kFeatures; ++f) add_wide<T>(first[f], sums[1 + f]);
  for (int pair = 0; pair < kPairs; ++pair) add_wide<T>(second[pair], sums[1 + kFeatures + pair]);
  add_wide<T>(value, sums[1 + kFeatures + kPairs]);
  for (int f = 0; f < kFeatures; ++f) add_wide<T>(by_value[f], sums[2 + kFeatures + kPairs + f]);
}

// Of another channel.
template <typename T, int kFeatures>
NWFAST_INLINE void sum_values(const TiledData<T>& data, const T* query, int64_t begin, int64_t count, const T* weights,
                              const T* values, double* sums) {
  Vec<T> sum = {}, first[kFeatures] = {};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vec<T> heavy = load(weights + j) * load(values + j);
    sum += heavy;
#pragma GCC unroll 3
    for (int f = 0; f < kFeatures; ++f) {
      first[f] += heavy * (load(data.key + f * data.pitch + begin + j) - query[f]);
    }
  }
  sums[0] += horizontal_sum<T>(sum);
  for (int f = 0; f < kFeatures; ++f) sums[1 + f] += horizontal_sum<T>(first[f]);
}

template <typename T, int kFeatures>
NWFAST_ONE_COPY void window_moments(const GridWindowMoments<T>& task) {
  const TiledData<T>& data = task.data;
  alignas(64) T scores[kQ * kTileKeys];
  // What one channel and the geometry make.
  constexpr int kGeometry = kFeatures + kFeatures * (kFeatures + 1) / 2, kFirst = kGeometry + 1 + kFeatures;
  const int64_t all = kGeometry + data.channels * (1 + kFeatures);
  for (int64_t first = 0; first < task.rows; first += kQ) {
    const int rows = static_cast<int>(task.rows - first < kQ ? task.rows - first : kQ);
    const T* query[kQ];
    for (int r = 0; r < kQ; ++r) query[r] = task.query + (first + (r < rows ? r : 0)) * kFeatures;
    Vec<double> wide[kQ][1 + kFirst] = {};
    T top[kQ];
    for (int r = 0; r < kQ; ++r) top[r] = kLowestScore<T>;
    for (int64_t i = 0; i < rows * all; ++i) task.sums[first * all + i] = 0;
    for (int64_t begin = 0; begin < data.n; begin += kTileKeys) {
      const int64_t keys = data.n - begin < kTileKeys ? data.n - begin : kTileKeys;
      const int64_t count = (keys + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
      scores_of<T, false>(data, query, begin, count, kTileKeys, scores);
      mask_scores(data.n, begin, count, task.excluded ? task.excluded + first : nullptr, rows, kTileKeys, scores);
      for (int r = 0; r < rows; ++r) {
        T* const row = scores + r * kTileKeys;
        double* const sums = task.sums + (first + r) * all;
        const T highest = highest_score(row, count, top[r]);
        if (highest > top[r] && begin > 0) {
          const double factor = __builtin_exp2(static_cast<double>(top[r]) - static_cast<double>(highest));
          for (int i = 0; i < 1 + kFirst; ++i) wide[r][i] *= factor;
          for (int64_t i = kFirst; i < all; ++i) sums[i] *= factor;
        }
        top[r] = highest;
        sum_offsets<T, kFeatures>(data, query[r], begin, count, highest, row, wide[r]);
        for (int64_t c = 1; c < data.channels; ++c) {
          sum_values<T, kFeatures>(data, query[r], begin, count, row, data.value_columns + c * data.pitch + begin,
                                   sums + kGeometry + c * (1 + kFeatures));
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      task.total[first + r] = horizontal_sum<double>(wide[r][0]);
      for (int i = 0; i < kFirst; ++i) task.sums[(first + r) * all + i] = horizontal_sum<double>(wide[r][1 + i]);
      task.shift[first + r] = -static_cast<double>(top[r]);
    }
  }
}

template <typename T>
void grid_window_moments(const GridWindowMoments<T>& task) {
  task.data.features == 2 ? window_moments<T, 2>(task) : window_moments<T, 3>(task);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
