// Sums for any number of features and channels, over tiles of keys whose scores are held in the first-level cache.
//
// Forward: flash-attention's online softmax. For kTiledRows queries and a tile of keys: scores with their maximum,
// rescale what was summed if the maximum rose, exponentials, then the product with value. Scores and short channels
// have keys in lanes, many channels have channels in lanes. Sums over many features are made in blocks, and beyond a
// group of them what they add up to is held in double (in twice double for doubles): scores grow with the number of
// features, and so would the rounding of a single sum, while the weights depend on small differences between scores.
// Backward: weights are recomputed from the saved shift and total; the query side walks over tiles of keys for a few
// rows, the key side over blocks of rows for a tile of keys. Parallel over rows and key tiles in the driver.

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

// out (kQ, columns) += weights (kQ, keys; distance `pitch`) @ right (keys, columns; distance `right_pitch`), lanes hold
// columns. kTransposed: weights (keys, kQ...) with `pitch` between keys.
template <typename T, int kVectors, bool kTransposed>
NWFAST_INLINE void multiply_columns(const T* weights, int64_t pitch, int64_t keys, const T* right, int64_t right_pitch,
                                    double* out, int64_t out_pitch, int64_t columns, int rows) {
  Vec<T> sum[kQ][kVectors] = {};
  for (int64_t j = 0; j < keys; ++j) {
    Vec<T> column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load(right + j * right_pitch + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < kQ; ++r) {
      const Vec<T> weight = splat<T>(kTransposed ? weights[j * pitch + r] : weights[r * pitch + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += weight * column[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = columns - v * kLanes<T>;
      const int lanes = static_cast<int>(left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>);
      add_lanes<T>(sum[r][v], lanes, out + r * out_pitch + v * kLanes<T>);
    }
  }
}

template <typename T, bool kTransposed>
NWFAST_ONE_COPY void multiply(const T* weights, int64_t pitch, int64_t keys, const T* right, int64_t right_pitch,
                              double* out, int64_t out_pitch, int64_t columns, int rows) {
  constexpr int kWide = NWFAST_LEVEL == 512 ? 4 : 2;
  int64_t c = 0;
  for (; c < columns; c += kWide * kLanes<T>) {
    if (columns - c <= kLanes<T>) {
      multiply_columns<T, 1, kTransposed>(weights, pitch, keys, right + c, right_pitch, out + c, out_pitch, columns - c,
                                          rows);
    } else {
      multiply_columns<T, kWide, kTransposed>(weights, pitch, keys, right + c, right_pitch, out + c, out_pitch,
                                              columns - c, rows);
    }
  }
}

// Row sums of weights * column for kQ rows, in double.
template <typename T>
NWFAST_INLINE void dot_rows(const T* weights, int64_t pitch, int64_t count, const T* column, double* out) {
  Vec<T> sum[kQ] = {};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const Vec<T> value = load(column + j);
    for (int r = 0; r < kQ; ++r) sum[r] += load(weights + r * pitch + j) * value;
  }
  for (int r = 0; r < kQ; ++r) out[r] = horizontal_sum<T>(sum[r]);
}

template <typename T, bool kWide>
void tiled_rows_in(const TiledRows<T>& task) {
  using S = Score<T, kWide>;
  constexpr bool kInPlace = std::is_same_v<S, T>;
  const TiledData<T>& data = task.data;
  alignas(64) T weights[kQ * kTileKeys];
  alignas(64) S wide_scores[kInPlace ? 1 : kQ * kTileKeys];
  S* scores = wide_scores;
  if constexpr (kInPlace) scores = weights;
  for (int64_t first = 0; first < task.rows; first += kQ) {
    const int rows = static_cast<int>(task.rows - first < kQ ? task.rows - first : kQ);
    const T* query[kQ];
    for (int r = 0; r < kQ; ++r) query[r] = task.query + (first + (r < rows ? r : 0)) * data.features;
    const int64_t* excluded = task.excluded ? task.excluded + first : nullptr;
    double total[kQ] = {};
    S top[kQ];
    double* values = task.values + first * data.channels;
    for (int r = 0; r < kQ; ++r) top[r] = kLowestScore<S>;
    for (int64_t i = 0; i < rows * data.channels; ++i) values[i] = 0;
    for (int64_t begin = 0; begin < data.n; begin += kTileKeys) {
      const int64_t left = data.n - begin;
      const int64_t keys = left < kTileKeys ? left : kTileKeys;
      const int64_t count = (keys + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
      scores_of<T, kWide>(data, query, begin, count, kTileKeys, scores);
      mask_scores(data.n, begin, count, excluded, rows, kTileKeys, scores);
      for (int r = 0; r < kQ; ++r) {
        const S* const row = scores + r * kTileKeys;
        T* const weight_row = weights + r * kTileKeys;
        Vec<S> high = splat<S>(top[r]);
        for (int64_t j = 0; j < count; j += kLanes<S>) {
          const Vec<S> score = load(row + j);
          high = select<S>(score > high, score, high);
        }
        S highest = top[r];
        for (int i = 0; i < kLanes<S>; ++i) highest = high[i] > highest ? high[i] : highest;
        if (highest > top[r]) {
          if (total[r] != 0 && r < rows) {
            const double factor = __builtin_exp2(static_cast<double>(top[r]) - static_cast<double>(highest));
            total[r] *= factor;
            for (int64_t c = 0; c < data.channels; ++c) values[r * data.channels + c] *= factor;
          }
          top[r] = highest;
        }
        Vec<T> sum = {};
        for (int64_t j = 0; j < count; j += kLanes<T>) {
          const Vec<T> weight = exp2<T>(scores_below(row + j, highest, Vec<T>{}));
          sum += weight;
          store<T>(weight_row + j, weight);
        }
        total[r] += horizontal_sum<T>(sum);
      }
      if (data.value_columns) {
        for (int64_t c = 0; c < data.channels; ++c) {
          double sums[kQ];
          dot_rows(weights, kTileKeys, count, data.value_columns + c * data.pitch + begin, sums);
          for (int r = 0; r < rows; ++r) values[r * data.channels + c] += sums[r];
        }
      } else {
        multiply<T, false>(weights, kTileKeys, keys, data.value_rows + begin * data.channel_pitch, data.channel_pitch,
                           values, data.channels, data.channels, rows);
      }
    }
    for (int r = 0; r < rows; ++r) {
      task.total[first + r] = total[r];
      task.shift[first + r] = -static_cast<double>(top[r]);
    }
  }
}

template <typename T>
void tiled_rows(const TiledRows<T>& task) {
  task.data.features > kFeatureGroup ? tiled_rows_in<T, true>(task) : tiled_rows_in<T, false>(task);
}

// One row block's view of the backward pass.
template <typename T>
struct GradRows {
  const T *query[kQ], *value_grad[kQ];
  T inverse_total[kQ], offset_grad[kQ], lse_grad[kQ];
  double shift[kQ];
  const int64_t* excluded;
  int rows;

  template <typename Task>
  NWFAST_INLINE GradRows(const Task& task, int64_t first, int64_t end) {
    rows = static_cast<int>(end - first < kQ ? end - first : kQ);
    for (int r = 0; r < kQ; ++r) {
      const int64_t row = first + (r < rows ? r : 0);
      query[r] = task.query + row * task.data.features;
      value_grad[r] = task.value_grad + row * task.data.channel_pitch;
      shift[r] = task.shift[row];
      inverse_total[r] = task.inverse_total[row];
      offset_grad[r] = task.offset_grad[row];
      lse_grad[r] = task.lse_grad[row];
    }
    excluded = task.excluded ? task.excluded + first : nullptr;
  }
};

// From scores (already shifted if kShifted) to p_ij (in place) and u_ij for kVectors vectors of keys.
template <typename T, int kVectors, bool kShifted>
NWFAST_INLINE void weigh(const TiledData<T>& data, const GradRows<T>& block, const T* columns, int64_t pitch,
                         T* weights, T* grads) {
  Vec<T> product[kQ][kVectors] = {};
  for (int64_t c = 0; c < data.channels; ++c) {
    Vec<T> value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load(columns + c * data.pitch + v * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < kQ; ++r) {
      const Vec<T> grad = splat<T>(block.value_grad[r][c]);
      for (int v = 0; v < kVectors; ++v) product[r][v] += value[v] * grad;
    }
  }
  for (int r = 0; r < kQ; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* const place = weights + r * pitch + v * kLanes<T>;
      Vec<T> score = load(place);
      if (!kShifted) score += static_cast<T>(block.shift[r]);
      // A key of weight 0 (whose log is not part of the score here) may lie so much nearer than all that count that no
      // number holds what it weighs.
      const Vec<T> infinite = splat<T>(std::numeric_limits<T>::infinity());
      const Vec<T> exponential = select<T>(score > splat<T>(Simd<T>::kBias - 1), infinite, exp2<T>(score));
      const Vec<T> weight = exponential * block.inverse_total[r];
      store<T>(place, weight);
      // The difference first: where a row's weight is all on one key it is exactly 0, and the gradient of lse is left.
      store<T>(grads + r * pitch + v * kLanes<T>, weight * (product[r][v] - block.offset_grad[r] + block.lse_grad[r]));
    }
  }
}

// p_ij and u_ij for kQ rows and the keys [begin, begin + count), to weights and grads (kQ, pitch).
template <typename T, bool kWide>
NWFAST_ONE_COPY void weights_and_grads(const TiledData<T>& data, const GradRows<T>& block, int64_t begin, int64_t count,
                                       int64_t pitch, T* weights, T* grads) {
  using S = Score<T, kWide>;
  constexpr bool kInPlace = std::is_same_v<S, T>;
  alignas(64) S wide_scores[kInPlace ? 1 : kQ * kTileKeys];
  S* scores = wide_scores;
  if constexpr (kInPlace) scores = weights;
  scores_of<T, kWide>(data, block.query, begin, count, pitch, scores);
  mask_scores(data.n, begin, count, block.excluded, block.rows, pitch, scores);
  if constexpr (!kInPlace) {
    for (int r = 0; r < kQ; ++r) {
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        store<T>(weights + r * pitch + j, scores_below(scores + r * pitch + j, -block.shift[r], Vec<T>{}));
      }
    }
  }
  const T* const columns = data.value_columns + begin;
  int64_t j = 0;
  for (; j + 2 * kLanes<T> <= count; j += 2 * kLanes<T>) {
    weigh<T, 2, !kInPlace>(data, block, columns + j, pitch, weights + j, grads + j);
  }
  if (j < count) weigh<T, 1, !kInPlace>(data, block, columns + j, pitch, weights + j, grads + j);
}

template <typename T, bool kWide>
void tiled_query_grad_in(const TiledQueryGrad<T>& task) {
  const TiledData<T>& data = task.data;
  alignas(64) T weights[kQ * kTileKeys];
  alignas(64) T grads[kQ * kTileKeys];
  for (int64_t first = 0; first < task.rows; first += kQ) {
    const GradRows<T> block(task, first, task.rows);
    const int rows = block.rows;
    double* first_moment = task.first + first * data.features;
    double* second_moment = task.second + first * data.features;
    for (int64_t i = 0; i < rows * data.features; ++i) first_moment[i] = second_moment[i] = 0;
    for (int64_t begin = 0; begin < data.n; begin += kTileKeys) {
      const int64_t left = data.n - begin;
      const int64_t keys = left < kTileKeys ? left : kTileKeys;
      const int64_t count = (keys + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
      weights_and_grads<T, kWide>(data, block, begin, count, kTileKeys, weights, grads);
      for (int64_t f = 0; f < data.features; ++f) {
        Vec<T> sum[kQ] = {}, square[kQ] = {};
        for (int64_t j = 0; j < count; j += kLanes<T>) {
          const Vec<T> key = load(data.key + f * data.pitch + begin + j);
          for (int r = 0; r < kQ; ++r) {
            const Vec<T> difference = block.query[r][f] - key;
            const Vec<T> moment = load(grads + r * kTileKeys + j) * difference;
            sum[r] += moment;
            square[r] += moment * difference;
          }
        }
        for (int r = 0; r < rows; ++r) {
          first_moment[r * data.features + f] += horizontal_sum<T>(sum[r]);
          second_moment[r * data.features + f] += horizontal_sum<T>(square[r]);
        }
      }
    }
  }
}

template <typename T>
void tiled_query_grad(const TiledQueryGrad<T>& task) {
  task.data.features > kFeatureGroup ? tiled_query_grad_in<T, true>(task) : tiled_query_grad_in<T, false>(task);
}

template <typename T, bool kWide>
void tiled_key_grad_in(const TiledKeyGrad<T>& task) {
  constexpr int64_t kBlock = 32;  // rows whose weights are held at once
  const TiledData<T>& data = task.data;
  alignas(64) T weights[kBlock * kKeyTile];
  alignas(64) T grads[kBlock * kKeyTile];
  const int64_t keys = task.key_end - task.key_begin;
  const int64_t count = (keys + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < keys * data.channels; ++i) task.sum_value[i] = 0;
  for (int64_t i = 0; i < keys * data.features; ++i) task.sum_offset[i] = 0;
  for (int64_t i = 0; i < keys; ++i) task.sum_weight[i] = 0;
  for (int64_t first = 0; first < task.rows; first += kBlock) {
    const int64_t block = task.rows - first < kBlock ? task.rows - first : kBlock;
    for (int64_t group = 0; group < block; group += kQ) {
      weights_and_grads<T, kWide>(data, GradRows<T>(task, first + group, first + block), task.key_begin, count,
                                  kKeyTile, weights + group * kKeyTile, grads + group * kKeyTile);
    }
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      const int lanes = static_cast<int>(keys - j < kLanes<T> ? keys - j : kLanes<T>);
      Vec<T> sum = {};
      for (int64_t r = 0; r < block; ++r) sum += load(grads + r * kKeyTile + j);
      add_lanes<T>(sum, lanes, task.sum_weight + j);
      for (int64_t f = 0; f < data.features; ++f) {
        const Vec<T> key = load(data.key + f * data.pitch + task.key_begin + j);
        Vec<T> moment = {};
        for (int64_t r = 0; r < block; ++r) {
          moment += load(grads + r * kKeyTile + j) * (task.query[(first + r) * data.features + f] - key);
        }
        for (int i = 0; i < lanes; ++i) task.sum_offset[(j + i) * data.features + f] += static_cast<double>(moment[i]);
      }
      if (data.channels <= kMaxColumns) {
        for (int64_t c = 0; c < data.channels; ++c) {
          Vec<T> value = {};
          for (int64_t r = 0; r < block; ++r) {
            value += load(weights + r * kKeyTile + j) * task.value_grad[(first + r) * data.channel_pitch + c];
          }
          for (int i = 0; i < lanes; ++i) task.sum_value[(j + i) * data.channels + c] += static_cast<double>(value[i]);
        }
      }
    }
    if (data.channels > kMaxColumns) {
      for (int64_t j = 0; j < keys; j += kQ) {
        const int some = static_cast<int>(keys - j < kQ ? keys - j : kQ);
        multiply<T, true>(weights + j, kKeyTile, block, task.value_grad + first * data.channel_pitch,
                          data.channel_pitch, task.sum_value + j * data.channels, data.channels, data.channels, some);
      }
    }
  }
}

template <typename T>
void tiled_key_grad(const TiledKeyGrad<T>& task) {
  task.data.features > kFeatureGroup ? tiled_key_grad_in<T, true>(task) : tiled_key_grad_in<T, false>(task);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
