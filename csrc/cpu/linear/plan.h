// The linear method, a fast Gauss transform in one feature: sums over all keys for every query in linear time, accurate
// relative to each sum, near the keys and far from them.
//
// In units of the bandwidth, x = |w| q and u = |w| k, all sums are S(x) = sum_j c_j exp(-(x - u_j)^2 / 2), one for each
// column of charges c: a_j (the total) and a_j (v_j - centre) for each channel. Everything is in double, whatever the
// input (but see kernels/near_rows.h); coordinates stay in user units, and differences are taken before they are
// scaled.
//
// Boxes (make_plan). The axis is cut into boxes of equal width around the multiples of `box`, a number of six bits, so
// that edges and centres are exact. In a box of half width h bandwidths, exp(-(x - u)^2 / 2) is a polynomial of T terms
// in the local coordinates t, s in [-1, 1] of key and query, with an error of 8.7 (h/2)^T / sqrt(T!) exp(-y^2/4) at
// distance y (expansion_error). T is 8, 12, 16, 20 or 24, h the largest that keeps the error (1e-9 of a box's mass for
// float32, 2e-15 for float64), and the choice is that of least work for the density of the keys. Only boxes up to
// `reach` apart count.
//
// Compress (Boxes): a box with kCrowd keys or more gets its power moments sum_j c_j t_j^n. Sorted keys are read in
// chunks of kChunk; a box may span chunks, whose parts are added in order, so that the bits do not depend on the
// threads. Translate (Expansion): boxes lie on a grid, so the field of one in another is a fixed matrix for each number
// of boxes between them, computed once a call (fill_matrices: Chebyshev coefficients of the kernel on both boxes,
// turned into powers): local_m = sum_n K_o[n][m] moment_n. Boxes on either side share it (TranslateTask). Keys in boxes
// that are not crowded get moments on the spot. With factors d and d^2 in the kernel the same moments give the sums
// that the derivatives by q and w need. Evaluate: Horner's scheme at the queries of the box. Directly
// (rows/direct.h): where a query's window holds few keys, or a box few queries, pairs are summed one by one, lanes
// holding queries. The window of a query that is delta from its nearest key k* is sqrt(delta^2 + 2 log(N / eps)), and
// sums are relative to k* (the reference r) where delta > 2:
//   (x - u)^2 - (x - k*)^2 = (k* - u)(2 x - u - k*),    lse = log S - (x - k*)^2 / 2,    state = (shift, S).
// Which way is taken follows from counts alone. With one channel and few keys (rows/near.h),
// rows go by vectors in the precision of the input: no box, no search, no conversion; so do keys with few rows
// (NearRows).
//
// Which expansions to trust. Expansion adds up the plan's error times the mass of each box, plus what boxes that it
// leaves out and all keys beyond the reach could add: a bound of the absolute error of S. A row whose total is not well
// above it (a gap, a lone key beside a distant crowd, key weights of many decades, a leave-one-out row dominated by its
// own key) is summed again as a far row. No level, and no nearest key, has to be known beforehand, and dense data never
// look for one.
//
// Far rows: directly where the window holds at most kDirectKeys keys. Otherwise (rows/gaps.h) the row lies in a
// gap between two neighbouring keys, or beyond an end. Keys on either side, z behind the edge of the gap, count exp(-z
// (2 delta + z) / 2) relative to the edge, delta from the row. Rows are grouped by edge and level l, 2^l < delta
// <= 2^(l+1); for each group the keys within the depth that counts are cut into boxes of half width 2^-l, within which
// the exponent varies by 4 at most, and a crowded box becomes T keys at Chebyshev nodes (Edge). Then errors are
// relative to each box's own sum, and nothing depends on the balance of masses. Both sides are brought to the row's
// reference and added.
//
// Leave-one-out: the own key is subtracted from what was expanded, with less than 3 digits lost or else the row is
// summed again, and skipped in direct sums.
//
// The key side of the backward pass (keys/keys.cpp) is the same with the roles exchanged: rows whose total is at least
// kSmallTotal of the largest weight are sources with charges g_i / S_i in boxes, keys are targets. Other rows are
// gathered by each key one by one, or, many rows of a gap with many keys, summed at the compressed keys of an edge and
// handed on by the transposed interpolation.
//
// Keys and queries beyond the range in which boxes have exact edges take no part in expansions; whatever lies there is
// summed directly. What is not finite, and numbers whose products would leave the range of double, are the dense
// drivers' (the functions return false).
//
// Comparisons of distances are exact (below_is_nearer, score_of): rounded ones may tie, and a key that is taken for the
// nearest and is not would overflow against the one that is. Bounds of windows are inclusive, since they may round onto
// the coordinate that they start from.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../drivers.h"
#include "kernels/tasks.h"

