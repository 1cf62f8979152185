// Which of the two methods is faster: for one feature a model of their times, fitted to measurements; for two and three
// that of grid/choose.cpp.
//
// Both depend on the data through the number of keys that a query's window holds. It is estimated from a sample of keys
// and queries of the first batch element, so that the choice costs some microseconds whatever the size. Times are those
// of a query, in nanoseconds on two cores with AVX2; only their ratio counts. benchmarks/studies/method_cost.py
// measures how good it is.

#include <algorithm>
#include <cmath>

#include "drivers.h"

namespace nwfast {
namespace {

constexpr int64_t kKeySample = 256, kQuerySample = 64;

template <typename T>
constexpr double kDensePair = sizeof(T) == 4 ? 0.21 : 0.73;
constexpr double kDenseRow = 40;  // of a query, whatever its window
template <typename T>
constexpr double kDirectRow = sizeof(T) == 4 ? 70 : 80;  // of a query that takes its keys one by one, in linear time
constexpr double kDirectPair = 1.6;
// Of one channel, by vectors of rows, where a vector's window holds at most kNearWindow.
template <typename T>
constexpr double kNearRow = sizeof(T) == 4 ? 6 : 12;
template <typename T>
constexpr double kNearPair = sizeof(T) == 4 ? 0.45 : 1.8;
template <typename T>
constexpr double kNearRows = sizeof(T) == 4 ? 8 : 4;
constexpr double kNearWindow = 90;
constexpr double kSeriesRow = 14;  // of a query that is expanded
template <typename T>
constexpr double kTranslation =
    sizeof(T) == 4 ? 1200 : 2700;  // of bringing all boxes around into one, for all queries in it
constexpr double kCompressedKey = 4.5;
template <typename T>
constexpr double kLinearCall = sizeof(T) == 4 ? 40'000 : 150'000;  // the matrices between boxes, for the most part

// Shares of the keys within a distance of the queries.
class Sample {
 public:
  explicit Sample(const Problem& problem) {
    keys_ = take(problem.key, problem.keys, kKeySample, problem.batch, key_);
    queries_ = take(problem.query, problem.queries, kQuerySample, problem.batch, query_);
    std::sort(key_, key_ + keys_);
    for (int64_t j = 0; j < keys_; ++j) finite_ &= std::isfinite(key_[j]);
    for (int64_t i = 0; i < queries_; ++i) finite_ &= std::isfinite(query_[i]);
  }
  bool finite() const { return finite_; }
  double range() const { return key_[keys_ - 1] - key_[0]; }

  // Of the mean query, where keys at a distance of up to sqrt(nearest^2 + radius^2) count.
  double within(double radius) const {
    double sum = 0;
    for (int64_t i = 0; i < queries_; ++i) {
      const double x = query_[i];
      const double *const end = key_ + keys_, *const above = std::lower_bound(key_, end, x);
      double nearest = INFINITY;
      if (above < end) nearest = *above - x;
      if (above > key_) nearest = std::fmin(nearest, x - above[-1]);
      // The nearest key of a sample is further away than that of all keys.
      nearest = std::fmax(0, nearest - 4 * range() / static_cast<double>(keys_));
      const double reach = std::sqrt(nearest * nearest + radius * radius);
      sum += static_cast<double>(std::upper_bound(key_, end, x + reach) - std::lower_bound(key_, end, x - reach));
    }
    return sum / static_cast<double>(queries_ * keys_);
  }

 private:
  static int64_t take(const View& view, int64_t n, int64_t most, const Batch& batch, double* out) {
    const int64_t count = std::min(n, most), offset = view.offset(batch, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = count > 1 ? i * (n - 1) / (count - 1) : 0;
      read(view, offset + place * view.row_stride, 1, 0, out + i);
    }
    return count;
  }

  double key_[kKeySample], query_[kQuerySample];
  int64_t keys_, queries_;
  bool finite_ = true;
};

}  // namespace

bool linear_is_faster(const Problem& problem) {
  const double m = static_cast<double>(problem.queries), n = static_cast<double>(problem.keys);
  if (problem.features > 3 || problem.batch.count == 0 || m * n < kChoicePairs) return false;
  if (problem.features > 1) return grid::is_faster(problem);
  if (problem.channels > 1) return true;  // the dense kernels for channels have boxes for windows, which cost more
  const bool wide = problem.query.dtype == Dtype::kDouble;
  const Sample sample(problem);
  double w = 0;
  read(problem.w, problem.w.offset(problem.batch, 0), 1, 0, &w);
  if (!sample.finite() || !std::isfinite(w)) return false;
  const double scale = std::fabs(w) * std::sqrt(kHalfLog2E);
  const double negligible = (wide ? kNegligibleDouble : kNegligibleFloat) + std::log2(n);
  const double radius = scale > 0 ? std::sqrt(negligible) / scale : INFINITY;
  const double window = n * sample.within(radius);
  const double spacing = std::fmax(1, n / m);  // keys between two queries, about
  // Dense: blocks of 64 queries share a window.
  const bool windowed = problem.queries >= 128;
  const double visited = windowed ? std::fmin(n, window + 64 * spacing) : n;
  const double dense = kDenseRow + visited * (wide ? kDensePair<double> : kDensePair<float>);
  const double near = window + (wide ? kNearRows<double> : kNearRows<float>)*spacing;
  const double direct =
      near <= kNearWindow
          ? (wide ? kNearRow<double> + kNearPair<double> * near : kNearRow<float> + kNearPair<float> * near)
          : (wide ? kDirectRow<double> : kDirectRow<float>)+kDirectPair * (window + 4 + 4 * spacing);
  const double queries_of_a_box = m * std::fmin(1, window / n / 6);
  const double series =
      kSeriesRow + (wide ? kTranslation<double> : kTranslation<float>) / std::fmax(1, queries_of_a_box);
  const double linear =
      kCompressedKey * n / m + std::fmin(direct, series) + (wide ? kLinearCall<double> : kLinearCall<float>) / m;
  return linear < dense;
}

}  // namespace nwfast
