// The scores of a tile of pairs. Sums over many features are made in blocks, and beyond a group of them what they add
// up to is held in double (in twice double for doubles): scores grow with the number of features, and so would the
// rounding of a plain sum, while the weights depend on small differences between scores.

#pragma once

#include "../simd.h"
#include "kernels.h"

namespace nwfast {
namespace NWFAST_ISA {

constexpr int kQ = kTiledRows;
// Below all scores, and finite, so that a row without keys never computes inf - inf.
template <typename T>
constexpr T kLowestScore = sizeof(T) == 4 ? T(-0x1p120) : T(-0x1p1000);

// Scores are summed in blocks of so many features, and beyond a group of so many in double.
constexpr int64_t kFeatureBlock = 16, kFeatureGroup = 64;

// What a tile of scores is held in.
template <typename T, bool kWide>
using Score = std::conditional_t<kWide, double, T>;

// A vector of floats as two of doubles, and back.
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));
NWFAST_INLINE void widen(Vec<float> v, Vec<double>& lower, Vec<double>& upper) {
  HalfFloats half;
  std::memcpy(&half, &v, sizeof half);
  lower = __builtin_convertvector(half, Vec<double>);
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  upper = __builtin_convertvector(half, Vec<double>);
}
NWFAST_INLINE Vec<float> narrow(Vec<double> lower, Vec<double> upper) {
  const HalfFloats halves[2] = {__builtin_convertvector(lower, HalfFloats), __builtin_convertvector(upper, HalfFloats)};
  Vec<float> v;
  std::memcpy(&v, halves, sizeof v);
  return v;
}

// The sum of many vectors of squares.
template <typename T>
struct WideScore;
template <>
struct WideScore<float> {
  Vec<double> lower = {}, upper = {};

  NWFAST_INLINE void add(Vec<float> x) {
    Vec<double> low, high;
    widen(x, low, high);
    lower += low;
    upper += high;
  }
  NWFAST_INLINE void store_scores(double factor, const float* log_weight, double* to) const {
    Vec<double> low = {}, high = {};
    if (log_weight) widen(load(log_weight), low, high);
    store<double>(to, lower * factor + low);
    store<double>(to + kLanes<double>, upper * factor + high);
  }
};
template <>
struct WideScore<double> {
  Vec<double> sum = {}, rest = {};  // rest: what rounding took from sum (Knuth's two-sum)

  NWFAST_INLINE void add(Vec<double> x) {
    const Vec<double> next = sum + x, part = next - sum;
    rest += (sum - (next - part)) + (x - part);
    sum = next;
  }
  NWFAST_INLINE void store_scores(double factor, const double* log_weight, double* to) const {
    Vec<double> total = sum + rest;
    total = select<double>(total == total, total, sum);  // an overflow leaves no rest
    store<double>(to, total * factor + (log_weight ? load(log_weight) : Vec<double>{}));
  }
};

// Scores less `top`, in the dtype that weights are computed in.
NWFAST_INLINE Vec<float> scores_below(const double* scores, double top, Vec<float>) {
  return narrow(load(scores) - top, load(scores + kLanes<double>) - top);
}
template <typename T>
NWFAST_INLINE Vec<T> scores_below(const T* scores, T top, Vec<T>) {
  return load(scores) - top;
}

// Adds the squared differences in the features [first, last) for kQ rows and a vector of keys from `key` on.
template <typename T, bool kUniform>
NWFAST_INLINE void add_squares(const TiledData<T>& data, const T* const* query, int64_t first, int64_t last,
                               int64_t key, Vec<T>* sum) {
#pragma GCC unroll 4
  for (int64_t f = first; f < last; ++f) {
    const Vec<T> coordinate = load(data.key + f * data.pitch + key);
    for (int r = 0; r < kQ; ++r) {
      Vec<T> d = query[r][f] - coordinate;
      if (!kUniform) d = d * data.feature_scale[f];
      sum[r] += d * d;
    }
  }
}

// The same in blocks.
template <typename T, bool kUniform>
NWFAST_INLINE void add_blocks(const TiledData<T>& data, const T* const* query, int64_t first, int64_t last, int64_t key,
                              Vec<T>* sum) {
  for (int64_t block = first; block < last; block += kFeatureBlock) {
    Vec<T> part[kQ] = {};
    add_squares<T, kUniform>(data, query, block, block + kFeatureBlock < last ? block + kFeatureBlock : last, key,
                             part);
    for (int r = 0; r < kQ; ++r) sum[r] += part[r];
  }
}

