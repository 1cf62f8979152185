// The linear method in two and three features: a fast Gauss transform on a grid of boxes.
//
// In units of the bandwidth, x_f = |w_f| q_f and u_f = |w_f| k_f, all sums are S(x) = sum_j c_j exp(-|x - u_j|^2 / 2),
// one for each column of charges c. The Gaussian is a product over features, so what linear/plan.h says of boxes of an
// axis holds for each feature, and boxes of the grid have products of it.
//
// Cells. Points are sorted by the cell of a grid that they lie in (points.h); only occupied cells, the boxes, exist.
// The three axes of this folder are the features in the order of their numbers of cells, most first; with two features
// the middle axis has one cell and one term. Cells are 2 `half` bandwidths wide, with edges at multiples of a number of
// six bits, so that centres are exact; an axis on which all points lie within one width is a single cell around them.
//
// Expansions (expansion.h). The keys of a box become moments in products of Chebyshev polynomials, those of all boxes
// within `reach` are translated, one feature after another, and give a series for each crowded box of queries: the
// interpolant of the kernel at T Chebyshev nodes of both boxes. Its error for a key at distance z is at most
// `truncation` exp(-z^2 / 4) (see expansion_error of linear/plan.h; errors of the features add up), and each box of
// queries adds up the bounds of its sources.
//
// Meshes (mesh/mesh.h). Data in float32 that is not narrow beside the bandwidth has the nodes of a mesh in the place of
// moments and series; all else is the same.
//
// Direct sums (direct.h). Queries of other boxes meet the keys of all cells within a radius one by one, in the dense
// kernels. Which way is less work is told by counts. The radius is that beyond which all keys add too little wherever
// they are, or a smaller one beyond which those that there are within the larger one add too little. Where points are
// so sparse that no box would pay, cells are as wide as suits windows.
//
// Which sums to trust. A row whose total is not well above what its way may have left out or rounded, is summed again:
// directly, within a larger radius, and what that does not settle, over all keys by the dense driver (LeftOverRows of
// element.h). Where that is more work, forward passes sum such rows over a tree of the keys (far/tree.h).
//
// Everything is in double but direct sums, which have the precision of the data.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../linear/plan.h"
#include "mesh/mesh.h"

namespace nwfast {
namespace grid {

constexpr int kAxes = 3;
constexpr double kMostCells = 0x1p60;                   // of the grid, occupied or not
constexpr double kMostIndex = 0x1p44;                   // beyond so many cells from 0 their edges are no longer exact
constexpr double kMostScaled = 0x1p40;                  // coordinates, in bandwidths
constexpr int kMostPairs = 64;                          // of boxes along one axis that one takes sums from
constexpr int64_t kPointTask = 4096;                    // points of one task, at most
constexpr int kLevels = 3;                              // of direct sums, each for rows further from their nearest key
constexpr double kLevelDistance[kLevels] = {2, 6, 16};  // in bandwidths

// kBeyond: the share of the nearest key's term that all keys beyond a row's window may add. kAccept: how far off sums
// may be, relative to a row's total: rows whose bound is more are summed another way. Truncation is of the series of
// one feature, such that this does not happen where points are dense: a sum of exp(-z^2 / 4) over boxes, by the
// distance of the boxes, is up to 5 times that of exp(-z^2 / 2) over points in each feature. kMoments: kAccept of
// second derivatives in bandwidths where they make covariances (Plan::moments), for which series may be so many times
// (kMomentTruncation) as far off as for those that make gradients.
template <typename R>
struct Accuracy;
template <>
struct Accuracy<float> {
  static constexpr double kAccept = 1e-7, kBeyond = 5e-9, kTruncation[2] = {1e-9, 2e-10}, kLargestHalf = 1.5;
  static constexpr double kPair = 0.45;  // nanoseconds of a pair in direct sums
  static constexpr double kMoments = 2e-6, kMomentTruncation = 100;
};
template <>
struct Accuracy<double> {
  static constexpr double kAccept = 4e-13, kBeyond = 2.5e-14, kTruncation[2] = {4e-15, 8e-16}, kLargestHalf = 1.25;
  static constexpr double kPair = 1.4;
  static constexpr double kMoments = 4e-11, kMomentTruncation = 100;
};
constexpr double kMultiply = 0.06;  // nanoseconds of a multiply-add in expansions
// Of the window of a cell: to begin with, for each row of cells that it crosses, and for each key that is copied.
constexpr double kWindow = 1500, kWindowRange = 60, kWindowKey = 2;

template <typename R>
double pair_time(int columns, int order) {
  return Accuracy<R>::kPair * (1 + 0.15 * (columns - 2)) * (1 + 0.7 * (order > 0));
}

struct Axis {
  int feature = -1;   // of the caller, or -1: an axis of one cell, without coordinates
  double scale = 0;   // |w|
  double side = 1;    // of a cell, in user units
  double middle = 0;  // of the only cell of a single axis
  bool single = true;
  double half = 0;  // of a cell, in bandwidths
  int terms = 1;
  int spacings = 0;              // of the mesh in a cell; 0 for a Chebyshev series
  double from = 0, to = 0;       // points beyond these are outside of the grid
  int64_t low = 0;               // the first cell of the grid
  int64_t cells = 1;             // of the grid, with those around the keys that are empty
  int64_t reach = 0;             // boxes that count for expansions lie at most so many cells apart
  std::vector<double> matrices;  // (reach + 1, terms, terms) from the source's term to the target's, by target - source
  int node_reach = 0;            // nodes of a mesh further apart than this do not count for one another
  std::vector<double> taps_[2];  // (kTapPadding + 2 node_reach + 1 + kTapPadding) by target - source, see taps
  std::vector<double>
      decay;  // (reach + 1) bounds of what the error of a charge is in boxes so far apart, over `truncation`

