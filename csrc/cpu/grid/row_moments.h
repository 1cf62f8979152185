// Moments of keys about a row, from its window or for it alone, as local_linear.cpp solves them.

#pragma once

#include <algorithm>
#include <vector>

#include "direct.h"

namespace nwfast {
namespace grid {

// The moments of a row in bandwidths, by features. The third of two features has the variance 1, and no part.
struct RowMoments {
  double offset[kAxes] = {0, 0, 0};  // E[u] - x
  double spread[kAxes][kAxes] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
};

// The inverse of a symmetric matrix, by sweeps. Returns 1 over its trace: no more than the least eigenvalue, and at
// least a third of it; not above 0, or NaN, where the matrix is not positive.
template <int kFeatures>
double invert(const double (&s)[kAxes][kAxes], double (&inverse)[kAxes][kAxes]) {
  std::copy_n(&s[0][0], kAxes * kAxes, &inverse[0][0]);
  for (int k = 0; k < kFeatures; ++k) {
    const double pivot = inverse[k][k];
    if (!(pivot > 0)) return 0;
    double row[kAxes], column[kAxes];
    for (int f = 0; f < kFeatures; ++f) {
      row[f] = inverse[k][f] / pivot;
      column[f] = inverse[f][k];
    }
    for (int f = 0; f < kFeatures; ++f) {
      for (int g = 0; g < kFeatures; ++g) inverse[f][g] -= column[f] * row[g];
    }
    for (int f = 0; f < kFeatures; ++f) {
      inverse[k][f] = row[f];
      inverse[f][k] = -column[f] / pivot;
    }
    inverse[k][k] = 1 / pivot;
  }
  double trace = 0;
  for (int f = 0; f < kFeatures; ++f) trace += inverse[f][f];
  return 1 / trace;
}

// Rows whose moments are handed on.
struct Records {
  std::vector<int64_t> rows;
  std::vector<double> moments;
};

// The kernel of some rows (packed) and the keys of a window.
template <typename R>
struct WindowSums {
  double total[kItemRows], shift[kItemRows];
  int64_t excluded[kItemRows];
  int64_t n;  // of `sums` of a row
  Buffer<double> sums;
  Buffer<R> query;

  WindowSums(int64_t features, int64_t channels)
      : n(features + features * (features + 1) / 2 + channels * (1 + features)),
        sums(kItemRows * n),
        query(kItemRows * features) {}
  void run(const TiledData<R>& window, int64_t rows, bool exclude_self) {
    GridWindowMoments<R> task;
    task.data = window;
    task.rows = rows;
    task.query = query.get();
    task.excluded = exclude_self ? excluded : nullptr;
    task.total = total;
    task.shift = shift;
    task.sums = sums.get();
    grid_kernels<R>().window_moments(task);
  }
};

}  // namespace grid
}  // namespace nwfast
