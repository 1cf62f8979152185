// The nearest keys and the windows of near rows, by vectors of ascending rows or row by row. Little is searched: places
// move up along the keys with the rows, a vector of comparisons at a time.
//
// Windows: all keys from log_span on (half the squared distance beyond the nearest key's) add a negligible share. Where
// at most `few` of them lie nearer than that, already those from near_span on do.
//
// Coordinates are subtracted before they are scaled. For x and r far from a key beside their distance from each other,
// the difference of squares z (DirectTask) has a relative error of a rounding only if the three differences are exact.
// Where the window's coordinates lie within a factor of 2, they are (Sterbenz); else z is off by (w d)^2 roundings at a
// distance d, which is harmless near the row and not trusted beyond kNearAlways bandwidths from the nearest key.

#pragma once

#include "direct.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

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
#if NWFAST_LEVEL == 256
template <>
NWFAST_INLINE float least_lane<float>(Vec<float> v) {
  __m128 least = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  return _mm_cvtss_f32(_mm_min_ss(least, _mm_movehdup_ps(least)));
}
#endif

// Places of the keys that the lanes leave out, counted from `origin`.
template <typename T>
NWFAST_INLINE IntVec<T> excluded_lanes(const NearTask<T>& task, int64_t row, int64_t rows, int64_t origin) {
  constexpr int64_t kNowhere = int64_t{1} << 30;
  IntVec<T> excluded;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    int64_t at = kNowhere;
    if (lane < rows) at = (task.excluded ? task.excluded[row + lane] : task.first_row + row + lane) - origin;
    excluded[lane] = static_cast<int>(at > -kNowhere && at < kNowhere ? at : kNowhere);
  }
  return excluded;
}

// The window of some rows: keys [begin, end).
template <typename T>
struct NearWindow {
  int64_t begin, end;

  // Keys within [low, high), found from the last window's begin and places of keys within; no more than most + 1 of
  // them are counted. False if there are too many, or none.
  NWFAST_INLINE bool move(const T* key, int64_t keys, T low, T high, int64_t first, int64_t last, int64_t most) {
    if (begin > first || (begin > 0 && !(key[begin - 1] < low))) begin = first;  // and downwards from there
    if (begin == first) {
      while (begin > 0 && first - begin <= most && !(key[begin - 1] < low)) --begin;
    }
    begin = move_up(key, keys, begin, low);
    const int64_t limit = keys < begin + most + 1 ? keys : begin + most + 1;
    end = move_up(key, limit, last < limit ? last : limit, high);
    return end - begin <= most && begin < end;
  }
};

// How far windows reach, squared, beyond the distance of the nearest key: wide ones, and narrow ones, which do where
// few keys lie between the two; the wide one is at most `farther` wider on either side.
template <typename T>
struct NearSpans {
  T wide, narrow, farther;

  explicit NearSpans(const NearTask<T>& task)
      : wide(static_cast<T>(2 * task.log_span / (task.scale * task.scale))),
        narrow(static_cast<T>(2 * task.near_span / (task.scale * task.scale))),
        farther(static_cast<T>((std::sqrt(2 * task.log_span) - std::sqrt(2 * task.near_span)) / task.scale)) {}
};
template <typename T>
constexpr T kSlack = 4 * std::numeric_limits<T>::epsilon();  // what rounding takes of a window

// Whether few keys lie between the narrow window, keys [begin, end) or more, and the wide one.
template <typename T>
NWFAST_INLINE bool few_beyond(const NearTask<T>& task, int64_t begin, int64_t end, T low, T high) {
  const int64_t below = begin - task.few / 2 - 1, above = end + task.few / 2;
  return (below < 0 || task.key[below] < low) && (above >= task.keys || task.key[above] > high);
}

// A vector of rows, their nearest keys and their common window.
template <typename T>
struct RowVector {
  Vec<T> x, reference;
  IntVec<T> excluded;  // places that the lanes leave out, counted from the window's first key
  NearWindow<T> window;
};

