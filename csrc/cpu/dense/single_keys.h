// The key side for one feature and one channel: lanes hold keys, whose sums stay in registers over a block of rows.
// That of more features or channels is in tiled_kernels.h.

#pragma once

#include "single_scores.h"

namespace nwfast {
namespace NWFAST_ISA {

constexpr int kKeyVectors = NWFAST_LEVEL == 512 ? 3 : 2;  // vectors of keys whose accumulators live in registers

template <typename T, int kVectors>
struct KeyAccumulator {
  Vec<T> key[kVectors], value[kVectors];
  Vec<T> sum_value[kVectors], sum_weight[kVectors], sum_offset[kVectors];

  NWFAST_INLINE void clear() {
    for (int v = 0; v < kVectors; ++v) sum_value[v] = sum_weight[v] = sum_offset[v] = Vec<T>{};
  }

  template <Scores kMode, bool kExclude>
  NWFAST_INLINE void add(const SingleKeys<T>& task, int64_t row, int64_t j) {
    const Vec<T> scale = splat<T>(task.scale), query = splat<T>(task.query[row]);
    const Vec<T> value_grad = splat<T>(task.value_grad[row]), lse_grad = splat<T>(task.lse_grad[row]);
    const Vec<T> mean = splat<T>(task.mean[row]);
    const Vec<T> nearest = splat<T>(task.nearest[row]);
    const Mirrored<Vec<T>> twice = splat<T>(mirrored(task.query[row], task.nearest[row]));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> difference = query - key[v];
      Vec<T> score;
      if (relative(kMode)) {
        Vec<T> offset;
        score = relative_score<T, kMode>(key[v], nearest, twice, scale, offset);
      } else {
        const Vec<T> offset = kMode == Scores::kNear ? difference * scale : difference;
        score = Vec<T>{} - offset * offset;
      }
      Vec<T> weight = exp2<T>(score);
      if (relative(kMode)) {
        const Vec<T> infinite = splat<T>(std::numeric_limits<T>::infinity());
        weight = select<T>(score > splat<T>(Simd<T>::kBias - 1), infinite, weight);
      }
      Vec<T> by_value = weight * value_grad;
      // The difference first: it is exactly 0 where a row's weight is all on this key.
      Vec<T> by_weight = weight * (value_grad * (value[v] - mean) + lse_grad);
      Vec<T> by_offset = by_weight * difference;
      if (kExclude) {  // whatever the key holds
        const int64_t place = task.excluded[row] - j - v * kLanes<T>;
        if (place >= 0 && place < kLanes<T>) by_value[place] = by_weight[place] = by_offset[place] = 0;
      }
      sum_value[v] += by_value;
      sum_weight[v] += by_weight;
      sum_offset[v] += by_offset;
    }
  }

  NWFAST_ONE_COPY void flush(const SingleKeys<T>& task, int64_t j) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t base = j + v * kLanes<T> - task.key_begin;
      const int64_t left = task.key_end - task.key_begin - base;
      const int lanes = static_cast<int>(left < kLanes<T> ? left : kLanes<T>);
      add_lanes<T>(sum_value[v], lanes, task.sum_value + base);
      add_lanes<T>(sum_weight[v], lanes, task.sum_weight + base);
      add_lanes<T>(sum_offset[v], lanes, task.sum_offset + base);
    }
    clear();
  }
};

template <typename T, int kVectors, Scores kMode>
void single_key_group(const SingleKeys<T>& task, int64_t j) {
  constexpr Scores kShifted = kMode == Scores::kWide ? Scores::kWide : Scores::kFar;
  KeyAccumulator<T, kVectors> sums;
  for (int v = 0; v < kVectors; ++v) {
    sums.key[v] = load(task.key + j + v * kLanes<T>);
    sums.value[v] = load(task.value + j + v * kLanes<T>);
  }
  sums.clear();
  const int64_t end = j + kVectors * kLanes<T>;
  for (int64_t first = 0; first < task.rows; first += kRowBlock) {
    const int64_t* window = task.windows + first / kRowBlock * 2;
    if (window[1] <= j || window[0] >= end) continue;
    const int64_t last = first + kRowBlock < task.rows ? first + kRowBlock : task.rows;
    bool far = false, exclude = false;
    for (int64_t row = first; row < last; ++row) {
      far |= task.shift[row] > 0;
      if (task.excluded) exclude |= task.excluded[row] >= j && task.excluded[row] < end;
    }
    auto local = sums;
    if (!far && !exclude && !task.skipped) {
      for (int64_t row = first; row < last; ++row) local.template add<kMode, false>(task, row, j);
    } else {
      for (int64_t row = first; row < last; ++row) {
        if (task.skipped && task.skipped[row]) continue;
        if (task.shift[row] > 0) {
          if (exclude) {
            local.template add<kShifted, true>(task, row, j);
          } else {
            local.template add<kShifted, false>(task, row, j);
          }
        } else if (exclude) {
          local.template add<kMode, true>(task, row, j);
        } else {
          local.template add<kMode, false>(task, row, j);
        }
      }
    }
    sums = local;
    sums.flush(task, j);
  }
}

template <typename T, Scores kMode>
NWFAST_INLINE void single_key_groups(const SingleKeys<T>& task) {
  const int64_t end = (task.key_end + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  int64_t j = task.key_begin;
  for (; j + kKeyVectors * kLanes<T> <= end; j += kKeyVectors * kLanes<T>) {
    single_key_group<T, kKeyVectors, kMode>(task, j);
  }
  for (; j < end; j += kLanes<T>) single_key_group<T, 1, kMode>(task, j);
}

template <typename T>
void single_keys(const SingleKeys<T>& task) {
  constexpr Scores kUnit = sizeof(T) == 4 && NWFAST_LEVEL > 128 ? Scores::kUnit : Scores::kNear;
  for (int64_t i = 0; i < task.key_end - task.key_begin; ++i) {
    task.sum_value[i] = task.sum_weight[i] = task.sum_offset[i] = 0;
  }
  if (task.wide) {
    single_key_groups<T, sizeof(T) == 8 ? Scores::kWide : Scores::kNear>(task);
  } else if (kUnit == Scores::kUnit && task.scale == 1) {
    single_key_groups<T, kUnit>(task);
  } else {
    single_key_groups<T, Scores::kNear>(task);
  }
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
