// Sums over pairs of points with many features, by matrix products: scores as |x|^2 + |u|^2 - 2 x.u, values, and
// gradients, each in blocks of a few rows by two vectors that stay in registers.
//
// A tile of kProductRows rows (twice as many on the key side) and kProductKeys keys is held in the cache: its scores,
// then weights and what they pull at. What a block multiplies lies in panels (panels.h), which it reads from end to
// end. Inner products are sums of sums over kProductDepth features; sums over the keys or rows of a tile are added up
// in double. Parallel over rows and key tiles in the driver.

#pragma once

#include "../tiled_kernels.h"
#include "tasks.h"

namespace nwfast {
namespace NWFAST_ISA {

constexpr int kBlockRows = NWFAST_LEVEL == 512 ? 12 : 6;
constexpr int kBlockVectors = 2;
constexpr int kBlockColumns = kBlockVectors * kLanes<float>;
static_assert(kProductRows % 12 == 0 && kProductKeys % kBlockColumns == 0);
static_assert(kPanel % kBlockColumns == 0 || (kPanel == kLanes<float> && kPanelsTogether % kBlockVectors == 0));

// From the first vector of a block's columns to the second, for panels of `depth` rows: they lie side by side, or in
// two panels.
NWFAST_INLINE int64_t next_vector(int64_t depth) { return kPanel == kLanes<float> ? depth * kPanel : kLanes<float>; }

// block (kBlockRows, kVectors vectors; distance kBlockColumns) = left @ right, or += : left[r, k] at left[r * row + k *
// step], right[k] at right + k * kPanel, its second vector `next` further.
template <int kVectors>
NWFAST_ONE_COPY void multiply_block(const float* left, int64_t row, int64_t step, int64_t depth, const float* right,
                                    int64_t next, bool add, float* block) {
  Vec<float> sum[kBlockRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(right + k * kPanel + v * next);
#pragma GCC unroll 12
    for (int r = 0; r < kBlockRows; ++r) {
      const Vec<float> x = splat<float>(left[r * row + k * step]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* const to = block + r * kBlockColumns + v * kLanes<float>;
      store<float>(to, add ? sum[r][v] + load(to) : sum[r][v]);
    }
  }
}

// out (rows, columns; distance `pitch`) += left @ right, for panels of columns with `distance` rows each.
NWFAST_ONE_COPY void add_product(const float* left, int64_t row, int64_t step, int64_t rows, int64_t depth,
                                 const float* right, int64_t distance, int64_t columns, double* out) {
  alignas(64) float block[kBlockRows * kBlockColumns];
  const int64_t next = next_vector(distance);
  for (int64_t c = 0; c < columns; c += kBlockColumns) {
    const float* const panel = right + c / kPanel * distance * kPanel + c % kPanel;
    const int64_t some = columns - c < kBlockColumns ? columns - c : kBlockColumns;
    const auto multiply = some > kLanes<float> ? multiply_block<kBlockVectors> : multiply_block<1>;
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      multiply(left + first * row, row, step, depth, panel, next, false, block);
      const int64_t count = rows - first < kBlockRows ? rows - first : kBlockRows;
      for (int64_t r = 0; r < count; ++r) {
        const float* const from = block + r * kBlockColumns;
        double* const to = out + (first + r) * columns + c;
        if (some == kBlockColumns) {
          for (int v = 0; v < kBlockColumns; ++v) to[v] += static_cast<double>(from[v]);
        } else {
          for (int64_t v = 0; v < some; ++v) to[v] += static_cast<double>(from[v]);
        }
      }
    }
  }
}

// Scores of `rows` rows (padded to a block), each less a constant of the row, and the keys [begin, begin + count),
// count padded to a block, to scores (rows, kProductKeys).
NWFAST_ONE_COPY void product_scores(const ProductData& data, const float* query, int64_t rows, int64_t begin,
                                    int64_t count, float* scores) {
  alignas(64) float block[kBlockRows * kBlockColumns];
  for (int64_t j = 0; j < count; j += kBlockColumns) {
    const int64_t key = begin + j;
    const float* const panel = data.key_lanes + key / kPanel * data.features * kPanel + key % kPanel;
    Vec<float> charge[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) charge[v] = load(data.key_charge + key + v * kLanes<float>);
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      for (int64_t f = 0; f < data.features; f += kProductDepth) {
        const int64_t depth = data.features - f < kProductDepth ? data.features - f : kProductDepth;
        multiply_block<kBlockVectors>(query + first * data.features + f, data.features, 1, depth, panel + f * kPanel,
                                      next_vector(data.features), f > 0, block);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kBlockVectors; ++v) {
          store<float>(scores + (first + r) * kProductKeys + j + v * kLanes<float>,
                       2 * load(block + r * kBlockColumns + v * kLanes<float>) + charge[v]);
        }
      }
    }
  }
}

