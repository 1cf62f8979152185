// Rows of an element that nothing else has settled, over the tree of tree.h; and whether that pays.

#pragma once

#include "../direct.h"
#include "tree.h"

namespace nwfast {
namespace grid {

constexpr int kMostFarColumns = 9;  // of charges, for which expansions are kept
// In nanoseconds: of a key in the tree, of a row that goes down it in two and three features; and of all keys for a row
// outside of the grid, of which dense kernels for floats look at few, and those in long double at all.
constexpr double kTreeKey = 150, kTreeRow[2] = {2e3, 8e3};
template <typename R>
constexpr double kOutsideKey = sizeof(R) == 4 ? 0.03 : 5;

// Whether the tree serves a call at all, and the time that it takes.
inline bool far_serves(bool exclude_self, int64_t channels) { return !exclude_self && channels < kMostFarColumns; }
inline double far_time(double keys, double rows, int features) {
  return rows > 0 ? keys * kTreeKey + rows * kTreeRow[features - 2] : 0;
}

// rows: places of sorted queries; outside: how many others there are.
template <typename R>
bool far_pays(const Element<R>& element, const std::vector<int64_t>& rows, int level, size_t outside) {
  const Plan& plan = element.plan;
  const double all = static_cast<double>(rows.size() + outside), keys = static_cast<double>(element.keys.n);
  if (!far_serves(element.sorted.exclude_self, element.sorted.channels)) return false;
  const double pair = pair_time<R>(static_cast<int>(element.sorted.channels) + 1, 0);
  const double by_tree = far_time(keys, all, plan.features);
  const double of_outside = static_cast<double>(outside) * keys * kOutsideKey<R>;
  if (of_outside > by_tree) return true;
  if (static_cast<double>(rows.size()) * keys * std::fmax(pair, kOutsideKey<R>) + of_outside < by_tree) return false;
  constexpr int64_t kSample = 64;
  const int64_t count = static_cast<int64_t>(rows.size()), samples = std::min(count, kSample);
  const std::vector<Box>& boxes = element.queries.boxes;
  WindowFinder finder(plan, element.keys.boxes, radius_of(plan, level));
  std::vector<WindowFinder::Range> ranges;
  double time = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t row = rows[i * count / samples];
    const Box& box = *std::partition_point(boxes.begin(), boxes.end(), [&](const Box& b) { return b.end <= row; });
    const double found = static_cast<double>(finder.find(box.cell, ranges));
    const double gathered = kWindowKey / static_cast<double>(std::min(box.end - box.begin, kItemRows));
    time += found > 0 ? found * (pair + gathered) : keys * kOutsideKey<float>;
  }
  if (samples > 0) time *= static_cast<double>(count) / static_cast<double>(samples);
  return time + of_outside > by_tree;
}

// use(k, shift, sums) for each of some rows, by the caller's numbers, in their order: see sum_far_rows of tree.h.
template <typename R, typename Use>
void sum_far_rows(const Element<R>& element, const Problem& problem, int64_t b, const std::vector<int64_t>& rows,
                  bool serial, const Use& use) {
  const int64_t n = static_cast<int64_t>(rows.size()), features = problem.features;
  const KeyTree tree(element, serial);
  Buffer<double> query(features * n), shift(n), sums(n * tree.columns);
  const int64_t offset = problem.query.offset(problem.batch, b);
  for (int64_t k = 0; k < n; ++k) {
    double x[kAxes];
    read(problem.query, offset + rows[k] * problem.query.row_stride, features, problem.query.column_stride, x);
    for (int64_t f = 0; f < features; ++f) query[f * n + k] = x[f];
  }
  sum_far_rows(tree, query.get(), n, serial, shift.get(), sums.get());
  for (int64_t k = 0; k < n; ++k) use(k, shift[k], sums.get() + k * tree.columns);
}

}  // namespace grid
}  // namespace nwfast