// As score_rows below, for many features.
template <typename T, bool kUniform>
NWFAST_INLINE void score_rows_wide(const TiledData<T>& data, const T* const* query, int64_t begin, int64_t count,
                                   int64_t pitch, double* scores) {
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    WideScore<T> total[kQ];
    for (int64_t group = 0; group < data.features; group += kFeatureGroup) {
      const int64_t last = group + kFeatureGroup < data.features ? group + kFeatureGroup : data.features;
      Vec<T> part[kQ] = {};
      add_blocks<T, kUniform>(data, query, group, last, begin + j, part);
      for (int r = 0; r < kQ; ++r) total[r].add(part[r]);
    }
    const T* const log_weight = data.log_weight ? data.log_weight + begin + j : nullptr;
    for (int r = 0; r < kQ; ++r) {
      total[r].store_scores(-static_cast<double>(data.score_scale), log_weight, scores + r * pitch + j);
    }
  }
}

// t_ij (not yet shifted) for kQ rows and the keys [begin, begin + count), to scores (kQ, pitch). kFeatures = 0: at run
// time.
template <typename T, int kFeatures, bool kUniform>
NWFAST_INLINE void score_rows(const TiledData<T>& data, const T* const* query, int64_t begin, int64_t count,
                              int64_t pitch, T* scores) {
  const int64_t features = kFeatures ? kFeatures : data.features;
  const Vec<T> score_scale = splat<T>(-data.score_scale);
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    Vec<T> sum[kQ] = {};
    if (features <= kFeatureBlock) {
      add_squares<T, kUniform>(data, query, 0, features, begin + j, sum);
    } else {
      add_blocks<T, kUniform>(data, query, 0, features, begin + j, sum);
    }
    const Vec<T> log_weight = data.log_weight ? load(data.log_weight + begin + j) : Vec<T>{};
    for (int r = 0; r < kQ; ++r) store<T>(scores + r * pitch + j, sum[r] * score_scale + log_weight);
  }
}

template <typename T, bool kWide>
NWFAST_ONE_COPY void scores_of(const TiledData<T>& data, const T* const* query, int64_t begin, int64_t count,
                               int64_t pitch, Score<T, kWide>* scores) {
  if constexpr (kWide) {
    data.feature_scale ? score_rows_wide<T, false>(data, query, begin, count, pitch, scores)
                       : score_rows_wide<T, true>(data, query, begin, count, pitch, scores);
  } else if (data.feature_scale) {
    score_rows<T, 0, false>(data, query, begin, count, pitch, scores);
  } else if (data.features == 1) {
    score_rows<T, 1, true>(data, query, begin, count, pitch, scores);
  } else if (data.features == 2) {
    score_rows<T, 2, true>(data, query, begin, count, pitch, scores);
  } else if (data.features == 3) {
    score_rows<T, 3, true>(data, query, begin, count, pitch, scores);
  } else {
    score_rows<T, 0, true>(data, query, begin, count, pitch, scores);
  }
}

// The highest of `count` scores and `high`.
template <typename T>
NWFAST_INLINE T highest_score(const T* row, int64_t count, T high) {
  Vec<T> highs = splat<T>(high);
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vec<T> score = load(row + j);
    highs = select<T>(score > highs, score, highs);
  }
  for (int i = 0; i < kLanes<T>; ++i) high = highs[i] > high ? highs[i] : high;
  return high;
}

// Keys beyond n and excluded keys get no weight.
template <typename T>
NWFAST_INLINE void mask_scores(int64_t n, int64_t begin, int64_t count, const int64_t* excluded, int rows,
                               int64_t pitch, T* scores) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  for (int r = 0; r < rows; ++r) {
    for (int64_t j = n - begin > 0 ? n - begin : 0; j < count; ++j) scores[r * pitch + j] = kNone;
    if (excluded && excluded[r] >= begin && excluded[r] < begin + count)
      scores[r * pitch + excluded[r] - begin] = kNone;
  }
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
