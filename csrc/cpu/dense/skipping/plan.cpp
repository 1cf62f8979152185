// The decision and the orders of plan.h.

#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "../../drivers.h"

namespace nwfast {
namespace {

// Of a query and a key: ordering and choosing would be felt in the time of fewer.
constexpr double kLeastPairs = 0x1p22;
constexpr int64_t kLeastKeys = 1024;
// Of M N / (M + N): ordering a point costs as much as some hundred pairs. With fewer, keys are taken as they come.
constexpr double kLeastToOrder = 256;
constexpr double kEasilyOrdered = 8192;  // from here on, ordering in vain costs a few percent
constexpr int64_t kLeastRows = 32;       // for fewer, boxes cost as much as the pairs
constexpr int64_t kKeySample = 256, kRowSample = 16;

// Of sampled pairs, the share that may be chosen where ordering pays. With two or three features it is what blocks of
// rows then choose; boxes of many features hold more of what is none of theirs.
double most_share(int64_t features, double points) {
  return features <= 3 ? 0.45 : std::fmin(0.25, 0.125 * (1 + points / kEasilyOrdered));
}

int64_t sampled(int64_t i, int64_t count, int64_t n) { return count < n ? i * (n - 1) / (count - 1) : i; }

// (count, features), and whether all are finite.
bool take(const View& view, const Batch& batch, int64_t b, int64_t n, int64_t count, int64_t features, double* out) {
  const int64_t offset = view.offset(batch, b);
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    double* const row = out + i * features;
    read(view, offset + sampled(i, count, n) * view.row_stride, features, view.column_stride, row);
    for (int64_t f = 0; f < features; ++f) finite &= std::isfinite(row[f]);
  }
  return finite;
}

bool same_points(const Problem& problem, int64_t b) {
  const View &query = problem.query, &key = problem.key;
  return problem.queries == problem.keys && query.data == key.data && query.dtype == key.dtype &&
         query.row_stride == key.row_stride && query.column_stride == key.column_stride &&
         query.offset(problem.batch, b) == key.offset(problem.batch, b);
}

}  // namespace

Skipping skipping() {
  static const Skipping choice = [] {
    const char* const name = std::getenv("NWFAST_CPU_SKIPPING");
    if (name && !std::strcmp(name, "never")) return Skipping::kNever;
    return name && !std::strcmp(name, "always") ? Skipping::kAlways : Skipping::kAuto;
  }();
  return choice;
}

SpatialPlan::SpatialPlan(const Problem& problem, int64_t b, double negligible, bool serial) {
  const int64_t m = problem.queries, n = problem.keys, features = problem.features;
  rows_.resize(m);
  for (int64_t i = 0; i < m; ++i) rows_[i] = i;
  constexpr int64_t kMost = int64_t{1} << 32;
  const bool always = skipping() == Skipping::kAlways;
  if (skipping() == Skipping::kNever || m == 0 || n == 0 || features == 0 || m >= kMost || n >= kMost) return;
  const double rows = static_cast<double>(m), keys = static_cast<double>(n);
  if (!always && (rows * keys < kLeastPairs || n < kLeastKeys || m < kLeastRows)) return;
  scale_.resize(features);
  read(problem.w, problem.w.offset(problem.batch, b), features, problem.w.column_stride, scale_.data());
  for (int64_t f = 0; f < features; ++f) {
    scale_[f] = std::fabs(scale_[f]) * kRoot;
    if (!std::isfinite(scale_[f])) return;
  }
  middle_.assign(features, 0);
  if (!always && !sample_says_so(problem, b, negligible)) return;
  const int64_t count = std::min(n, kKeySample);
  std::vector<double> sample(count * features), column(count);
  take(problem.key, problem.batch, b, n, count, features, sample.data());
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t i = 0; i < count; ++i) column[i] = sample[i * features + f];
    for (double& x : column) x = std::isfinite(x) ? x : 0;
    std::nth_element(column.begin(), column.begin() + count / 2, column.end());
    middle_[f] = column[count / 2];
  }
  if (!always && rows * keys / (rows + keys) < kLeastToOrder) {
    if (!comes_in_order(problem, b)) return;
  } else {
    Buffer<float> points(n * features);
    std::vector<char> finite(n);
    if (!scaled(problem, problem.key, b, n, serial, points.get(), finite.data())) return;
    keys_ = std::make_unique<SpatialOrder>(points.get(), n, features, serial);
  }
  active_ = true;
  if (keys_ && same_points(problem, b)) {
    std::copy_n(keys_->order(), m, rows_.begin());
  } else {
    order_rows(problem, b, serial);
  }
}

void SpatialPlan::give_up() {
  active_ = false;
  for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = static_cast<int64_t>(i);
}

int64_t SpatialPlan::home(const double* query) const {
  if (!keys_) return -1;
  std::vector<float> point(scale_.size());
  for (size_t f = 0; f < point.size(); ++f) {
    point[f] = spatial_coordinate(query[f], middle_[f], scale_[f]);
  }
  return keys_->home(point.data());
}