namespace nwfast {
namespace linear {

constexpr int64_t kChunk = 8192;       // points of one task
constexpr int64_t kHeldPoints = 1024;  // points whose charges are held at once
constexpr int64_t kCrowd = 8;          // points from which on a box has moments
constexpr int64_t kDirectKeys = 256;   // sources that a single target visits one by one
constexpr double kLevelZero = 2;       // distance to the nearest key, in bandwidths, up to which no shift is needed
constexpr int64_t kMostBoxes = int64_t{1} << 44;  // beyond so many boxes from 0 their edges are no longer exact
// Products of two coordinates and a value, of w and two coordinates and the like stay within the range of double.
constexpr double kMostCoordinate = 1e60, kLeastCoordinate = 1e-100, kMostScale = 1e60, kMostValue = 1e100;
constexpr double kMostWeight = 1e290, kLeastWeight = 1e-300;

template <typename T>
struct Accuracy;
template <>
struct Accuracy<float> {
  static constexpr double kTruncation = kTruncationFloat;  // of expansions, relative to the mass of a box
  static constexpr double kAccept = kAcceptFloat;          // of a row's total: beyond this error bound it is a far row
  static constexpr double kLargestHalf = 1.5;              // half width of a box, in bandwidths
  static constexpr int kFarTerms = 16;
};
template <>
struct Accuracy<double> {
  static constexpr double kTruncation = kTruncationDouble;
  static constexpr double kAccept = kAcceptDouble;
  static constexpr double kLargestHalf = 1;
  static constexpr int kFarTerms = 24;
};

// Bound of the error of interpolating exp(-(x-u)^2/2) in x and u on boxes of this half width, each at `terms`
// Chebyshev nodes, for boxes that touch: |d^T/dx^T exp(-x^2/2)| <= 1.09 sqrt(T!) exp(-x^2/4).
double expansion_error(int terms, double half);
// The largest half width at which so many terms keep the error.
double half_width(int terms, double error);
// Rounded down to six significant bits.
double short_number(double x);

constexpr double kMostOwnValue = 32;  // times the sum of all others that an excluded key may have added

// Boxes and the matrices that translate between them.
struct Plan {
  double scale = 0;  // |w|
  double box = 1;    // width of a box in user units, a number of few bits: edges and centres are exact
  double half = 0;   // box * scale / 2
  int terms = 8, pitch = 8;
  int64_t reach = 0;    // boxes that count lie at most so many boxes apart
  double window = 0;    // keys within sqrt(delta^2 + window^2) bandwidths count
  double log_span = 0;  // window^2 / 2
  int orders = 1;
  bool offsets = false, scores = false;
  std::vector<double> matrices;  // (orders, reach + 1, terms, pitch), from boxes that lie lower
  std::vector<double> error;     // (reach + 1) by the distance of boxes, relative to the mass of a box
  std::vector<double> least_kernel, largest_kernel;  // (reach + 1) of points of boxes so far apart
  double tail_error = 0;                             // what all keys beyond the reach add, relative to their mass

