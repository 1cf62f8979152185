// Rows with few keys in their windows, one channel: sums over the keys one by one, in the precision of the input.
//
// A vector of ascending rows (one a lane) shares one window. Little is searched: places move up along the keys with the
// rows, a vector of comparisons at a time.
//
// Coordinates are subtracted before they are scaled. For x and r far from a key beside their distance from each other,
// the difference of squares z (FgtDirect) has a relative error of a rounding only if the three differences are exact.
// Where the window's coordinates lie within a factor of 2, they are (Sterbenz); else z is off by (w d)^2 roundings at a
// distance d, which is harmless near the row and not trusted beyond kNearAlways bandwidths from the nearest key.

#pragma once

#include "fgt_kernels.h"

namespace nwfast {
namespace NWFAST_ISA {

constexpr double kNearAlways = 3;

// How many of the lanes are set.
template <typename T>
NWFAST_INLINE int64_t count_lanes(IntVec<T> mask) {
#if NWFAST_LEVEL == 256
  const int bits = sizeof(T) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
  return __builtin_popcount(static_cast<unsigned>(bits));
#else
  int64_t count = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) count -= mask[lane];
  return count;
#endif
}

// The first place at or after this one with a key >= bound.
template <typename T>
NWFAST_INLINE int64_t move_up(const T* key, int64_t keys, int64_t place, T bound) {
  const Vec<T> limit = splat(bound);
  for (; place + kLanes<T> <= keys; place += kLanes<T>) {
    const int64_t below = count_lanes<T>(load(key + place) < limit);
    if (below < kLanes<T>) return place + below;
  }
  while (place < keys && key[place] < bound) ++place;
  return place;
}

NWFAST_INLINE Vec<float> square_root(Vec<float> v) {
#if NWFAST_LEVEL == 256
  return _mm256_sqrt_ps(v);
#elif NWFAST_LEVEL == 512
  return _mm512_maskz_sqrt_ps(0xffff, v);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}
NWFAST_INLINE Vec<double> square_root(Vec<double> v) {
#if NWFAST_LEVEL == 256
  return _mm256_sqrt_pd(v);
#elif NWFAST_LEVEL == 512
  return _mm512_maskz_sqrt_pd(0xff, v);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) v[lane] = __builtin_sqrt(v[lane]);
  return v;
#endif
}
template <typename T>
NWFAST_INLINE T least_lane(Vec<T> v) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

// A vector of sums in double: as many as T has lanes.
template <typename T>
struct WideSum {
  static constexpr int kParts = sizeof(double) / sizeof(T);
  Vec<double> part[kParts] = {};

  NWFAST_INLINE void add(Vec<T> v) {
    T lanes[kLanes<T>];
    store<T>(lanes, v);
    for (int i = 0; i < kParts; ++i) part[i] += load_double(lanes + i * kLanes<double>);
  }
};

constexpr int64_t kFlush = 8;  // weights that are added up in T before they go to a double

template <typename T, bool kOffsets, bool kScores, bool kMasked>
NWFAST_INLINE void near_sums(const FgtNear<T>& task, int64_t begin, int64_t end, Vec<T> x, Vec<T> reference,
                             IntVec<T> excluded, int64_t row) {
  constexpr int kParts = WideSum<T>::kParts;
  const Vec<T> apart = x - reference, centre = splat(task.centre), w = splat(static_cast<T>(task.scale));
  const Vec<T> factor = splat(static_cast<T>(kMinusHalfLog2E * task.scale * task.scale));
  constexpr int kScore = 1 + kOffsets, kSlots = kScore + kScores;
  WideSum<T> sums[kSlots][2];
  const T* v = task.value + begin * task.value_stride;
  for (int64_t j = begin; j < end;) {
    const int64_t stop = end - j < kFlush ? end : j + kFlush;
    Vec<T> total[kSlots] = {}, value[kSlots] = {};
    for (; j < stop; ++j, v += task.value_stride) {
      const Vec<T> u = splat(task.key[j]), difference = reference - u, mirrored = (x - u) + apart;
      Vec<T> weight = exp2<T>(difference * mirrored * factor);
      if (kMasked) weight = select<T>(excluded == static_cast<int>(j - begin), Vec<T>{}, weight);
      if (task.weight) weight = weight * splat(task.weight[j] * task.weight_factor);
      const Vec<T> term = weight * (splat(*v) - centre);
      // Moments in units of the bandwidth, so that they stay within the range of T.
      const Vec<T> offset = difference * w;
      total[0] += weight;
      value[0] += term;
      if (kOffsets) {
        total[1] += weight * offset;
        value[1] += term * offset;
      }
      if (kScores) {
        const Vec<T> score = offset * (mirrored * w);
        total[kScore] += weight * score;
        value[kScore] += term * score;
      }
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      sums[slot][0].add(total[slot]);
      sums[slot][1].add(value[slot]);
    }
  }
  // Sums are relative to the nearest key, whose weight is exactly 1; rows near to it are to be relative to themselves.
  T lanes[kLanes<T>];
  store<T>(lanes, apart);
  for (int i = 0; i < kParts; ++i) {
    const DVec offset = load_double(lanes + i * kD), distance = offset * task.scale;
    const IntVec<double> level_zero = absolute<double>(distance) <= splat(task.level_zero);
    store<double>(task.apart + row + i * kD, select<double>(level_zero, DVec{}, offset));
    const DVec moved = select<double>(level_zero, distance, DVec{});
    const DVec weight = weight_of<T>(moved * moved * kMinusHalfLog2E);
    for (int column = 0; column < 2; ++column) {
      double* const out = task.sums + column * task.sums_pitch + row + i * kD;
      const DVec sum = sums[0][column].part[i] * weight;
      store<double>(out, sum);
      // Back to user units.
      if (kOffsets) {
        const DVec moment = sums[1][column].part[i] * weight + moved * sum;
        store<double>(out + 2 * task.sums_pitch, moment / task.scale);
      }
      if (kScores) {
        const DVec moment = sums[kScore][column].part[i] * weight + moved * moved * sum;
        store<double>(out + 2 * kScore * task.sums_pitch, moment / (task.scale * task.scale));
      }
    }
  }
}

