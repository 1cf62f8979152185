// Rows beyond what the tiles can hold, one by one in long double: so far from every key that differences between scores
// are lost in the scores, at coordinates beyond the range of scaled ones, or next to an own key that is not finite.
//
// The nearest key is chosen by differences, |x - k*|^2 - |x - k|^2 = (k - k*).(2 x - k* - k), where 2 x - k* is held in
// two parts (a key may lie as far on the other side of x), and all else is relative to it: weights are 2^(t_j - t*) and
// the sums of what the row pulls at, which add up to nothing (or to the gradient of lse), are taken about that key.
// Nothing is scaled: long double has the range for squares of doubles. Distances in double tell which keys may matter
// to a row; only those are computed in long double.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../problem.h"

namespace nwfast {

class FarBatch {
 public:
  using Real = long double;

  // The weights of one row, and what follows from them.
  struct Row {
    bool counts = false;                              // whether any key does
    bool nan = false;                                 // whether the row is NaN for its query, a key or a weight
    int64_t nearest = 0;                              // of the keys that count
    Real top = 0, total = 0;                          // sum_j weight_j 2^t_j = total 2^(top + t*)
    Real nearest_score = 0;                           // -t*
    std::vector<int64_t> keys;                        // ascending: those that may matter
    std::vector<Real> query, relative, weight, mean;  // (features); (keys) t_j - t*; (keys) of sum 1; (channels)
    std::vector<Real> mirrored, rest;                 // (features) 2 x - k*, and what rounding took from it
  };

  // What a row adds to the gradients of each of its keys: of value (times the row's own), of its score, of its weight.
  struct KeyParts {
    std::vector<Real> value, score, weight;
  };