NWFAST_INLINE int64_t padded_rows(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }
NWFAST_INLINE int64_t padded_keys(int64_t keys) { return (keys + kBlockColumns - 1) / kBlockColumns * kBlockColumns; }

// Keys that rows leave out get no weight.
NWFAST_INLINE void mask_own(const int64_t* excluded, int64_t rows, int64_t begin, int64_t count, float* scores) {
  for (int64_t r = 0; excluded && r < rows; ++r) {
    if (excluded[r] >= begin && excluded[r] < begin + count) {
      scores[r * kProductKeys + excluded[r] - begin] = -std::numeric_limits<float>::infinity();
    }
  }
}

NWFAST_ONE_COPY void product_rows(const ProductRows& task) {
  const ProductData& data = task.data;
  alignas(64) float weights[kProductRows * kProductKeys] = {};  // first scores
  float top[kProductRows];
  const int64_t rows = padded_rows(task.rows);
  for (int64_t i = 0; i < task.rows * data.channels; ++i) task.values[i] = 0;
  for (int64_t r = 0; r < rows; ++r) top[r] = kLowestScore<float>;
  for (int64_t r = 0; r < task.rows; ++r) task.total[r] = 0;
  for (int64_t begin = 0; begin < data.n; begin += kProductKeys) {
    const int64_t keys = data.n - begin < kProductKeys ? data.n - begin : kProductKeys, count = padded_keys(keys);
    product_scores(data, task.query, rows, begin, count, weights);
    mask_own(task.excluded, task.rows, begin, count, weights);
    for (int64_t r = 0; r < task.rows; ++r) {
      float* const row = weights + r * kProductKeys;
      const float highest = highest_score(row, count, top[r]);
      if (highest > top[r]) {
        if (task.total[r] != 0) {
          const double factor = __builtin_exp2(static_cast<double>(top[r]) - static_cast<double>(highest));
          task.total[r] *= factor;
          for (int64_t c = 0; c < data.channels; ++c) task.values[r * data.channels + c] *= factor;
        }
        top[r] = highest;
      }
      Vec<float> sum = {};
      for (int64_t j = 0; j < count; j += kLanes<float>) {
        const Vec<float> weight = exp2<float>(load(row + j) - highest);
        sum += weight;
        store<float>(row + j, weight);
      }
      task.total[r] += horizontal_sum<float>(sum);
    }
    if (data.value_columns) {
      for (int64_t r = 0; r < task.rows; r += kQ) {
        for (int64_t c = 0; c < data.channels; ++c) {
          double sums[kQ];
          dot_rows(weights + r * kProductKeys, kProductKeys, count, data.value_columns + c * data.pitch + begin, sums);
          for (int i = 0; i < kQ && r + i < task.rows; ++i) task.values[(r + i) * data.channels + c] += sums[i];
        }
      }
    } else {
      add_product(weights, kProductKeys, 1, task.rows, keys, data.value_panels + begin * kPanel, data.n, data.channels,
                  task.values);
    }
  }
  for (int64_t r = 0; r < task.rows; ++r) task.shift[r] = task.constant[r] - static_cast<double>(top[r]);
}

