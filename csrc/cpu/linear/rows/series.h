// Rows of crowded boxes, from the series of their box.

#pragma once

#include "direct.h"

namespace nwfast {
namespace linear {

template <typename R>
class SeriesRows {
 public:
  explicit SeriesRows(const RowTask<R>& rows)
      : rows_(rows), sums_(rows.slots * rows.columns * kPaddedRows), own_(rows.columns * kEvaluated) {}

  // Adds rows [begin, end) of a box, at most kEvaluated, to those that wait for their results. Rows that are not
  // accurate enough are summed again.
  void evaluate(int64_t begin, int64_t end, double centre, const double* local, double error, DirectRows<R>& direct) {
    if (end_ != begin || end - begin_ > kEvaluated) finish();
    if (begin_ == end_) begin_ = begin;
    end_ = end;
    double* const sums = sums_.data() + (begin - begin_);
    EvaluateTask<R> task;
    task.x = rows_.data.query + begin;
    task.n = end - begin;
    task.centre = centre;
    task.scale = rows_.plan.to_local();
    task.local = local;
    task.series = rows_.slots * rows_.columns;
    task.terms = rows_.plan.terms;
    task.pitch = rows_.plan.pitch;
    task.sums = sums;
    task.sums_pitch = kPaddedRows;
    rows_.table.evaluate(task);
    double least = error / Accuracy<R>::kAccept;
    if (rows_.data.exclude) {
      // What is left must not be small beside what was taken away.
      if (rows_.data.leaves_out_queries()) rows_.subtract_equal(begin, end, sums, own_.data());
      for (int64_t i = begin; i < end && !rows_.data.leaves_out_queries(); ++i) {
        double* const row = sums + (i - begin);
        const double own = rows_.subtract_own(i, 0, row, kPaddedRows);
        if (!rows_.keeps_digits(i, own, row, kPaddedRows)) row[0] = -1;
      }
      least = std::fmax(least, 0);
    }
    int64_t bad = 0;
    for (int64_t i = 0; i < end - begin; ++i) bad |= sums[i] >= least ? 0 : 1;
    if (!bad) return;
    // Runs of rows that are accurate enough, and of rows that have to be summed again.
    end_ = begin;
    finish();
    for (int64_t i = begin; i < end;) {
      const bool good = sums[i - begin] >= least;
      int64_t stop = i + 1;
      while (stop < end && (sums[stop - begin] >= least) == good) ++stop;
      if (good) {
        rows_.finish(i, stop - i, sums + (i - begin), kPaddedRows, nullptr);
      } else {
        direct.run(i, stop);
      }
      i = stop;
    }
    begin_ = end_ = end;
  }

  int64_t end() const { return end_; }  // of the rows that were added

  // Finishes the rows that wait for it.
  void finish() {
    if (begin_ < end_) rows_.finish(begin_, end_ - begin_, sums_.data(), kPaddedRows, nullptr);
    begin_ = end_;
  }

 private:
  const RowTask<R>& rows_;
  std::vector<double> sums_;  // (slots, columns, kPaddedRows) of the rows that wait
  std::vector<double> own_;   // (columns, kEvaluated) charges of their own keys
  int64_t begin_ = 0, end_ = 0;
};

}  // namespace linear
}  // namespace nwfast