// Places of the keys that the lanes leave out, counted from `origin`.
template <typename T>
NWFAST_INLINE IntVec<T> excluded_lanes(const FgtNear<T>& task, int64_t row, int64_t rows, int64_t origin) {
  constexpr int64_t kNowhere = int64_t{1} << 30;
  IntVec<T> excluded;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    int64_t at = kNowhere;
    if (lane < rows) at = (task.excluded ? task.excluded[row + lane] : task.first_row + row + lane) - origin;
    excluded[lane] = static_cast<int>(at > -kNowhere && at < kNowhere ? at : kNowhere);
  }
  return excluded;
}

template <typename T, bool kOffsets, bool kScores, bool kMasked>
NWFAST_INLINE int64_t near_rows(const FgtNear<T>& task) {
  constexpr int64_t kRows = kLanes<T>;
  constexpr T kSlack = 4 * std::numeric_limits<T>::epsilon();  // what rounding takes of a window
  const T* const key = task.key;
  const Vec<T> scale = splat(static_cast<T>(task.scale));
  const T two_spans = static_cast<T>(2 * task.log_span / (task.scale * task.scale));
  int64_t place = task.place, begin = place;
  for (int64_t row = 0; row < task.rows; row += kRows) {
    const int64_t rows = task.rows - row < kRows ? task.rows - row : kRows;
    const T lowest = task.x[row], highest = task.x[row + rows - 1];
    const int64_t first = move_up(key, task.keys, place, lowest);
    // Fewer for the first, so that the pass is not begun where it would soon end.
    const int64_t most = row > 0 ? task.most : task.most - task.most / 4;
    const int64_t reachable = task.keys < first + most ? task.keys : first + most;
    const int64_t last = move_up(key, reachable, first, highest);
    Vec<T> x = splat(highest);
    if (rows == kRows) {
      x = load(task.x + row);
    } else {
      for (int64_t lane = 0; lane < rows; ++lane) x[lane] = task.x[row + lane];
    }
    IntVec<T> excluded = {};
    if (kMasked) excluded = excluded_lanes(task, row, rows, first);

    // Nearest keys lie between the neighbours of the first row and those of the last.
    Vec<T> nearest = splat(static_cast<T>(INFINITY)), reference = x;
    const int64_t from = first > 2 ? first - 2 : 0, to = last + 2 < task.keys ? last + 2 : task.keys;
    for (int64_t j = from; j < to; ++j) {
      const Vec<T> u = splat(key[j]), distance = absolute<T>(x - u);
      IntVec<T> closer = distance < nearest;
      if (kMasked) closer = closer & (excluded != static_cast<int>(j - first));
      nearest = select<T>(closer, distance, nearest);
      reference = select<T>(closer, u, reference);
    }
    // A row that is delta from its nearest key reaches sqrt(delta^2 + 2 log_span / w^2) far.
    const Vec<T> square = nearest * nearest + two_spans, reach = square_root(square);
    const Vec<T> slack = (absolute<T>(x) + reach) * kSlack;
    const T low = least_lane<T>(x - reach - slack), high = -least_lane<T>(-x - reach - slack);
    if (!(low > -INFINITY && high < INFINITY)) return row;                       // a row without any key
    if (begin > first || (begin > 0 && !(key[begin - 1] < low))) begin = first;  // and downwards from there
    if (begin == first) {
      while (begin > 0 && first - begin <= most && !(key[begin - 1] < low)) --begin;
    }
    begin = move_up(key, task.keys, begin, low);
    const int64_t limit = task.keys < begin + most + 1 ? task.keys : begin + most + 1;
    const int64_t end = move_up(key, limit, last < limit ? last : limit, high);
    if (end - begin > most || begin >= end) return row;

    const T bottom = key[begin] < lowest ? key[begin] : lowest, top = key[end - 1] > highest ? key[end - 1] : highest;
    const bool exact = (bottom > 0 && top <= 2 * bottom) || (top < 0 && bottom >= 2 * top);
    const Vec<T> distance = nearest * scale;
    if (!exact && count_lanes<T>(distance > static_cast<T>(kNearAlways)) > 0) return row;
    near_sums<T, kOffsets, kScores, kMasked>(task, begin, end, x, reference, excluded - static_cast<int>(begin - first),
                                             row);
    place = last;
  }
  return task.rows;
}

template <typename T, bool kMasked>
int64_t near_slots(const FgtNear<T>& task) {
  if (task.offsets && task.scores) return near_rows<T, true, true, kMasked>(task);
  if (task.offsets) return near_rows<T, true, false, kMasked>(task);
  if (task.scores) return near_rows<T, false, true, kMasked>(task);
  return near_rows<T, false, false, kMasked>(task);
}

template <typename T>
int64_t fgt_near(const FgtNear<T>& task) {
  return task.exclude ? near_slots<T, true>(task) : near_slots<T, false>(task);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
