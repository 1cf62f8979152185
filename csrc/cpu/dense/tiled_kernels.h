// Sums for any number of features and channels, over tiles of keys whose scores are held in the first-level cache.
//
// Forward: flash-attention's online softmax. For kTiledRows queries and a tile of keys: scores with their maximum,
// rescale what was summed if the maximum rose, exponentials, then the product with value. Scores and short channels
// have keys in lanes, many channels have channels in lanes.
// Backward: weights are recomputed from the saved shift and total; the query side walks over tiles of keys for a few
// rows, the key side over blocks of rows for a tile of keys. Parallel over rows and key tiles in the driver.

#pragma once

#include "tiled_scores.h"

namespace nwfast {
namespace NWFAST_ISA {

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
        const S highest = highest_score(row, count, top[r]);
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
  T inverse_total[kQ], offset_grad[kQ], lse_grad[kQ], least[kQ];
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
      least[r] = least_score(inverse_total[r], value_grad[r], task.data.channels, lse_grad[r]);
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
      score = drop_below<T>(score, block.least[r]);
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
