// Sums for one feature and one channel. Lanes hold keys; kRows queries share each vector of keys, so a pair costs
// about twelve instructions per vector of pairs and no memory traffic. One pass, no running maximum: the shift of a
// Gaussian softmax is known from the nearest key. Parallel over row blocks (forward) and key blocks (key side) in the
// drivers; every sum has one owner and a fixed order.

#pragma once

#include "single_scores.h"

namespace nwfast {
namespace NWFAST_ISA {

constexpr int kRows = 4;         // queries in flight; 1 where a batch element has a single query
constexpr int64_t kFlush = 128;  // vectors of keys between flushes of the accumulators into double

// Runs plain(begin, end) over ranges of whole vectors and special(vector) for each vector that needs a lane mask:
// those of the excluded keys, and the last one if it is partial.
template <typename T, int kRows, typename Plain, typename Special>
NWFAST_INLINE void over_vectors(int64_t begin, int64_t end, int64_t n, const int64_t* excluded, int rows,
                                const Plain& plain, const Special& special) {
  constexpr int64_t kStep = kLanes<T>;
  int64_t vectors[kRows + 1];
  int count = 0;
  const auto insert = [&](int64_t vector) {
    if (vector < begin / kStep || vector * kStep >= end) return;
    int place = count;
    while (place > 0 && vectors[place - 1] > vector) --place;
    if (place > 0 && vectors[place - 1] == vector) return;
    for (int i = count; i > place; --i) vectors[i] = vectors[i - 1];
    vectors[place] = vector;
    ++count;
  };
  if (excluded) {
    for (int r = 0; r < rows; ++r) {
      if (excluded[r] >= 0) insert(excluded[r] / kStep);
    }
  }
  if (n % kStep) insert(n / kStep);
  int64_t current = begin / kStep;
  const int64_t last = (end + kStep - 1) / kStep;
  for (int i = 0; i <= count; ++i) {  // one call of each: they are long, and inlined
    const int64_t stop = i < count ? vectors[i] : last;
    if (current < stop) plain(current, stop);
    if (i < count) special(stop);
    current = stop + 1;
  }
}

template <typename T>
NWFAST_INLINE IntVec<T> valid_lanes(int64_t vector, int64_t n, const int64_t* excluded, int r) {
  const IntVec<T> lane = lane_numbers<T>();
  const int64_t base = vector * kLanes<T>;
  typedef typename std::remove_reference<decltype(lane[0])>::type Raw;
  typedef typename std::remove_const<Raw>::type Int;
  const Int left = static_cast<Int>(n - base < kLanes<T> ? n - base : kLanes<T>);
  IntVec<T> mask = lane < left;
  if (excluded) {
    const int64_t place = excluded[r] - base;
    const Int out = static_cast<Int>(place >= 0 && place < kLanes<T> ? place : -1);
    mask &= lane != out;
  }
  return mask;
}

// Adds the sums of some rows, kCount vectors each, to their places in `out`. One copy serves all accumulators.
template <typename T, int kCount, bool kScores>
NWFAST_ONE_COPY void flush_sums(const Vec<T>* sums, int rows, double* out) {
  for (int r = 0; r < rows; ++r, sums += kCount, out += kSingleSums) {
    out[kTotal] += horizontal_sum<T>(sums[0]);
    out[kValue] += horizontal_sum<T>(sums[1]);
    if (kScores) {
      out[kScoreTotal] += horizontal_sum<T>(sums[2]);
      out[kScoreValue] += horizontal_sum<T>(sums[3]);
    }
    if (kCount > 2 + 2 * kScores) {
      out[kOffsetTotal] += horizontal_sum<T>(sums[2 + 2 * kScores]);
      out[kOffsetValue] += horizontal_sum<T>(sums[3 + 2 * kScores]);
    }
  }
}

// What is hardly ever needed has one copy, for weighted keys and all sums.
template <int kRows, Scores kMode>
constexpr bool kRare = kMode == Scores::kWide || (kMode == Scores::kFar && (kRows == 1 || NWFAST_LEVEL == 128));

template <typename T, int kRows, Scores kMode, bool kCharged, bool kScores, bool kOffsets>
struct SingleAccumulator {
  static constexpr int kCount = 2 + 2 * kScores + 2 * kOffsets;
  Vec<T> sums[kRows][kCount];
  Vec<T> query[kRows], nearest[kRows];
  Mirrored<Vec<T>> mirrored[kRows];

  NWFAST_INLINE void clear() {
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) sums[r][s] = Vec<T>{};
    }
  }