  const double* matrix(int order, int64_t distance) const {
    return matrices.data() + (order * (reach + 1) + distance) * terms * pitch;
  }
  // How the kernel with a factor of d^order behaves under a change of the sign of d.
  double sign(int order) const { return order == 1 && offsets ? -1 : 1; }
  // The box whose edges enclose x: [(b - 1/2) box, (b + 1/2) box).
  int64_t box_of(double x) const {
    const double place = std::floor(x * (1 / box) + 0.5);
    if (!(std::fabs(place) < 2.0 * kMostBoxes)) return place > 0 ? 2 * kMostBoxes : -2 * kMostBoxes;
    int64_t b = static_cast<int64_t>(place);
    if (x < lower_edge(b)) --b;
    if (x >= lower_edge(b + 1)) ++b;
    return b;
  }
  double lower_edge(int64_t b) const { return static_cast<double>(2 * b - 1) * (box / 2); }
  double centre(int64_t b) const { return static_cast<double>(b) * box; }
  // Whether all boxes within reach of this one have exact edges.
  bool has_edges(int64_t b) const { return b > reach - 2 * kMostBoxes && b < 2 * kMostBoxes - reach; }
  // Whether a point between these may lie in such a box.
  bool any_edges(double low, double high) const {
    return high / box > -static_cast<double>(kMostBoxes) && low / box < static_cast<double>(kMostBoxes);
  }
  double to_local() const { return 2 / box; }
};

// What the choice of a plan depends on.
struct Extent {
  double scale;      // |w|
  double magnitude;  // of the largest coordinate of keys and queries
  double spread;     // keys and queries lie within this distance of each other, or more
  int64_t keys, queries;
  std::vector<double> gaps;  // between every (keys / gaps)-th key
  int columns;
  bool offsets, scores;
  bool anywhere = false;  // queries to come may lie anywhere
};

template <typename R>
void make_plan(const Extent& extent, Plan& plan);
void fill_bounds(Plan& plan);
void fill_matrices(Plan& plan);

// What a sum of two numbers lacks of the exact one.
inline double sum_error(double a, double b, double sum) {
  const double second = sum - a;
  return (a - (sum - second)) + (b - second);
}

// Whether x - below <= above - x, exactly.
inline bool below_is_nearer(double below, double above, double x) {
  const double sum = below + above;
  return sum != 2 * x ? sum > 2 * x : sum_error(below, above, sum) >= 0;
}

// (x - u)^2 - (x - r)^2 to a few roundings of itself, however far x is from both.
inline double score_of(double x, double r, double u) {
  const double sum = r + u;
  return (r - u) * ((2 * x - sum) - sum_error(r, u, sum));
}

// Steps from place to the first index at or after it with x[index] >= bound; n if there is none.
template <typename R>
int64_t gallop(const R* x, int64_t n, int64_t place, double bound) {
  int64_t step = 1, low = place;
  if (low >= n || !(x[low] < bound)) return low;
  while (low + step < n && x[low + step] < bound) {
    low += step;
    step *= 2;
  }
  // x[low] < bound, and x[low + step] is not. Halved without branches, which nothing could predict.
  step = std::min(n - low, step);
  while (step > 1) {
    const int64_t half = step / 2;
    low += x[low + half] < bound ? half : 0;
    step -= half;
  }
  return low + 1;
}

// The first index with x[index] >= bound.
template <typename R>
int64_t lower_bound(const R* x, int64_t n, double bound) {
  return std::lower_bound(x, x + n, bound, [](R a, double b) { return a < b; }) - x;
}

// run(b, serial) for each batch element, many small ones side by side; false from it means that the dense drivers
// serve.
template <typename Run>
bool over_batch(const Problem& problem, const Run& run) {
  const double points = static_cast<double>(problem.queries) + static_cast<double>(problem.keys);
  const bool small = points < 4 * kChunk;
  if (problem.batch.count > 1 && small) {
    std::vector<char> served(problem.batch.count);
    parallel_blocks(problem.batch.count, false, [&](int64_t b) { served[b] = run(b, true); });
    return std::find(served.begin(), served.end(), 0) == served.end();
  }
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    if (!run(b, points < kChunk)) return false;
  }
  return true;
}

}  // namespace linear
}  // namespace nwfast
