// Which rows products serve: how far off their scores are, from norms.
//
// A score by products is s = 2 x.u + charge, in base 2, with x and u about the centre of the keys. Each of its
// additions rounds a partial sum p: by a share uniform within half a spacing of floats, of standard deviation kRounding
// 2^-24 |p| on the average over mantissas. So the variance of x.u is (kRounding 2^-24)^2 V, with V the sum of p^2 over
// all partial sums (those of kProductDepth features, then those of such sums, then that with the charge). With u = a x
// + r, r orthogonal to x, it has two parts:
//
//   along:  a^2 V(x, x) = (x.u)^2 V(x, x) / |x|^4. Terms of one sign, n of them with q = sum x_f^2, give
//           n (q^2 + 2 sum x_f^4) / 3; exact where all are alike or where one is all and comes first.
//   across: V(x, r). Terms of independent signs give the sum of x_f^2 u_f^2 times the partial sums that f is in, with
//           the mean of u_f^2 over keys; times what a sample of keys finds V(x, r) to be larger by (features may
//           correlate).
//
// Rounding the coordinates of x and u adds 2 d.(e x) each, d = x - u: of variance (kRounding 2^-24)^2 4 S sum x_f^4 /
// |x|^2 where S = |d|^2 is spread over features as |x|^2 is.
//
// What matters to a row are keys whose S is about that of its nearest. For these |u| <= |x| + sqrt(S) and
// 2 x.u = |x|^2 + |u|^2 - S. Differences, as the textbook takes them, are off by a share of S, and results may be off
// by some roundings more: a row is served where the standard deviation is at most kAllowed + S, both in natural
// logarithms and 2^-24. Results are means over keys, which are off by less than their scores.

#pragma once

#include <algorithm>
#include <cmath>

#include "../../problem.h"
#include "tasks.h"

namespace nwfast {

// What is known of a packed row.
struct RowTrust {
  double square;     // |x|^2
  double along;      // V(x, x) / |x|^4
  double across;     // V(x, r)
  double roundness;  // sum x_f^4 / |x|^2
};

class Trust {
 public:
  // From the packed keys, their |u|^2 and the median of these.
  void prepare(const ProductData& data, const double* square, double median) {
    features_ = data.features;
    // Keys much further out than most matter to no row but those that are far out themselves.
    const double plain = kPlain * median;
    reach_ = 0;
    limit_ = INFINITY;
    double total = 0, charge = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < data.n; ++j) {
      if (!(square[j] <= plain)) {
        limit_ = plain;
        continue;
      }
      reach_ = std::fmax(reach_, square[j]);
      total += square[j];
      charge = std::fmax(charge, std::fabs(median - square[j]));
      ++count;
    }
    charge_ = charge;
    relative_reach_ = total > 0 ? reach_ * static_cast<double>(count) / total : 1;
    weight_.allocate(features_);
    std::fill_n(weight_.get(), features_, 0.0);
    for (int64_t first = 0; first < data.n; first += kPanel) {
      double counts[kPanel] = {};
      for (int64_t j = first; j < std::min(data.n, first + kPanel); ++j) counts[j - first] = square[j] <= plain;
      for (int64_t f = 0; f < features_; ++f) {
        const float* const lane = data.key_lanes + first * features_ + f * kPanel;
        double sums[2] = {};
        for (int64_t i = 0; i < kPanel; ++i) {
          sums[i % 2] += counts[i] * (static_cast<double>(lane[i]) * static_cast<double>(lane[i]));
        }
        weight_[f] += sums[0] + sums[1];
      }
    }
    for (int64_t f = 0; f < features_; ++f) {
      weight_[f] *= sums_with(f) / static_cast<double>(std::max<int64_t>(count, 1));
    }
    correlation_ = 1;
    correlation_ = sampled(data);
  }