  NWFAST_INLINE void add(const SingleRows<T>& task, int64_t vector) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) add_row<false>(task, vector, nullptr, r);
  }
  // Leaves keys out, whatever they hold. Not unrolled: there are few such vectors.
  NWFAST_INLINE void add_masked(const SingleRows<T>& task, int64_t vector, const int64_t* excluded) {
#pragma GCC unroll 1
    for (int r = 0; r < kRows; ++r) add_row<true>(task, vector, excluded, r);
  }

  void flush(int rows, double* out) {
    flush_sums<T, kCount, kScores>(&sums[0][0], rows, out);
    clear();
  }

 private:
  template <bool kMasked>
  NWFAST_INLINE void add_row(const SingleRows<T>& task, int64_t vector, const int64_t* excluded, int r) {
    const Vec<T> scale = splat<T>(task.scale);
    const int64_t j = vector * kLanes<T>;
    const Vec<T> key = load(task.key + j);
    const Vec<T> charge = !kCharged                                   ? Vec<T>{}
                          : kRare<kRows, kMode> && !task.total_charge ? splat<T>(1)
                                                                      : load(task.total_charge + j);
    Vec<T> offset, score, value = load(task.value_charge + j);
    if (relative(kMode)) {
      score = relative_score<T, kMode>(key, nearest[r], mirrored[r], scale, offset);
      // A key of weight 0 may lie nearer than the nearest one that counts: it must not turn that 0 into NaN.
      const Vec<T> most = splat<T>(Simd<T>::kBias / 2);
      if (kCharged || kMode == Scores::kWide) score = select<T>(score > most, most, score);
    } else {
      offset = query[r] - key;
      if (kMode == Scores::kNear) offset = offset * scale;
      score = Vec<T>{} - offset * offset;
    }
    Vec<T> weight = exp2<T>(score);
    if (kMode == Scores::kWide && kOffsets) {
      const IntVec<T> counts = (weight > Vec<T>{}) & (weight <= splat<T>(2));
      offset = select<T>(counts | (weight != weight), offset, Vec<T>{});
    }
    if (kMasked) {
      const IntVec<T> valid = valid_lanes<T>(vector, task.n, excluded, r);
      weight = select<T>(valid, weight, Vec<T>{});
      value = select<T>(valid, value, Vec<T>{});
      if (kScores) score = select<T>(valid, score, Vec<T>{});
      if (kOffsets) offset = select<T>(valid, offset, Vec<T>{});
    }
    sums[r][0] += kCharged ? weight * charge : weight;
    sums[r][1] += weight * value;
    if (kScores) {
      const Vec<T> moment = weight * score;
      sums[r][2] += kCharged ? moment * charge : moment;
      sums[r][3] += moment * value;
    }
    if (kOffsets) {
      const Vec<T> moment = weight * offset;
      sums[r][2 + 2 * kScores] += kCharged ? moment * charge : moment;
      sums[r][3 + 2 * kScores] += moment * value;
    }
  }
};

template <typename T, int kRows, Scores kMode, bool kCharged, bool kScores, bool kOffsets>
void single_group(const SingleRows<T>& task, int64_t first, int rows) {
  SingleAccumulator<T, kRows, kMode, kCharged, kScores, kOffsets> sums;
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + (r < rows ? r : 0);
    const T x = task.query[row], nearest = task.nearest[row];
    sums.query[r] = splat<T>(x);
    sums.nearest[r] = splat<T>(nearest);
    sums.mirrored[r] = splat<T>(mirrored(x, nearest));
  }
  sums.clear();
  const int64_t* excluded = task.excluded ? task.excluded + first : nullptr;
  int64_t padded_excluded[kRows];
  if (excluded && rows < kRows) {
    for (int r = 0; r < kRows; ++r) padded_excluded[r] = r < rows ? excluded[r] : -1;
    excluded = padded_excluded;
  }
  double* out = task.sums + first * kSingleSums;
  int64_t pending = 0;  // vectors since the last flush
  over_vectors<T, kRows>(
      task.window_begin, task.window_end, task.n, excluded, rows,
      [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t stop = begin + kFlush - pending < end ? begin + kFlush - pending : end;
          auto local = sums;  // lets the accumulators live in registers
          for (int64_t vector = begin; vector < stop; ++vector) local.add(task, vector);
          sums = local;
          pending += stop - begin;
          if (pending >= kFlush) {
            sums.flush(rows, out);
            pending = 0;
          }
          begin = stop;
        }
      },
      [&](int64_t vector) { sums.add_masked(task, vector, excluded); });
  sums.flush(rows, out);
}

// Each instance costs time to compile: what is not common is served by one that sums more than is asked for.
template <typename T, int kRows, Scores kMode, bool kCharged>
NWFAST_INLINE void single_group_sums(const SingleRows<T>& task, int64_t first, int rows) {
  constexpr bool kBoth = kRows == 1 || relative(kMode);
  if (!task.scores && !task.offsets) {
    single_group<T, kRows, kMode, kCharged, false, false>(task, first, rows);
  } else if (!kBoth && !task.offsets) {
    single_group<T, kRows, kMode, kCharged, true, kBoth>(task, first, rows);
  } else if (!kBoth && !task.scores) {
    single_group<T, kRows, kMode, kCharged, kBoth, true>(task, first, rows);
  } else {
    single_group<T, kRows, kMode, kCharged, true, true>(task, first, rows);
  }
}

