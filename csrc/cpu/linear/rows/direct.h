// Direct sums: rows over the keys in their windows, a group of rows at a time.

#pragma once

#include "../nearest.h"
#include "task.h"

namespace nwfast {
namespace linear {

constexpr int64_t kGroup = 8;  // rows that are summed together directly

template <typename R>
class DirectRows {
 public:
  // Lists in `far` the rows whose windows hold too many keys.
  DirectRows(const RowTask<R>& rows, std::vector<int64_t>& far) : rows_(rows), far_(far) {}

  // Sums and finishes rows; they must not descend from one call to the next.
  void run(int64_t begin, int64_t end) {
    place_at(begin);
    Nearest found[kGroup];
    double reference[kGroup], apart[kGroup];
    for (int64_t first = begin; first < end; first += kGroup) {
      const int64_t rows = std::min(kGroup, end - first);
      double low = INFINITY, high = -INFINITY, lows[kGroup], highs[kGroup];
      for (int64_t k = 0; k < rows; ++k) {
        found[k] = nearest(rows_.data, rows_.plan, first + k, place_);
        place_ = found[k].place;
        const double x = rows_.data.query[first + k];
        reference[k] = found[k].level_zero ? x : found[k].key;
        apart[k] = x - reference[k];
        // Windows ascend with the rows, where none leaves out a key.
        if (k > 0 && k < rows - 1 && !rows_.data.exclude) continue;
        window_of(rows_.data, rows_.plan, x, found[k].key, &lows[k], &highs[k]);
        low = std::fmin(low, lows[k]);
        high = std::fmax(high, highs[k]);
      }
      const int64_t window_begin = search_down(rows_.data, found[0].place, low);
      int64_t window_end = found[rows - 1].place;
      for (int k = 0; k < 8 && window_end < rows_.data.keys && rows_.data.key[window_end] < high; ++k) ++window_end;
      window_end = gallop(rows_.data.key, rows_.data.keys, window_end, high);
      if (window_end - window_begin <= kDirectKeys) {
        sum_rows(first, rows, reference, window_begin, window_end);
        rows_.finish(first, rows, sums_.data(), kGroup, apart);
        continue;
      }
      for (int64_t k = 0; k < rows; ++k) {
        window_of(rows_.data, rows_.plan, rows_.data.query[first + k], found[k].key, &lows[k], &highs[k]);
        const int64_t own_begin = search_down(rows_.data, found[k].place, lows[k]);
        const int64_t own_end = gallop(rows_.data.key, rows_.data.keys, found[k].place, highs[k]);
        if (own_end - own_begin > kDirectKeys) {
          far_.push_back(first + k);
          continue;
        }
        sum_rows(first + k, 1, reference + k, own_begin, own_end);
        rows_.finish(first + k, 1, sums_.data(), kGroup, apart + k);
      }
    }
  }

  // One row over all the keys that count.
  void sum_all(int64_t i, const Nearest& found, std::vector<double>& row) {
    double low, high;
    const double x = rows_.data.query[i], reference = found.level_zero ? x : found.key;
    window_of(rows_.data, rows_.plan, x, found.key, &low, &high);
    const int64_t begin = lower_bound(rows_.data.key, rows_.data.keys, low),
                  end = lower_bound(rows_.data.key, rows_.data.keys, high);
    sum_rows(i, 1, &reference, begin, end);
    for (int64_t k = 0; k < rows_.slots * rows_.columns; ++k) row[k] = sums_[k * kGroup];
  }

  // A lower bound of the place of a row among the keys, about it; rows must not descend.
  int64_t place_at(int64_t row) {
    const double x = rows_.data.query[row];
    place_ =
        placed_ ? gallop(rows_.data.key, rows_.data.keys, place_, x) : lower_bound(rows_.data.key, rows_.data.keys, x);
    placed_ = true;
    return place_;
  }

 private:
  // Sums of up to kGroup rows over the keys of a window, into sums_.
  void sum_rows(int64_t first, int64_t rows, const double* reference, int64_t begin, int64_t end) {
    const int64_t size = rows_.slots * rows_.columns * kGroup;
    charge_.resize(rows_.columns * kDirectKeys);
    block_.resize(size);
    sums_.assign(size, 0.0);
    int64_t excluded[kGroup];
    for (int64_t part = begin; part < end; part += kDirectKeys) {
      const int64_t n = std::min(kDirectKeys, end - part);
      rows_.data.load(part, n, charge_.data(), kDirectKeys);
      DirectTask<R> task;
      task.target = rows_.data.query + first;
      task.reference = reference;
      for (int64_t k = 0; rows_.data.exclude && k < rows; ++k) excluded[k] = rows_.data.excluded(first + k) - part;
      task.excluded = rows_.data.exclude ? excluded : nullptr;
      task.targets = rows;
      task.source = rows_.data.key + part;
      task.sources = n;
      task.charge = charge_.data();
      task.pitch = kDirectKeys;
      task.columns = rows_.columns;
      task.scale = rows_.plan.scale;
      task.offsets = rows_.plan.offsets;
      task.scores = rows_.plan.scores;
      task.sums = block_.data();
      task.sums_pitch = kGroup;
      rows_.table.direct(task);
      for (int64_t k = 0; k < size; ++k) sums_[k] += block_[k];
    }
  }

  const RowTask<R>& rows_;
  std::vector<int64_t>& far_;
  std::vector<double> charge_, sums_, block_;
  int64_t place_ = 0;  // a lower bound of the rows to come
  bool placed_ = false;
};

}  // namespace linear
}  // namespace nwfast
