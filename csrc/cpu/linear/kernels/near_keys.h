// Gradients of keys whose windows hold few rows, one channel: the transposed sums one by one, in the precision of the
// input. A vector of ascending keys (one a lane) visits the rows of a common range; see windows.h for how exact
// scores are, and PullTask for the sums.

#pragma once

#include "near_rows.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

template <typename T, bool kOffsets, bool kMasked>
NWFAST_INLINE void near_pull_vector(const NearPullTask<T>& task, int64_t first, int64_t begin, int64_t end) {
  const int64_t left = task.targets - first;
  const Vec<T> u = load_strided(task.target + first, 1, left);
  const Vec<T> value = load_strided(task.value + first * task.value_stride, task.value_stride, left) - task.centre;
  const Vec<T> factor = splat(static_cast<T>(kMinusHalfLog2E * task.scale * task.scale));
  const Vec<T> w = splat(static_cast<T>(task.scale));
  const IntVec<T> lanes = lane_numbers<T>();
  WideSum<T> sums[3];
  for (int64_t i = begin; i < end;) {
    const int64_t stop = end - i < kNearFlush ? end : i + kNearFlush;
    Vec<T> total = {}, pulled = {}, by_offset = {};
#pragma GCC unroll 2
    for (; i < stop; ++i) {
      const T reference = task.reference[i], apart = task.source[i] - reference;
      Vec<T> difference = splat(reference) - u;
      const int64_t at = kMasked ? task.excluded[i] - task.first_target - first : -1;
      const IntVec<T> left_out = lanes == static_cast<int>(at >= 0 && at < kLanes<T> ? at : -1);
      if (kMasked) difference = select<T>(left_out, Vec<T>{}, difference);
      Vec<T> weight = near_weight((difference * factor) * (difference + splat(2 * apart)));
      if (kMasked) weight = select<T>(left_out, Vec<T>{}, weight);
      const Vec<T> pull = (splat(task.grad[i]) * (value - splat(task.mean[i])) + splat(task.lse_grad[i])) * weight;
      total += weight * splat(task.grad[i]);
      pulled += pull;
      if (kOffsets) by_offset += pull * ((difference + splat(apart)) * w);
    }
    sums[0].add(total);
    sums[1].add(pulled);
    if (kOffsets) sums[2].add(by_offset);
  }
#pragma GCC unroll 2
  for (int i = 0; i < WideSum<T>::kParts; ++i) {
    double* const out = task.sums + first + i * kD;
    store<double>(out, sums[0].part[i]);
    store<double>(out + task.sums_pitch, sums[1].part[i]);
    if (kOffsets) store<double>(out + 2 * task.sums_pitch, sums[2].part[i] / task.scale);
  }
}

template <typename T, bool kOffsets, bool kMasked>
void near_pull_all(const NearPullTask<T>& task) {
  for (int64_t group = 0; group < task.targets; group += kNearTargets) {
    const int64_t* const range = task.ranges + 2 * (group / kNearTargets);
    for (int64_t first = group; first < group + kNearTargets && first < task.targets; first += kLanes<T>) {
      near_pull_vector<T, kOffsets, kMasked>(task, first, range[0], range[1]);
    }
  }
}

template <typename T>
void near_pull(const NearPullTask<T>& task) {
  if (task.offsets) {
    task.excluded ? near_pull_all<T, true, true>(task) : near_pull_all<T, true, false>(task);
  } else {
    task.excluded ? near_pull_all<T, false, true>(task) : near_pull_all<T, false, false>(task);
  }
}

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