template <typename T, int kRows, Scores kMode>
NWFAST_INLINE void single_group_of(const SingleRows<T>& task, int64_t first, int rows) {
  if constexpr (kRare<kRows, kMode>) {
    single_group<T, kRows, kMode, true, true, true>(task, first, rows);
  } else if (task.total_charge) {
    single_group_sums<T, kRows, kMode, true>(task, first, rows);
  } else {
    single_group_sums<T, kRows, kMode, false>(task, first, rows);
  }
}

template <typename T, int kRows>
NWFAST_INLINE void single_groups(const SingleRows<T>& task) {
  // The driver scales float coordinates alone.
  constexpr Scores kUnit = kRows > 1 && sizeof(T) == 4 && NWFAST_LEVEL > 128 ? Scores::kUnit : Scores::kNear;
  for (int64_t first = 0; first < task.rows; first += kRows) {
    const int rows = static_cast<int>(task.rows - first < kRows ? task.rows - first : kRows);
    bool far = false;
    for (int r = 0; r < rows; ++r) {
      const T offset = (task.query[first + r] - task.nearest[first + r]) * task.scale;
      const double score = static_cast<double>(offset) * offset, most = std::numeric_limits<double>::max();
      task.shift[first + r] = score > most ? most : score;
      far |= score > kRelativeFrom;
      for (int s = 0; s < kSingleSums; ++s) task.sums[(first + r) * kSingleSums + s] = 0;
    }
    if (!far && !task.wide) {
      for (int r = 0; r < rows; ++r) task.shift[first + r] = 0;
    }
    if (task.wide) {
      single_group_of<T, kRows, kWideScores<T>>(task, first, rows);
    } else if (far) {
      single_group_of<T, kRows, Scores::kFar>(task, first, rows);
    } else if (kUnit == Scores::kUnit && task.scale == 1) {
      single_group_of<T, kRows, kUnit>(task, first, rows);
    } else {
      single_group_of<T, kRows, Scores::kNear>(task, first, rows);
    }
  }
}

template <typename T>
void single_rows(const SingleRows<T>& task) {
  task.rows == 1 ? single_groups<T, 1>(task) : single_groups<T, kRows>(task);
}

// The nearest key of positive charge that is not excluded, by a scan; for keys that are not sorted.
template <typename T, int kRows>
NWFAST_INLINE void nearest_groups(const SingleRows<T>& task, T* nearest) {
  const Vec<T> infinite = splat<T>(std::numeric_limits<T>::infinity());
  for (int64_t first = 0; first < task.rows; first += kRows) {
    const int rows = static_cast<int>(task.rows - first < kRows ? task.rows - first : kRows);
    Vec<T> distance[kRows], best[kRows], query[kRows];
    int64_t excluded[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + (r < rows ? r : 0);
      query[r] = splat<T>(task.query[row]);
      distance[r] = infinite;
      best[r] = splat<T>(task.key[0]);
      excluded[r] = task.excluded ? task.excluded[row] : -1;
    }
    const auto visit = [&](int64_t vector, bool masked) __attribute__((always_inline)) {
      const int64_t j = vector * kLanes<T>;
      const Vec<T> key = load(task.key + j);
      for (int r = 0; r < kRows; ++r) {
        Vec<T> candidate = absolute<T>(query[r] - key);
        if (task.total_charge) {
          const Vec<T> charge = load(task.total_charge + j);
          candidate = select<T>(charge == Vec<T>{}, infinite, candidate);
        }
        if (masked) candidate = select<T>(valid_lanes<T>(vector, task.n, excluded, r), candidate, infinite);
        const IntVec<T> closer = candidate < distance[r];
        distance[r] = select<T>(closer, candidate, distance[r]);
        best[r] = select<T>(closer, key, best[r]);
      }
    };
    over_vectors<T, kRows>(
        0, task.n, task.n, task.excluded ? excluded : nullptr, rows,
        [&](int64_t begin, int64_t end) {
          for (int64_t vector = begin; vector < end; ++vector) visit(vector, false);
        },
        [&](int64_t vector) { visit(vector, true); });
    for (int r = 0; r < rows; ++r) {
      alignas(kVectorBytes) T distances[kLanes<T>], keys[kLanes<T>];
      store<T>(distances, distance[r]);
      store<T>(keys, best[r]);
      T least = distances[0], key = keys[0];
      for (int i = 1; i < kLanes<T>; ++i) {  // without branches
        key = distances[i] < least ? keys[i] : key;
        least = distances[i] < least ? distances[i] : least;
      }
      nearest[first + r] = key;
    }
  }
}

template <typename T>
void single_nearest(const SingleRows<T>& task, T* nearest) {
  task.rows == 1 ? nearest_groups<T, 1>(task, nearest) : nearest_groups<T, kRows>(task, nearest);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