// Whether most pairs of a sample are too far apart to matter. A row's nearest key in the sample is further away than
// that of all keys, so that more pairs seem to matter than do. Pairs are chosen by blocks of rows: all of a row's keys
// are taken to be nearer by the extent of a block, the distance within which the sample has a block's share of its
// points.
bool SpatialPlan::sample_says_so(const Problem& problem, int64_t b, double negligible) const {
  const int64_t features = problem.features;
  const int64_t keys = std::min(problem.keys, kKeySample), rows = std::min(problem.queries, kRowSample);
  std::vector<double> key(keys * features), query(rows * features), weight(keys, 0), distance(keys), sorted;
  if (!take(problem.key, problem.batch, b, problem.keys, keys, features, key.data())) return false;
  if (!take(problem.query, problem.batch, b, problem.queries, rows, features, query.data())) return false;
  if (problem.key_weight.data) {
    const View& view = problem.key_weight;
    const int64_t offset = view.offset(problem.batch, b);
    for (int64_t j = 0; j < keys; ++j) {
      read(view, offset + sampled(j, keys, problem.keys) * view.row_stride, 1, 0, &weight[j]);
      weight[j] = std::log2(weight[j]);
      if (std::isnan(weight[j])) return false;
    }
  }
  const double window = negligible + std::log2(static_cast<double>(problem.keys));
  const double of_block = static_cast<double>(keys) * std::min(1.0, static_cast<double>(near_block(problem.queries)) /
                                                                        static_cast<double>(problem.queries));
  const int64_t neighbour = std::min(keys - 1, static_cast<int64_t>(of_block));
  const double shrink = std::pow(std::min(1.0, of_block), 1 / static_cast<double>(features));
  int64_t matter = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double best = -INFINITY;
    for (int64_t j = 0; j < keys; ++j) {
      double sum = 0;
      for (int64_t f = 0; f < features; ++f) {
        const double offset = (query[i * features + f] - key[j * features + f]) * scale_[f];
        sum += offset * offset;
      }
      distance[j] = std::sqrt(sum);
      best = std::fmax(best, weight[j] - sum);
    }
    sorted = distance;
    std::nth_element(sorted.begin(), sorted.begin() + neighbour, sorted.end());
    const double extent = shrink * sorted[neighbour];
    for (int64_t j = 0; j < keys; ++j) {
      const double apart = std::fmax(0, distance[j] - extent);
      matter += !(weight[j] - apart * apart < best - window);
    }
  }
  const double m = static_cast<double>(problem.queries), n = static_cast<double>(problem.keys);
  return static_cast<double>(matter) < most_share(features, m * n / (m + n)) * static_cast<double>(rows * keys);
}

// Whether keys side by side lie near each other, by a sample.
bool SpatialPlan::comes_in_order(const Problem& problem, int64_t b) const {
  const int64_t features = problem.features, count = kKeySample / 2, n = problem.keys, step = kBoxPoints / 2;
  const View& view = problem.key;
  const int64_t offset = view.offset(problem.batch, b);
  std::vector<double> x(features), y(features), before(features);
  double beside = 0, apart = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = sampled(i * 7919 % count, count, n - step);
    read(view, offset + j * view.row_stride, features, view.column_stride, x.data());
    read(view, offset + (j + step) * view.row_stride, features, view.column_stride, y.data());
    double to_next = 0, to_before = 0;
    for (int64_t f = 0; f < features; ++f) {
      to_next += std::fabs((x[f] - y[f]) * scale_[f]);
      to_before += std::fabs((x[f] - before[f]) * scale_[f]);
    }
    beside += i > 0 ? to_next : 0;
    apart += i > 0 ? to_before : 0;
    before = x;
  }
  return beside < apart / 4;
}

void SpatialPlan::order_rows(const Problem& problem, int64_t b, bool serial) {
  const int64_t m = problem.queries, features = problem.features;
  Buffer<float> points(m * features);
  std::vector<char> finite(m);
  if (scaled(problem, problem.query, b, m, serial, points.get(), finite.data())) {
    const SpatialOrder order(points.get(), m, features, serial);
    std::copy_n(order.order(), m, rows_.begin());
    return;
  }
  // Rows that are no numbers come last, in blocks of their own but one.
  std::vector<int64_t> kept;
  rows_.clear();
  for (int64_t i = 0; i < m; ++i) {
    if (finite[i]) {
      std::copy_n(points.get() + i * features, features, points.get() + static_cast<int64_t>(kept.size()) * features);
      kept.push_back(i);
    }
  }
  if (!kept.empty()) {
    const int64_t count = static_cast<int64_t>(kept.size());
    const SpatialOrder order(points.get(), count, features, serial);
    for (int64_t i = 0; i < count; ++i) rows_.push_back(kept[order.order()[i]]);
  }
  for (int64_t i = 0; i < m; ++i) {
    if (!finite[i]) rows_.push_back(i);
  }
}

bool SpatialPlan::scaled(const Problem& problem, const View& view, int64_t b, int64_t n, bool serial, float* out,
                         char* finite) const {
  constexpr int64_t kPart = 1024;
  const int64_t features = problem.features, offset = view.offset(problem.batch, b), parts = (n + kPart - 1) / kPart;
  std::vector<char> whole(parts, true);
  parallel_blocks(parts, serial, [&](int64_t part) {
    double column[kPart];
    const int64_t begin = part * kPart, count = std::min(kPart, n - begin);
    std::fill_n(finite + begin, count, true);
    for (int64_t f = 0; f < features; ++f) {
      read(view, offset + begin * view.row_stride + f * view.column_stride, count, view.row_stride, column);
      for (int64_t i = 0; i < count; ++i) {
        if (!std::isfinite(column[i])) finite[begin + i] = whole[part] = false;
        out[(begin + i) * features + f] = spatial_coordinate(column[i], middle_[f], scale_[f]);
      }
    }
  });
  return std::all_of(whole.begin(), whole.end(), [](char part) { return part; });
}

}  // namespace nwfast