// u_ij, and p_ij in `weights`, for `rows` rows (at most 2 kProductRows) from `first` on and the keys [begin, begin +
// count): (rows, kProductKeys) each.
NWFAST_ONE_COPY void product_pulls(const ProductGradRows& task, int64_t first, int64_t rows, int64_t begin,
                                   int64_t count, float* weights, float* pulls) {
  const ProductData& data = task.data;
  alignas(64) float block[kBlockRows * kBlockColumns];
  float least[2 * kProductRows];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    least[i] = least_score(task.inverse_total[row], task.value_grad + row * task.value_pitch, data.channels,
                           task.lse_grad[row]);
  }
  const int64_t padded = padded_rows(rows);
  product_scores(data, task.query + first * data.features, padded, begin, count, weights);
  mask_own(task.excluded ? task.excluded + first : nullptr, rows, begin, count, weights);
  for (int64_t j = 0; j < count; j += kBlockColumns) {
    const int64_t key = begin + j;
    const float* const panel = data.value_lanes + key / kPanel * data.channels * kPanel + key % kPanel;
    for (int64_t r = 0; r < padded; r += kBlockRows) {
      // In one sum, as offset_grad is made.
      multiply_block<kBlockVectors>(task.value_grad + (first + r) * task.value_pitch, task.value_pitch, 1,
                                    data.channels, panel, next_vector(data.channels), false, block);
      for (int64_t i = 0; i < kBlockRows && r + i < rows; ++i) {
        const int64_t row = first + r + i, place = (r + i) * kProductKeys + j;
        for (int v = 0; v < kBlockVectors; ++v) {
          const int64_t at = place + v * kLanes<float>;
          const Vec<float> product = load(block + i * kBlockColumns + v * kLanes<float>);
          const Vec<float> score = drop_below<float>(load(weights + at) - task.top[row], least[r + i]);
          const Vec<float> weight = exp2<float>(score) * task.inverse_total[row];
          store<float>(weights + at, weight);
          // The difference first: where a row's weight is all on one key it is exactly 0, and the gradient of lse is
          // left.
          store<float>(pulls + at, weight * (product - task.offset_grad[row] + task.lse_grad[row]));
        }
      }
    }
  }
}

// to[j] = sum over rows of a tile.
NWFAST_INLINE void column_sums(const float* tile, int64_t rows, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += kBlockColumns) {
    Vec<float> sum[kBlockVectors] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int v = 0; v < kBlockVectors; ++v) sum[v] += load(tile + r * kProductKeys + j + v * kLanes<float>);
    }
    for (int v = 0; v < kBlockVectors; ++v) store<float>(to + j + v * kLanes<float>, sum[v]);
  }
}

NWFAST_ONE_COPY void product_key_grad(const ProductKeyGrad& task) {
  constexpr int64_t kRows = 2 * kProductRows;
  const ProductData& data = task.data;
  alignas(64) float weights[kRows * kProductKeys] = {};
  alignas(64) float pulls[kRows * kProductKeys] = {};
  alignas(64) float sums[kProductKeys];
  const int64_t keys = task.key_end - task.key_begin, count = padded_keys(keys);
  for (int64_t first = 0; first < task.rows; first += kRows) {
    const int64_t rows = task.rows - first < kRows ? task.rows - first : kRows;
    product_pulls(task, first, rows, task.key_begin, count, weights, pulls);
    column_sums(pulls, rows, count, sums);
    for (int64_t j = 0; j < keys; ++j) task.sum_weight[j] += static_cast<double>(sums[j]);
    if (task.sum_value) {
      add_product(weights, 1, kProductKeys, keys, rows, task.grad_columns + first * kPanel, task.column_rows,
                  data.channels, task.sum_value);
    }
    if (task.sum_offset) {
      add_product(pulls, 1, kProductKeys, keys, rows, task.query_columns + first * kPanel, task.column_rows,
                  data.features, task.sum_offset);
    }
    if (!task.pulls) continue;
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(task.pulls + (first + r) * task.pulls_pitch + task.key_begin, pulls + r * kProductKeys,
                  static_cast<size_t>(count) * sizeof(float));
    }
  }
}

NWFAST_ONE_COPY void product_query_grad(const ProductQueryGrad& task) {
  const ProductData& data = task.data;
  for (int64_t i = 0; i < task.rows * data.features; ++i) task.moment[i] = 0;
  for (int64_t r = 0; r < task.rows; ++r) task.total[r] = 0;
  for (int64_t begin = 0; begin < data.n; begin += kProductKeys) {
    const int64_t keys = data.n - begin < kProductKeys ? data.n - begin : kProductKeys;
    const float* const pulls = task.pulls + begin;
    for (int64_t r = 0; r < task.rows; ++r) {
      Vec<float> sum = {};
      for (int64_t j = 0; j < padded_keys(keys); j += kLanes<float>) sum += load(pulls + r * task.pulls_pitch + j);
      task.total[r] += horizontal_sum<float>(sum);
    }
    add_product(pulls, task.pulls_pitch, 1, task.rows, keys, data.key_columns + begin * kPanel, data.n, data.features,
                task.moment);
  }
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
