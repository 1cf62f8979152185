// Any number of features and channels: what surrounds the tiles of tiled_kernels.h.
//
// Each row takes the cheapest arithmetic that serves it: float where its nearest key is near, double further away or
// where float lacks the range, and long double, row by row (tiled_far.h), where double scores would lose the
// differences between keys as well. The distance to the nearest key decides, which the forward pass finds and the
// backward pass reads from the state; data that T does not hold is marked by TiledBatch<T>, for both alike.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../drivers.h"
#include "skipping/plan.h"
#include "tiled_batch.h"
#include "tiled_far.h"

namespace nwfast {

constexpr int64_t kRowTask = 16;                 // rows of one parallel task
constexpr int64_t kMostRowTask = kNearRowBlock;  // the same where the rows share the keys that may matter

using Rows = std::vector<int64_t>;

// The score of its nearest key, in base 2, beyond which a row of R data is not computed in T. Scores are good to about
// 2^-24 or 2^-53 times their size; with many features they are large everywhere, and as good as the textbook's.
template <typename T, typename R>
double most_score(const Problem& problem) {
  const double features = static_cast<double>(problem.features);
  if (sizeof(T) == 4) return std::fmax(256, 32 * features);
  return std::fmax(sizeof(R) == 4 ? 0x1p26 : 1024, 64 * features);
}

// run(b, serial) for all batch elements; serial where they share out the threads among themselves, which also spreads
// what is prepared for each.
template <typename Run>
void over_elements(const Problem& problem, int64_t blocks, const Run& run) {
  const double work = static_cast<double>(problem.queries) * static_cast<double>(problem.keys) *
                      static_cast<double>(problem.features + problem.channels);
  if (problem.batch.count > blocks || problem.batch.count >= 8 * thread_count()) {
    parallel_blocks(problem.batch.count, work * static_cast<double>(problem.batch.count) < kSerialPairs,
                    [&](int64_t b) { run(b, true); });
    return;
  }
  for (int64_t b = 0; b < problem.batch.count; ++b) run(b, work < kSerialPairs);
}

inline bool finite_w(const Problem& problem, int64_t b) {
  Buffer<double> w(problem.features);
  read(problem.w, problem.w.offset(problem.batch, b), problem.features, problem.w.column_stride, w.get());
  bool finite = true;
  for (int64_t f = 0; f < problem.features; ++f) finite &= std::isfinite(w[f]);
  return finite;
}

}  // namespace nwfast