  FarBatch(const Problem& problem, int64_t b) : problem_(problem), b_(b) {
    const Batch& batch = problem.batch;
    const int64_t n = problem.keys, features = problem.features, channels = problem.channels;
    w_.resize(features);
    key_.resize(n * features);
    value_.resize(n * channels);
    weight_.assign(n, 1);
    kind_.assign(n, kCounts);
    read(problem.w, problem.w.offset(batch, b), features, problem.w.column_stride, w_.data());
    const int64_t key = problem.key.offset(batch, b), value = problem.value.offset(batch, b);
    for (int64_t j = 0; j < n; ++j) {
      read(problem.key, key + j * problem.key.row_stride, features, problem.key.column_stride, &key_[j * features]);
      read(problem.value, value + j * problem.value.row_stride, channels, problem.value.column_stride,
           &value_[j * channels]);
    }
    if (problem.key_weight.data) {
      read(problem.key_weight, problem.key_weight.offset(batch, b), n, problem.key_weight.row_stride, weight_.data());
    }
    for (int64_t j = 0; j < n; ++j) kind_[j] = kind_of(j);
    bool small = true;  // no difference of coordinates overflows
    for (int64_t j = 0; j < n; ++j) {
      broken_ += kind_[j] == kNaN;
      if (kind_[j] != kCounts && kind_[j] != kLeftOut) continue;
      for (int64_t f = 0; f < features; ++f) small &= std::fabs(key_[j * features + f]) < kMostCoordinate;
      // What is not finite spoils rows of any distance.
      for (int64_t c = 0; c < channels; ++c) small &= std::isfinite(value_[j * channels + c]);
    }
    if (!small) return;
    column_.resize(n * features);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t f = 0; f < features; ++f) column_[f * n + j] = key_[j * features + f];
    }
  }

  Row weigh(int64_t i) const {
    const int64_t features = problem_.features, channels = problem_.channels;
    Row row;
    std::vector<double> query(features);
    read(problem_.query, problem_.query.offset(problem_.batch, b_) + i * problem_.query.row_stride, features,
         problem_.query.column_stride, query.data());
    row.query.assign(query.begin(), query.end());
    const int64_t own = problem_.exclude_self ? problem_.own_key(i) : -1;
    bool finite = true;
    for (int64_t f = 0; f < features; ++f) {
      row.nan |= std::isnan(query[f]);
      finite &= std::isfinite(query[f]);
    }
    row.nan |= broken_ > (own >= 0 && kind_[own] == kNaN);
    if (row.nan || !finite) return row;
    choose_keys(query, own, row);
    if (!row.counts) return row;
    const size_t count = row.keys.size();
    row.relative.resize(count);
    row.weight.assign(count, 0);
    row.top = -INFINITY;
    for (size_t i = 0; i < count; ++i) {
      const int64_t j = row.keys[i];
      row.relative[i] = relative_score(row, j);
      if (kind_[j] != kCounts) continue;
      row.weight[i] = row.relative[i];
      if (weight_[j] != 1) row.weight[i] += std::log2(static_cast<Real>(weight_[j]));
      row.top = std::fmax(row.top, row.weight[i]);
    }
    for (size_t i = 0; i < count; ++i) {
      if (kind_[row.keys[i]] != kCounts) continue;
      row.weight[i] = std::exp2(static_cast<double>(row.weight[i] - row.top));
      row.total += row.weight[i];
    }
    row.mean.assign(channels, 0);
    for (size_t i = 0; i < count; ++i) {
      row.weight[i] /= row.total;
      const int64_t j = row.keys[i];
      if (kind_[j] != kCounts) continue;
      for (int64_t c = 0; c < channels; ++c) row.mean[c] += row.weight[i] * value_[j * channels + c];
    }
    for (int64_t f = 0; f < features; ++f) {
      const Real offset = w_[f] * (row.query[f] - key_[row.nearest * features + f]);
      row.nearest_score += kHalfLog2E * (offset * offset);
    }
    return row;
  }

  // Gradients of the row's query, and what it adds to those of w (null where not wanted), from those of its results.
  KeyParts differentiate(const Row& row, const double* grad, double grad_lse, Real* grad_query, Real* grad_w) const {
    const int64_t features = problem_.features, channels = problem_.channels;
    const size_t count = row.keys.size();
    KeyParts parts{row.weight, std::vector<Real>(count, 0), std::vector<Real>(count, 0)};
    const auto base = [&](int64_t f) { return row.query[f] - key_[row.nearest * features + f]; };
    for (int64_t f = 0; f < features; ++f) {
      if (grad_query) grad_query[f] = grad_lse * base(f);
      if (grad_w) grad_w[f] = grad_lse * base(f) * base(f);
    }
    for (size_t i = 0; i < count; ++i) {
      const int64_t j = row.keys[i];
      if (kind_[j] == kCounts && row.weight[i] == 0 && !column_.empty()) continue;
      Real pull = 0;
      for (int64_t c = 0; c < channels; ++c) pull += grad[c] * (value_[j * channels + c] - row.mean[c]);
      pull += grad_lse;
      if (kind_[j] == kLeftOut) {
        // It may lie nearer than all that count by any measure: sums of several rows stay finite.
        constexpr Real kMost = std::numeric_limits<Real>::max() / 0x1p64L;
        const Real grad_weight = std::exp2(std::fmin(row.relative[i] - row.top, Real(12000))) / row.total * pull;
        parts.weight[i] = std::isnan(pull) ? pull : std::fmin(std::fmax(grad_weight, -kMost), kMost);
        continue;
      }
      parts.score[i] = row.weight[i] * pull;
      parts.weight[i] = parts.score[i] / weight_[j];
      if (parts.score[i] == 0) continue;
      for (int64_t f = 0; f < features; ++f) {
        const Real step = static_cast<Real>(key_[row.nearest * features + f]) - key_[j * features + f];
        if (grad_query) grad_query[f] += parts.score[i] * step;
        if (grad_w) grad_w[f] += parts.score[i] * step * (base(f) + (row.query[f] - key_[j * features + f]));
      }
    }
    for (int64_t f = 0; f < features; ++f) {
      if (grad_query) grad_query[f] *= -static_cast<Real>(w_[f]) * w_[f];
      if (grad_w) grad_w[f] *= -static_cast<Real>(w_[f]);
    }
    return parts;
  }

  // The derivative of the score of key j by its coordinate.
  Real score_by_key(const Row& row, int64_t j, int64_t f) const {
    return static_cast<Real>(w_[f]) * w_[f] * (row.query[f] - key_[j * problem_.features + f]);
  }

 private:
  enum Kind : char { kCounts, kLeftOut, kAway, kNaN };

  static constexpr double kMostCoordinate = 0x1p1020;
  // Differences of squared distances beyond which a weight is 0 in double: 1100 / kHalfLog2E, and as much as the
  // weights of keys may differ by.
  static constexpr double kNegligible = 1600, kNegligibleWeighted = 6000;

  bool matters(int64_t j, int64_t own) const { return j != own && (kind_[j] == kCounts || kind_[j] == kLeftOut); }

  // The keys that may matter to a row, and the nearest of those that count.
  void choose_keys(const std::vector<double>& query, int64_t own, Row& row) const {
    const int64_t n = problem_.keys, features = problem_.features;
    bool small = !column_.empty();
    for (int64_t f = 0; f < features; ++f) small &= std::fabs(query[f]) < kMostCoordinate;
    std::vector<double> distance(small ? n : 0);
    double least = INFINITY;
    for (int64_t f = 0; small && f < features; ++f) {
      const double *const column = &column_[f * n], x = query[f], w = w_[f];
      for (int64_t j = 0; j < n; ++j) {
        const double offset = w * (x - column[j]);
        distance[j] += offset * offset;
      }
    }
    for (int64_t j = 0; small && j < n; ++j) {
      if (distance[j] < least && kind_[j] == kCounts && j != own) least = distance[j];
    }
    const double slack = least * (static_cast<double>(features + 8) * 0x1p-51);
    const double tied = least + slack + 0x1p-900;
    const double bound = least + slack + (problem_.key_weight.data ? kNegligibleWeighted : kNegligible);
    for (int64_t j = 0; j < n; ++j) {
      if (!matters(j, own) || (small && distance[j] > bound)) continue;
      row.keys.push_back(j);
      if (kind_[j] != kCounts || (small && distance[j] > tied)) continue;
      if (!row.counts || relative_score(row, j) > 0) set_nearest(row, j);
    }
  }

  Kind kind_of(int64_t j) const {
    const int64_t features = problem_.features, channels = problem_.channels;
    bool finite = true, nan = false, away = false;
    for (int64_t f = 0; f < features; ++f) {
      const double k = key_[j * features + f];
      nan |= std::isnan(k) || (std::isinf(k) && w_[f] == 0);
      away |= std::isinf(k);
    }
    if (weight_[j] == 0) {  // kAway: nothing of it counts, its weight's gradient included
      for (int64_t c = 0; c < channels; ++c) finite &= std::isfinite(value_[j * channels + c]);
      return nan || away || !finite ? kAway : kLeftOut;
    }
    if (nan || !(weight_[j] > 0 && weight_[j] < INFINITY)) return kNaN;
    return away ? kAway : kCounts;
  }

  void set_nearest(Row& row, int64_t j) const {
    const int64_t features = problem_.features;
    row.nearest = j;
    row.counts = true;
    row.mirrored.resize(features);
    row.rest.resize(features);
    for (int64_t f = 0; f < features; ++f) {
      const Real twice = 2 * row.query[f], a = key_[j * features + f];
      const Real difference = twice - a, part = difference - twice;
      row.mirrored[f] = difference;
      row.rest[f] = (twice - (difference - part)) - (a + part);
    }
  }

  // t_j - t*.
  Real relative_score(const Row& row, int64_t j) const {
    const int64_t features = problem_.features;
    const double *const a = &key_[row.nearest * features], *const k = &key_[j * features];
    Real sum = 0;
    for (int64_t f = 0; f < features; ++f) {
      sum += w_[f] * (static_cast<Real>(k[f]) - a[f]) * (w_[f] * ((row.mirrored[f] - k[f]) + row.rest[f]));
    }
    return kHalfLog2E * sum;
  }

  const Problem& problem_;
  int64_t b_;
  std::vector<double> w_, key_, value_, weight_;
  std::vector<double> column_;  // (features, keys) coordinates, where their differences are numbers
  int64_t broken_ = 0;          // keys that make rows NaN
  std::vector<Kind> kind_;
};

}  // namespace nwfast
