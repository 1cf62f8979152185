// Whether the grid is expected to be faster than the dense drivers: a model of their times.
//
// Extents and the number of pairs within reach are told by a sample of keys and queries of the first batch element, so
// that the choice costs some microseconds whatever the size. Times are those of one core with AVX2, in nanoseconds;
// only their ratio counts. benchmarks/studies/method_cost.py --features 2 measures how good it is.

#include "far/rows.h"

namespace nwfast {
namespace grid {
namespace {

constexpr int64_t kKeySample = 256, kQuerySample = 32;
constexpr double kDensePair[2] = {0.6, 2.0};  // of float and double
constexpr double kDenseCall = 5e3;
constexpr double kPoint = 120;  // to sort, pack and write a point
constexpr double kCall = 1e6;   // matrices, the choice itself, and what else does not depend on the number of points
constexpr double kSeriesCall = 300e3;
constexpr double kWork = 1.5;  // what the plan's estimate leaves out
// The dense drivers leave far pairs out where there are many: for each point its order and the search, in two and three
// features, and pairs of the boxes that are left.
constexpr double kSkippingPairs = 1 << 22, kSkippedPoint[2] = {500, 1200}, kLeft = 2;
// Of rows of doubles beyond what doubles hold of scores (most_score), which dense drivers compute in long double.
constexpr double kLongPair = 20, kLongDistance = 37;

int64_t sample(const View& view, const Batch& batch, int64_t n, int64_t most, int features, std::vector<double>* to) {
  const int64_t count = std::min(n, most), offset = view.offset(batch, 0);
  for (int64_t i = 0; i < count; ++i) {
    double x[kAxes];
    read(view, offset + i * n / count * view.row_stride, features, view.column_stride, x);
    for (int f = 0; f < features; ++f) to[f].push_back(x[f]);
  }
  return count;
}

template <typename R>
bool faster(const Problem& problem) {
  const int features = static_cast<int>(problem.features);
  const double m = static_cast<double>(problem.queries), n = static_cast<double>(problem.keys);
  const int wide = sizeof(R) == 8;
  const double columns = static_cast<double>(problem.channels) + 1;
  const double pair = kDensePair[wide] * (1 + 0.2 * (features - 2) + 0.15 * (columns - 2));
  double dense = kDenseCall + m * n * pair;
  const double fixed = kCall + (m + n) * kPoint;
  if (dense < fixed) return false;
  Extent extent;
  extent.features = features;
  extent.keys = problem.keys;
  extent.queries = problem.queries;
  extent.order = 0;
  extent.columns = static_cast<int>(columns);
  auto& query = extent.query_sample;
  const int64_t keys = sample(problem.key, problem.batch, problem.keys, kKeySample, features, extent.sample);
  const int64_t queries = sample(problem.query, problem.batch, problem.queries, kQuerySample, features, query);
  double w[kAxes];
  read(problem.w, problem.w.offset(problem.batch, 0), features, problem.w.column_stride, w);
  for (int f = 0; f < features; ++f) {
    extent.scale[f] = std::fabs(w[f]);
    if (!std::isfinite(w[f])) return false;
    const auto ends = std::minmax_element(extent.sample[f].begin(), extent.sample[f].end());
    extent.key_low[f] = extent.low[f] = *ends.first;
    extent.key_high[f] = extent.high[f] = *ends.second;
    for (const double x : extent.sample[f]) {
      if (!std::isfinite(x)) return false;
    }
  }
  Plan plan;
  if (!make_plan<R>(extent, plan)) return false;
  // Rows too far from all keys for the grid.
  double far = 0, farthest = 0;
  for (int64_t i = 0; i < queries; ++i) {
    double nearest = INFINITY;
    for (int64_t j = 0; j < keys; ++j) {
      double square = 0;
      for (int f = 0; f < features; ++f) {
        const double z = (query[f][i] - extent.sample[f][j]) * w[f];
        square += z * z;
      }
      nearest = std::fmin(nearest, square);
    }
    // The nearest key of all is nearer than that of the sample.
    const double share = std::pow(static_cast<double>(keys) / n, 1.0 / features);
    far += !(std::sqrt(nearest) * share <= 2 * kLevelDistance[kLevels - 1]);
    farthest += wide && !(std::sqrt(nearest) * share <= 2 * kLongDistance);
  }
  const double rows = m / static_cast<double>(queries);
  if (m * n >= kSkippingPairs) {
    const double near = pairs_within(extent, plan.radius, nullptr);
    dense = std::fmin(dense, (m + n) * kSkippedPoint[features - 2] + kLeft * near * pair);
  }
  const double by_long_double = farthest * rows * n * kLongPair;
  double left_over = far * rows / m * dense + by_long_double;
  if (far_serves(problem.exclude_self, problem.channels)) {
    left_over = std::fmin(left_over, far_time(n, far * rows, features));
  }
  dense += by_long_double;
  return fixed + kWork * plan.work + (plan.direct ? 0 : kSeriesCall) + left_over < dense;
}

}  // namespace

bool is_faster(const Problem& problem) {
  if (problem.batch.count == 0 || problem.queries == 0) return false;
  return problem.query.dtype == Dtype::kDouble ? faster<double>(problem) : faster<float>(problem);
}

}  // namespace grid
}  // namespace nwfast
