// Rows with few keys in their windows, one channel: sums over the keys one by one, in the precision of the input.
//
// A vector of ascending rows (one a lane) shares one window; where many keys lie between the rows, each row has its
// own, and the lanes hold keys (windows.h).

#pragma once

#include "windows.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

// 2^t for t <= 0, about the least normal number where t is far below; anything for t far above 0. Short chains of
// operations: a few of them have to fit into the processor's schedule at a time.
NWFAST_INLINE Vec<double> near_weight(Vec<double> t) { return weight_of<double>(t); }
NWFAST_INLINE Vec<float> near_weight(Vec<float> t) {
  typedef Exp2Round<float> Polynomial;
  const auto coefficient = [](int i) { return static_cast<float>(Polynomial::coefficient(i)); };
  const Vec<float> least = splat(-125.0f);
#if NWFAST_LEVEL == 256
  t = _mm256_max_ps(t, least);
#else
  t = select<float>(t < least, least, t);
#endif
  const Vec<float> rounded = t + Simd<float>::kRound, x = t - (rounded - Simd<float>::kRound), square = x * x;
  const Vec<float> first = x * coefficient(1) + coefficient(0), second = x * coefficient(3) + coefficient(2);
  const Vec<float> third = square * coefficient(6) + (x * coefficient(5) + coefficient(4));
  const Vec<float> p = (third * square + second) * square + first;
  return raise<float>(p, rounded);
}

// A vector of sums in double: as many as T has lanes.
template <typename T>
struct WideSum {
  static constexpr int kParts = sizeof(double) / sizeof(T);
  Vec<double> part[kParts] = {};

  NWFAST_INLINE void add(Vec<T> v) {
    T lanes[kLanes<T>];
    store<T>(lanes, v);
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) part[i] += load_double(lanes + i * kLanes<double>);
  }
};

constexpr int64_t kNearFlush = 8;  // weights that are added up in T before they go to a double

// What a pair of a row and a key adds to the sums, in units of the bandwidth so that they stay within the range of T.
template <typename T, bool kOffsets, bool kScores>
struct NearSums {
  static constexpr int kScore = 1 + kOffsets, kSlots = kScore + kScores;
  Vec<T> total[kSlots] = {}, value[kSlots] = {};

  NWFAST_INLINE void add(Vec<T> weight, Vec<T> centred, Vec<T> difference, Vec<T> mirrored, Vec<T> w) {
    const Vec<T> term = weight * centred, offset = difference * w;
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
  NWFAST_INLINE void flush(WideSum<T> (*sums)[2]) {
#pragma GCC unroll 3
    for (int slot = 0; slot < kSlots; ++slot) {
      sums[slot][0].add(total[slot]);
      sums[slot][1].add(value[slot]);
      total[slot] = value[slot] = Vec<T>{};
    }
  }
};

// A vector of rows over the keys of a window.
template <typename T, bool kOffsets, bool kScores, bool kMasked>
NWFAST_INLINE void sum_together(const NearTask<T>& task, int64_t begin, int64_t end, Vec<T> x, Vec<T> reference,
                                IntVec<T> excluded, WideSum<T> (*sums)[2]) {
  const Vec<T> apart = x - reference, twice = apart + apart, w = splat(static_cast<T>(task.scale));
  const Vec<T> factor = splat(static_cast<T>(kMinusHalfLog2E * task.scale * task.scale));
  const auto add = [&](int64_t j, NearSums<T, kOffsets, kScores>& part) __attribute__((always_inline)) {
    Vec<T> difference = reference - splat(task.key[j]);
    const IntVec<T> left_out = excluded == static_cast<int>(j - begin);
    if (kMasked) difference = select<T>(left_out, Vec<T>{}, difference);  // such a key may be nearer than the reference
    const Vec<T> mirrored = difference + twice;
    Vec<T> weight = near_weight((difference * factor) * mirrored);
    if (kMasked) weight = select<T>(left_out, Vec<T>{}, weight);
    if (task.weight) weight = weight * splat(task.weight[j] * task.weight_factor);
    part.add(weight, splat(task.value[j * task.value_stride] - task.centre), difference, mirrored, w);
  };
  int64_t j = begin;
  for (; j + kNearFlush <= end; j += kNearFlush) {
    NearSums<T, kOffsets, kScores> part;
#pragma GCC unroll 2
    for (int64_t i = 0; i < kNearFlush; ++i) add(j + i, part);
    part.flush(sums);
  }
  NearSums<T, kOffsets, kScores> part;
  for (; j < end; ++j) add(j, part);
  part.flush(sums);
}

// A vector from each place, the last number again beyond the end.
template <typename T>
NWFAST_INLINE Vec<T> load_strided(const T* x, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes<T>) return load(x);
  T lanes[kLanes<T>];
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = x[(lane < count ? lane : count - 1) * stride];
  return load(lanes);
}

// Writes sums that are relative to the nearest key, whose weight is exactly 1, in user units; rows near to that key are
// to be relative to themselves.
template <typename T, bool kOffsets, bool kScores>
NWFAST_INLINE void store_sums(const NearTask<T>& task, Vec<T> apart, const WideSum<T> (*sums)[2], int64_t row,
                              int parts) {
  constexpr int kScore = 1 + kOffsets;
  T lanes[kLanes<T>];
  store<T>(lanes, apart);
#pragma GCC unroll 2
  for (int i = 0; i < WideSum<T>::kParts; ++i) {
    if (i >= parts) break;
    const DVec offset = load_double(lanes + i * kD), distance = offset * task.scale;
    const IntVec<double> level_zero = absolute<double>(distance) <= splat(task.level_zero);
    store<double>(task.apart + row + i * kD, select<double>(level_zero, DVec{}, offset));
    const DVec moved = select<double>(level_zero, distance, DVec{});
    const DVec weight = weight_of<T>(moved * moved * kMinusHalfLog2E);
#pragma GCC unroll 2
    for (int column = 0; column < 2; ++column) {
      double* const out = task.sums + column * task.sums_pitch + row + i * kD;
      const DVec sum = sums[0][column].part[i] * weight;
      store<double>(out, sum);
      if (kOffsets) {
        const DVec shifted = sums[1][column].part[i] * weight + moved * sum;
        store<double>(out + 2 * task.sums_pitch, shifted / task.scale);
      }
      if (kScores) {
        const DVec shifted = sums[kScore][column].part[i] * weight + moved * moved * sum;
        store<double>(out + 2 * kScore * task.sums_pitch, shifted / (task.scale * task.scale));
      }
    }
  }
}

