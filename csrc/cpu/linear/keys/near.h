// Rows for keys to visit one by one, where there are few around each key: one channel, in the precision of the input.

#pragma once

#include "../rows/near.h"

namespace nwfast {
namespace linear {

template <typename R>
class NearRows {
 public:
  // Whether rows and keys seem to lie sparsely enough, by samples, and R has the range for it. Keys have no weights:
  // each row's total is then at least that of level zero, relative to its reference.
  static bool promising(const Data<R>& data, const Plan& plan) {
    if (!near_suits(data, plan) || data.weight || !data.dropped.empty() || data.queries == 0) return false;
    const double reach = (plan.window + kMargin) / plan.scale;
    constexpr int64_t kSamples = 32;
    int64_t rows = 0;
    for (int64_t k = 0; k < kSamples; ++k) {
      const double u = data.key[k * (data.keys - 1) / (kSamples - 1)];
      rows += lower_bound(data.query, data.queries, u + reach) - lower_bound(data.query, data.queries, u - reach);
    }
    return rows <= kMostRows * kSamples;
  }

  void allocate(const Data<R>& data) {
    rows_ = data.queries;
    for (Buffer<R>* numbers : {&x_, &reference_, &grad_, &mean_, &lse_grad_, &low_, &high_}) numbers->allocate(rows_);
    if (!data.exclude) return;
    excluded_.allocate(rows_);
    for (int64_t i = 0; i < rows_; ++i) excluded_[i] = data.excluded(i);
  }

  // A row that no key visits here.
  void skip(int64_t i) {
    x_[i] = reference_[i] = grad_[i] = mean_[i] = lse_grad_[i] = 0;
    low_[i] = INFINITY;
    high_[i] = -INFINITY;
  }

  // A row with its gradients divided by its total. False if R is not precise enough for it (kernels/windows.h), or
  // has not the range.
  bool put(int64_t i, R x, R reference, double grad, double mean, double lse_grad, const Plan& plan) {
    const double delta = std::fabs(static_cast<double>(x) - static_cast<double>(reference));
    const double window = (plan.window + kMargin) / plan.scale, reach = std::sqrt(delta * delta + window * window);
    const double slack = (std::fabs(x) + reach) * 4 * std::numeric_limits<R>::epsilon();
    const double low = x - reach - slack, high = x + reach + slack;
    if (!(exact_differences(low, high) || delta * plan.scale <= kNearAlways) ||
        !(std::fabs(grad) < kNearMostGrad && std::fabs(lse_grad) < kNearMostGrad)) {
      return false;
    }
    x_[i] = x;
    reference_[i] = reference;
    grad_[i] = static_cast<R>(grad);
    mean_[i] = static_cast<R>(mean);
    lse_grad_[i] = static_cast<R>(lse_grad);
    low_[i] = static_cast<R>(low);
    high_[i] = static_cast<R>(high);
    return true;
  }

  // Finds the rows that each group of keys visits. False if there are too many.
  bool find_ranges(const R* key, int64_t keys, bool serial) {
    for (int64_t i = 1; i < rows_; ++i) high_[i] = high_[i] > high_[i - 1] ? high_[i] : high_[i - 1];
    for (int64_t i = rows_ - 2; i >= 0; --i) low_[i] = low_[i] < low_[i + 1] ? low_[i] : low_[i + 1];
    const int64_t groups = (keys + kNearTargets - 1) / kNearTargets, parts = (groups + kTaskGroups - 1) / kTaskGroups;
    ranges_.allocate(2 * groups);
    std::vector<int64_t> visits(parts);
    parallel_blocks(parts, serial, [&](int64_t part) {
      int64_t begin = 0, end = 0;
      for (int64_t g = part * kTaskGroups; g < std::min(groups, (part + 1) * kTaskGroups); ++g) {
        const double lowest = key[g * kNearTargets];
        const double highest = std::nextafter(double(key[std::min(keys, (g + 1) * kNearTargets) - 1]), INFINITY);
        const bool found = g > part * kTaskGroups;
        begin = found ? gallop(high_.get(), rows_, begin, lowest) : lower_bound(high_.get(), rows_, lowest);
        end = found ? gallop(low_.get(), rows_, end, highest) : lower_bound(low_.get(), rows_, highest);
        ranges_[2 * g] = begin;
        ranges_[2 * g + 1] = std::max(begin, end);
        visits[part] += ranges_[2 * g + 1] - begin;
      }
    });
    double sum = 0;
    for (const int64_t part : visits) sum += static_cast<double>(part);
    return sum <= 2.0 * (kMostRows + kNearTargets) * static_cast<double>(groups);
  }

  // Sums of keys [first, first + n), first a multiple of kNearTargets: (2 + offsets, pitch).
  void pull(const Data<R>& data, const Plan& plan, int64_t first, int64_t n, double* sums, int64_t pitch) const {
    NearPullTask<R> task;
    task.target = data.key + first;
    task.targets = n;
    task.value = data.value + first * data.row_stride;
    task.value_stride = data.row_stride;
    task.centre = static_cast<R>(data.centre[0]);
    task.source = x_.get();
    task.reference = reference_.get();
    task.excluded = excluded_.get();
    task.first_target = first;
    task.grad = grad_.get();
    task.mean = mean_.get();
    task.lse_grad = lse_grad_.get();
    task.ranges = ranges_.get() + 2 * (first / kNearTargets);
    task.scale = plan.scale;
    task.offsets = plan.offsets;
    task.sums = sums;
    task.sums_pitch = pitch;
    linear_kernels<R>().near_pull(task);
  }

 private:
  static constexpr double kMargin = 3;          // bandwidths by which totals below 1 widen a window
  static constexpr int64_t kMostRows = 64;      // around a key, on average
  static constexpr int64_t kTaskGroups = 1024;  // of one task

  Buffer<R> x_, reference_, grad_, mean_, lse_grad_, low_, high_;
  Buffer<int64_t> ranges_, excluded_;
  int64_t rows_ = 0;
};

}  // namespace linear
}  // namespace nwfast