// The first key not below the rows is `first`; the window moves on from the last one's. False if it holds too many
// keys, or T is not precise enough.
template <typename T, bool kMasked>
NWFAST_ONE_COPY bool find_together(const NearTask<T>& task, const NearSpans<T>& spans, int64_t row, int64_t rows,
                                   int64_t first, RowVector<T>& found) {
  NearWindow<T>& window = found.window;
  const T* const key = task.key;
  const T lowest = task.x[row], highest = task.x[row + rows - 1];
  const int64_t last = move_up(key, task.keys, first, highest);
  Vec<T> x = splat(highest);
  if (rows == kLanes<T>) {
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
  for (T span = spans.narrow;; span = spans.wide) {
    // A row that is delta from its nearest key reaches sqrt(delta^2 + 2 log_span / w^2) far.
    const Vec<T> square = nearest * nearest + span, reach = square_root(square);
    const Vec<T> slack = (absolute<T>(x) + reach) * kSlack<T>;
    const T low = least_lane<T>(x - reach - slack), high = -least_lane<T>(-x - reach - slack);
    if (!(low > -INFINITY && high < INFINITY)) return false;  // a row without any key
    if (!window.move(key, task.keys, low, high, first, last, task.most)) return false;
    if (span == spans.wide) break;
    if (few_beyond(task, window.begin, window.end, low - spans.farther, high + spans.farther)) break;
  }
  const int64_t begin = window.begin, end = window.end;
  const T bottom = key[begin] < lowest ? key[begin] : lowest, top = key[end - 1] > highest ? key[end - 1] : highest;
  const Vec<T> distance = nearest * splat(static_cast<T>(task.scale));
  if (!exact_differences(bottom, top) && count_lanes<T>(distance > static_cast<T>(kNearAlways)) > 0) return false;
  found.x = x;
  found.reference = reference;
  found.excluded = excluded - static_cast<int>(begin - first);
  return true;
}

// One row, its nearest key and its window.
template <typename T>
struct LoneRow {
  T x, reference;
  int64_t excluded, begin, end;
};

// The window is vectors of keys upwards and downwards from the row, to the first that reaches beyond what counts. False
// as above.
template <typename T, bool kMasked>
NWFAST_ONE_COPY bool find_alone(const NearTask<T>& task, const NearSpans<T>& spans, int64_t row, int64_t first,
                                LoneRow<T>& found) {
  constexpr int64_t kKeys = kLanes<T>;
  const T* const key = task.key;
  const T x = task.x[row];
  const int64_t excluded = !kMasked ? -1 : task.excluded ? task.excluded[row] : task.first_row + row;
  int64_t left = first - 1, right = first;
  if (kMasked && left == excluded) --left;
  if (kMasked && right == excluded) ++right;
  const T below = left >= 0 ? x - key[left] : static_cast<T>(INFINITY);
  const T above = right < task.keys ? key[right] - x : static_cast<T>(INFINITY),
          nearest = below <= above ? below : above;
  if (!(nearest < INFINITY)) return false;
  const T reference = key[below <= above ? left : right];

  int64_t begin = first, end = first;
  T bottom = x, top = x;
  for (T span = spans.narrow;; span = spans.wide) {
    const T reach = __builtin_sqrt(nearest * nearest + span), slack = (__builtin_fabs(x) + reach) * kSlack<T>;
    const T low = x - reach - slack, high = x + reach + slack;
    while (end < task.keys && (end == first || key[end - 1] < high))
      end = end + kKeys < task.keys ? end + kKeys : task.keys;
    while (begin > 0 && (begin == first || !(key[begin] < low))) begin = begin > kKeys ? begin - kKeys : 0;
    if (end - begin > task.most_alone) return false;
    if (begin < first) bottom = key[begin];
    if (end > first) top = key[end - 1];
    if (span == spans.wide || few_beyond(task, begin, end, low - spans.farther, high + spans.farther)) break;
  }
  if (!exact_differences(bottom, top) && nearest * static_cast<T>(task.scale) > static_cast<T>(kNearAlways))
    return false;
  found = {x, reference, excluded, begin, end};
  return true;
}

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