// Sums a vector of rows over their common window.
template <typename T, bool kOffsets, bool kScores, bool kMasked>
NWFAST_INLINE bool together(const NearTask<T>& task, const NearSpans<T>& spans, int64_t row, int64_t rows,
                            int64_t first, RowVector<T>& found) {
  if (!find_together<T, kMasked>(task, spans, row, rows, first, found)) return false;
  WideSum<T> sums[3][2];
  sum_together<T, kOffsets, kScores, kMasked>(task, found.window.begin, found.window.end, found.x, found.reference,
                                              found.excluded, sums);
  store_sums<T, kOffsets, kScores>(task, found.x - found.reference, sums, row, WideSum<T>::kParts);
  return true;
}

// Sums one row, its keys in the lanes.
template <typename T, bool kOffsets, bool kScores>
NWFAST_ONE_COPY void sum_alone(const NearTask<T>& task, const LoneRow<T>& found, int64_t row) {
  constexpr int64_t kKeys = kLanes<T>;
  const T* const key = task.key;
  const T x = found.x, reference = found.reference;
  const int64_t excluded = found.excluded, begin = found.begin, end = found.end;
  const Vec<T> w = splat(static_cast<T>(task.scale));
  const Vec<T> factor = splat(static_cast<T>(kMinusHalfLog2E * task.scale * task.scale));
  const Vec<T> from = splat(reference), twice = splat(2 * (x - reference));
  WideSum<T> own[3][2], sums[3][2];
  NearSums<T, kOffsets, kScores> part;
  for (int64_t j = begin, blocks = 1; j < end; j += kKeys, ++blocks) {
    const int64_t there = end - j;
    Vec<T> difference = from - load_strided(key + j, 1, there);
    const int64_t at = excluded - j;
    const IntVec<T> counts = (lane_numbers<T>() < static_cast<int>(there < kKeys ? there : kKeys)) &
                             (lane_numbers<T>() != static_cast<int>(at >= 0 && at < kKeys ? at : -1));
    difference = select<T>(counts, difference, Vec<T>{});  // such a key may be nearer than the reference
    const Vec<T> mirrored = difference + twice;
    Vec<T> weight = select<T>(counts, near_weight((difference * factor) * mirrored), Vec<T>{});
    if (task.weight) weight = weight * (load_strided(task.weight + j, 1, there) * task.weight_factor);
    const Vec<T> value = load_strided(task.value + j * task.value_stride, task.value_stride, there);
    part.add(weight, value - splat(task.centre), difference, mirrored, w);
    if (blocks % kNearFlush == 0) part.flush(own);
  }
  part.flush(own);
#pragma GCC unroll 3
  for (int slot = 0; slot < NearSums<T, kOffsets, kScores>::kSlots; ++slot) {
#pragma GCC unroll 2
    for (int column = 0; column < 2; ++column) {
      DVec sum = own[slot][column].part[0];
      for (int i = 1; i < WideSum<T>::kParts; ++i) sum += own[slot][column].part[i];
      sums[slot][column].part[0] = splat(horizontal_sum<double>(sum));
    }
  }
  store_sums<T, kOffsets, kScores>(task, splat(x - reference), sums, row, 1);
}

template <typename T, bool kOffsets, bool kScores, bool kMasked>
NWFAST_INLINE int64_t near_rows(const NearTask<T>& task) {
  const NearSpans<T> spans(task);
  int64_t place = task.place, singly = 0;  // rows before `singly` are summed alone
  RowVector<T> found;
  found.window = {place, place};
  for (int64_t row = 0; row < task.rows;) {
    place = move_up(task.key, task.keys, place, task.x[row]);
    const int64_t rows = task.rows - row < kLanes<T> ? task.rows - row : kLanes<T>;
    const auto spread = [&](int64_t keys) {
      return place + keys < task.keys && task.key[place + keys] < task.x[row + rows - 1];
    };
    if (spread(task.spread)) singly = row + rows;
    if (row >= singly) {
      if (together<T, kOffsets, kScores, kMasked>(task, spans, row, rows, place, found)) {
        row += rows;
        continue;
      }
      if (!spread(task.spread / 2)) return row;
      singly = row + rows;
    }
    LoneRow<T> lone;
    if (!find_alone<T, kMasked>(task, spans, row, place, lone)) return row;
    sum_alone<T, kOffsets, kScores>(task, lone, row);
    ++row;
  }
  return task.rows;
}

template <typename T, bool kMasked>
int64_t near_slots(const NearTask<T>& task) {
  if (task.offsets && task.scores) return near_rows<T, true, true, kMasked>(task);
  if (task.offsets) return near_rows<T, true, false, kMasked>(task);
  if (task.scores) return near_rows<T, false, true, kMasked>(task);
  return near_rows<T, false, false, kMasked>(task);
}

template <typename T>
int64_t near(const NearTask<T>& task) {
  return task.exclude ? near_slots<T, true>(task) : near_slots<T, false>(task);
}

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