  RowTrust of_row(const float* x) const {
    RowTrust row{};
    double along = 0;
    for (int64_t block = 0; block < features_; block += kProductDepth) {
      const int64_t end = std::min(features_, block + kProductDepth);
      double square = 0, fourth = 0;
      for (int64_t f = block; f < end; ++f) {
        const double of = static_cast<double>(x[f]) * static_cast<double>(x[f]);
        square += of;
        fourth += of * of;
        row.across += weight_[f] * of;
      }
      row.square += square;
      row.roundness += fourth;
      along += static_cast<double>(end - block) * (square * square + 2 * fourth) / 3 + row.square * row.square;
    }
    row.across *= correlation_;
    row.along = row.square > 0 ? along / (row.square * row.square) : 0;
    row.roundness = row.square > 0 ? row.roundness / row.square : 0;
    return row;
  }

  // `score`: S of the nearest key.
  bool serves(const RowTrust& row, double score) const {
    const double s = std::fmax(score, 0), length = std::sqrt(row.square), furthest = length + std::sqrt(s);
    if (!(furthest * furthest <= limit_)) return false;
    double product = std::fmax((row.square + reach_ - s) / 2, (s - row.square) / 2);
    product = std::fmin(product, length * std::fmin(std::sqrt(reach_), furthest));
    const double variance =
        4 * (row.along * product * product + row.across * relative_reach_) + 8 * s * row.roundness + charge_ * charge_;
    return kRounding * std::sqrt(variance) <= kAllowed / kLn2 + s;
  }

 private:
  static constexpr double kRounding = 0.425;  // sqrt((1 / 3) (3 / 8) / ln 2)
  static constexpr double kAllowed = 4, kPlain = 16;

  static double key(const ProductData& data, int64_t j, int64_t f) {
    return static_cast<double>(data.key_lanes[(j / kPanel * data.features + f) * kPanel + j % kPanel]);
  }

  // The partial sums that a feature is in.
  double sums_with(int64_t f) const {
    const int64_t block = f / kProductDepth, end = std::min(features_, (block + 1) * kProductDepth);
    return static_cast<double>(end - f + (features_ + kProductDepth - 1) / kProductDepth - block);
  }

  // What V(x, r) is of what independent signs make it.
  double sampled(const ProductData& data) const {
    constexpr int64_t kRows = 8, kKeys = 16;
    const int64_t row_step = std::max<int64_t>(data.n / kRows, 1), key_step = std::max<int64_t>(data.n / kKeys, 1);
    Buffer<float> x(features_);
    double found = 0, expected = 0;
    for (int64_t i = 0; i < data.n; i += row_step) {
      for (int64_t f = 0; f < features_; ++f) x[f] = static_cast<float>(key(data, i, f));
      const RowTrust row = of_row(x.get());
      if (!(row.square <= limit_) || row.square == 0) continue;
      for (int64_t j = row_step / 2; j < data.n; j += key_step) {
        double inner = 0, square = 0;
        for (int64_t f = 0; f < features_; ++f) {
          const double u = key(data, j, f);
          inner += static_cast<double>(x[f]) * u;
          square += u * u;
        }
        if (!(square <= limit_)) continue;
        const double a = inner / row.square;
        double all = 0, part = 0;
        for (int64_t f = 0; f < features_; ++f) {
          if (f % kProductDepth == 0) {
            all += part;
            found += all * all;
            part = 0;
          }
          const double of = static_cast<double>(x[f]);
          part += of * (key(data, j, f) - a * of);
          found += part * part;
        }
        expected += row.across;
      }
    }
    return expected > 0 ? std::fmax(1, found / expected) : 1;
  }

  int64_t features_ = 0;
  double reach_ = 0;           // the largest |u|^2 of plain keys
  double relative_reach_ = 1;  // relative to their mean
  double limit_ = INFINITY;    // of |u|^2 where some are beyond
  double charge_ = 0;          // the largest charge of plain keys
  double correlation_ = 1;
  Buffer<double> weight_;
};

}  // namespace nwfast
