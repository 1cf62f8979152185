// The nearest keys of rows, and the windows of keys that count for them.

#pragma once

#include "data.h"
#include "edge.h"

namespace nwfast {
namespace linear {

// The nearest key that counts for a row.
struct Nearest {
  int64_t place;  // of the first key >= x
  double key;
  bool any;  // whether there is one
  bool level_zero;
};

// hint: at most the place to be found.
template <typename R>
Nearest nearest(const Data<R>& data, const Plan& plan, int64_t i, int64_t hint) {
  const double x = data.query[i];
  int64_t place = hint;
  for (int step = 0; step < 16 && place < data.keys && data.key[place] < x; ++step) ++place;
  place = gallop(data.key, data.keys, place, x);
  const int64_t excluded = data.excluded(i);
  int64_t left = place - 1, right = place;
  if (left == excluded) --left;
  if (right == excluded) ++right;
  Nearest found{place, x, left >= 0 || right < data.keys, true};
  if (!found.any) return found;
  if (left < 0) {
    found.key = data.key[right];
  } else if (right >= data.keys) {
    found.key = data.key[left];
  } else {
    const double below = data.key[left], above = data.key[right];
    found.key = below_is_nearer(below, above, x) ? below : above;
  }
  found.level_zero = std::fabs(x - found.key) * plan.scale <= kLevelZero;
  return found;
}

// The keys that count for a row: those within [*low, *high).
template <typename R>
void window_of(const Data<R>& data, const Plan& plan, double x, double key, double* low, double* high) {
  const double span = plan.log_span + data.weight_span, distance = std::fabs(x - key) * plan.scale;
  const double depth =
      plan.scale > 0 ? 2 * span / (std::sqrt(distance * distance + 2 * span) + distance) / plan.scale : INFINITY;
  const double slack = (std::fabs(x) + std::fabs(key)) * 1e-15 + 1e-300;  // what rounding takes of the bounds
  *low = (key <= x ? key : x - (key - x)) - depth - slack;
  *high = (key >= x ? key : x + (x - key)) + depth + slack;
}

// The first key that is not below the bound, searched downwards from place.
template <typename R>
int64_t search_down(const Data<R>& data, int64_t place, double bound) {
  int64_t step = 1, high = place;
  for (int k = 0; k < 8; ++k) {
    if (high == 0 || data.key[high - 1] < bound) return high;
    --high;
  }
  while (high - step >= 0 && !(data.key[high - step] < bound)) {
    high -= step;
    step *= 2;
  }
  const int64_t low = std::max<int64_t>(0, high - step);
  return low + lower_bound(data.key + low, high - low, bound);
}

// Keys behind an edge for rows of a level, the nearest of which is `apart` away.
template <typename R>
Edge<R> edge_of(const Data<R>& data, const Plan& plan, int64_t edge, int side, int level, double apart) {
  const double span = plan.log_span + data.weight_span + 8, distance = apart * plan.scale;
  const double depth = 2 * span / (std::sqrt(distance * distance + 2 * span) + distance);
  const double widest = 2 * (data.key_range.high - data.key_range.low) + 1e-300;
  const double half = std::fmin(widest, plan.scale > 0 ? std::ldexp(1 / plan.scale, -level) : INFINITY);
  return Edge<R>(data.key, data.keys, edge, side, half, plan.scale > 0 ? depth / plan.scale : INFINITY,
                 Accuracy<R>::kFarTerms);
}

inline int level_of(double distance) {
  return distance <= kLevelZero ? 0 : static_cast<int>(std::ceil(std::log2(distance / kLevelZero)));
}

}  // namespace linear
}  // namespace nwfast
