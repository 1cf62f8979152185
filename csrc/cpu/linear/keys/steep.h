// Gradients of the weights of left-out keys that rows have nearer than any key that counts: exp(.) of such a pair
// relative to the row's total grows without bound, and so does the gradient. Pairs are added up with a common factor
// kept as its logarithm, and what is beyond the largest finite number is that number.

#pragma once

#include "../nearest.h"
#include "../row_gradients.h"

namespace nwfast {
namespace linear {

// A far row: its place, and the key that its total is relative to.
struct Referred {
  int64_t row;
  double reference;
};

template <typename R>
class SteepRows {
 public:
  SteepRows(const RowGradients<R>& gradients, const Data<R>& data, const Plan& plan)
      : gradients_(gradients), data_(data), plan_(plan) {}

  // Takes all far rows, in ascending order.
  void find(std::vector<Referred> rows) {
    rows_ = std::move(rows);
    const size_t n = rows_.size();
    x_.resize(n);
    low_.assign(n + 1, INFINITY);
    high_.assign(n + 1, -INFINITY);
    for (size_t k = 0; k < n; ++k) x_[k] = data_.query[rows_[k].row];
    for (size_t k = 0; k < n; ++k) high_[k + 1] = std::fmax(high_[k], x_[k] + radius(k));
    for (size_t k = n; k-- > 0;) low_[k] = std::fmin(low_[k + 1], x_[k] - radius(k));
  }

  // Whether the kernels for pairs do not hold what some row adds to a left-out key here.
  bool any(double u) const {
    const int64_t place = lower_bound(x_.data(), static_cast<int64_t>(x_.size()), u);  // rows from it on lie above
    return high_[place] > u || low_[place] < u;
  }

  // What far rows add to the gradient of the weight of a key at u with centred values (channels, pitch); row `leaving`
  // leaves the key out.
  double gradient(double u, const double* value, int64_t pitch, int64_t leaving) const {
    double sum = 0, top = -INFINITY;
    for (const Referred& far : rows_) {
      if (far.row == leaving) continue;
      const double score = score_of(data_.query[far.row], far.reference, u) * plan_.scale * plan_.scale / 2;
      const double exponent = -score - std::log(gradients_.total_of(far.row) / data_.weight_factor);
      double pulled = gradients_.lse_grad_of(far.row);
      for (int c = 0; c < data_.channels; ++c) {
        pulled += gradients_.grad_of(far.row, c) * (value[c * pitch] - gradients_.mean_of(far.row, c));
      }
      if (pulled == 0 || exponent == -INFINITY) continue;
      if (exponent > top) {
        sum = top == -INFINITY ? 0 : sum * std::exp(top - exponent);
        top = exponent;
      }
      const double weight = std::exp(exponent - top);
      if (weight > 0) sum += weight * pulled;
    }
    if (sum == 0) return 0;
    const double size = std::log(std::fabs(sum)) + top, largest = std::numeric_limits<double>::max();
    return std::copysign(size < std::log(largest) ? std::exp(size) : largest, sum);
  }

 private:
  static constexpr double kSteep = 300;  // log of a pair's share of its row's total, well within the range of double

  // How near a key has to be to a row.
  double radius(size_t k) const {
    const double distance = (x_[k] - rows_[k].reference) * plan_.scale;
    const double square = distance * distance - 2 * (kSteep + std::log(gradients_.total_of(rows_[k].row)));
    return square >= 0 ? std::sqrt(square) / plan_.scale * 1.0001 + std::fabs(x_[k]) * 1e-15 : -INFINITY;
  }

  const RowGradients<R>& gradients_;
  const Data<R>& data_;
  const Plan& plan_;
  std::vector<Referred> rows_;
  std::vector<double> x_, low_, high_;  // up to a row, and from it on
};

}  // namespace linear
}  // namespace nwfast
