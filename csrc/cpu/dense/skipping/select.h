// Which points, or boxes of points, may matter to a block of others: bounds of scores from the distances of boxes,
// vectors of them at a time. A point is a box without extent. Serial: the driver calls it for each block.

#pragma once

#include "../../simd.h"
#include "../kernels.h"

namespace nwfast {
namespace NWFAST_ISA {

// What rounding may take from a squared distance here and in the scores, and more.
template <typename T>
constexpr T kDistanceSlack = sizeof(T) == 4 ? T(0x1p-14) : T(0x1p-40);

template <typename T>
NWFAST_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return select<T>(a > b, a, b);
}

template <typename T>
int64_t select_near(const Selection<T>& task) {
  int64_t count = 0;
  const Vec<T> limit = splat<T>(task.limit), least = splat<T>(task.least);
  for (int64_t j = task.begin; j < task.end; j += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t f = 0; f < task.features; ++f) {
      const int64_t place = f * task.pitch + j;
      const Vec<T> low = load(task.low + place) - task.block_high[f],
                   high = task.block_low[f] - load(task.high + place);
      const Vec<T> gap = larger<T>(larger<T>(low, high), Vec<T>{}) * task.feature_scale[f];
      sum += gap * gap;
    }
    Vec<T> charge = task.charge ? load(task.charge + j) : Vec<T>{};
    if (task.reach) charge = larger<T>(charge, load(task.reach + j) - least);
    const Vec<T> bound = charge - sum * (1 - kDistanceSlack<T>);
    const IntVec<T> below = bound < limit;  // 0 where it may matter
    uint64_t words[kVectorBytes / sizeof(uint64_t)], all = ~uint64_t{0};
    std::memcpy(words, &below, sizeof words);
    for (const uint64_t word : words) all &= word;
    if (all == ~uint64_t{0}) continue;
    const int lanes = static_cast<int>(task.end - j < kLanes<T> ? task.end - j : kLanes<T>);
    for (int i = 0; i < lanes; ++i) {
      task.places[count] = static_cast<uint32_t>(j + i);
      if (task.bounds) task.bounds[count] = bound[i];
      count += below[i] == 0;
    }
  }
  return count;
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
