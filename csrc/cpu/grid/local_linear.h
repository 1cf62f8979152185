// Local lines in two and three features from one pass (local_linear.cpp).

#pragma once

#include <vector>

#include "../problem.h"

namespace nwfast {
namespace grid {

// Contiguous results: fit (rows, channels), slope (rows, features, channels); and both or neither of means (rows,
// channels + features), of values and of keys from the middle of all, and inverse (rows, features, features), S^+.
template <typename R>
struct LocalLinearResult {
  R *fit, *slope, *means, *inverse;
};

// Rows without a result, by their numbers in all of the batch, ascending: those of which nothing is known, and those
// whose moments are, of which some direction may be rounding: E[v] (channels), E[k] - q (features), Cov(k, k)
// (features, features) and Cov(k, v) (features, channels) of each, one after another.
struct LocalLinearRows {
  std::vector<int64_t> left, weak;
  std::vector<double> moments;
};

// False where nothing is computed: data that the grid does not hold, or that extends over less than a bandwidth along a
// feature.
template <typename R>
bool local_linear(const Problem& problem, const LocalLinearResult<R>& result, LocalLinearRows& rest);

}  // namespace grid
}  // namespace nwfast