  double width() const { return side * scale; }
  double to_local() const { return side > 0 ? 2 / side : 0; }
  double centre(int64_t cell) const { return single ? middle : static_cast<double>(2 * (low + cell) + 1) * (side / 2); }
  // The cell of a coordinate, counted from the first; outside of [0, cells) where it lies in none.
  int64_t cell_of(double x) const {
    if (single) return 0;
    const double place = std::floor(x / side);
    return std::fabs(place) < kMostIndex ? static_cast<int64_t>(place) - low : int64_t{-1};
  }
  // How many cells away points within a distance (in bandwidths) may lie.
  int64_t cells_within(double distance) const {
    if (single || !(width() > 0)) return single ? 0 : cells;
    const double count = std::ceil(distance / width());
    return count < static_cast<double>(cells) ? static_cast<int64_t>(count) : cells;
  }
  // Between points of cells so many apart, at the least; in bandwidths.
  double gap_of(int64_t apart) const { return apart > 1 ? static_cast<double>(apart - 1) * width() : 0; }
  // Of the kernel between nodes, or of z^2 times the kernel.
  const double* taps(bool squares) const { return taps_[squares].data(); }
  const double* matrix(int64_t apart) const { return matrices.data() + apart * terms * terms; }
};

struct Plan {
  int features = 2;
  Axis axis[kAxes];
  int order = 0;  // of the derivatives that are asked for
  bool moments =
      false;  // whether second derivatives of the first column are, by pairs of axes, as good as Accuracy::kMoments
  bool mesh = false;        // whether boxes have meshes rather than series
  bool one_mesh = false;    // whether these are parts of one, in three features
  bool direct = false;      // whether cells are as wide as suits direct sums, and no box is expanded
  double truncation = 0;    // of the sums of values, relative to Axis::decay of a source's charge
  double moment_error = 0;  // the same of second derivatives by places in bandwidths, where plans have moments
  double log_span = 0;      // log of the ratio of all charges to what may be left out of a row near a key
  double radius = 0;        // keys further from a row near a key are left out
  double near = 0;   // nor do those further than this count, if they are not many times what is within: see beyond
  double boxes = 0;  // that are occupied, told by a sample
  double translation = 0;  // of all boxes, in multiply-adds of a column
  double work = 0;         // the time that it is expected to take, in nanoseconds

  int64_t size() const { return static_cast<int64_t>(axis[0].terms) * axis[1].terms * axis[2].terms; }
  const GridWindow* window() const { return mesh ? &grid_window(order) : nullptr; }
  double point_work() const { return mesh ? mesh_point_work(features) : static_cast<double>(size()) * 1.2; }
  // The distance within which keys count for a row so far from its nearest.
  double radius_at(double distance) const { return std::sqrt(distance * distance + 2 * log_span); }
  // What all keys at a distance of more than this add, relative to their charge.
  static double beyond(double distance) { return std::exp(-distance * distance / 2); }
};

// What the choice of a plan depends on.
struct Extent {
  int features;
  double scale[kAxes], low[kAxes], high[kAxes];  // |w|; of keys and queries
  double key_low[kAxes], key_high[kAxes];
  int64_t keys, queries;
  int order;                                // of the derivatives that are asked for
  int columns;                              // of charges
  bool moments = false;                     // see Plan
  bool expand = false;                      // whether all boxes will be expanded
  std::vector<double> sample[kAxes];        // some of the keys
  std::vector<double> query_sample[kAxes];  // of the queries; empty for those that are like the keys
};

// Plan::log_span of so many keys.
template <typename R>
double log_span_of(int64_t keys) {
  return std::log(static_cast<double>(keys) / Accuracy<R>::kBeyond);
}

// The error of sums of values that are bounded by `bound` (see Expansion), with that of rounding.
inline double error_of(const Plan& plan, double bound) { return (plan.truncation + 1e-15) * bound; }

// Pairs of a query and a key within a radius of each other, told by a sample; along the features of `all` (null for
// none) at any distance.
double pairs_within(const Extent& extent, double radius, const bool* all);

// False where there are more cells than numbers for them.
template <typename R>
bool make_plan(const Extent& extent, Plan& plan);
void fill_matrices(Plan& plan);

}  // namespace grid
}  // namespace nwfast
