// Derivatives of a row's averages from the sums of an expansion and their derivatives by the place in a box.
//
// With S and N the total of a row and its sum for a channel, out = N / S and d out / d x = (dN / dx - out dS / dx) / S.
// By w, since z^2 K = d^2 K / dz^2 + K for the kernel K, d out / d w = -(d^2 N / dz^2 - out d^2 S / dz^2) / (w S) with
// z in bandwidths. Where all distances along a feature are small beside the bandwidth, the second derivative is -1 but
// for little: there sum c (s - t)^2 K is what the first derivatives of two sums differ by, that of charges c times s
// and that of charges c t, with places t of the keys.

#pragma once

#include "element.h"
#include "translation.h"

namespace nwfast {
namespace grid {

constexpr double kFlatHalf = 0.5;  // half width of an axis of one cell, in bandwidths, below which distances are small

// The columns that an expansion needs for them, (slots, columns) of a row as GridEvaluate has them.
template <typename R>
class Derivatives {
 public:
  int columns = 0, order = 0;

  // After the element is prepared. order: 1 for derivatives of queries, 2 for those of w as well, 0 for none.
  Derivatives(const Element<R>& element, int order_wanted) : element_(element) {
    channels_ = static_cast<int>(element.sorted.channels);
    columns = channels_ + 1;
    order = std::min(order_wanted, 1);
    for (int a = 0; a < kAxes && order_wanted == 2; ++a) {
      const Axis& axis = element.plan.axis[a];
      if (axis.feature < 0) continue;
      if (axis.single && axis.half < kFlatHalf) {
        flat_column_[a] = columns;
        columns += channels_ + 1;
      } else {
        order = 2;
      }
    }
  }

  int slots() const { return order == 0 ? 1 : order == 1 ? 4 : 7; }

  // Charges (columns, pitch) of keys.
  void load(int64_t begin, int64_t n, double* charge, int64_t pitch) const {
    element_.load(begin, n, charge, pitch);
    for (int a = 0; a < kAxes; ++a) {
      if (flat_column_[a] == 0) continue;
      for (int64_t j = 0; j < n; ++j) {
        const double t = place(element_.plan.axis[a], element_.keys.axis(element_.plan, a)[begin + j]);
        for (int c = 0; c <= channels_; ++c) charge[(flat_column_[a] + c) * pitch + j] = charge[c * pitch + j] * t;
      }
    }
  }

  // Of the sum of a column (0 for the total) by the query along an axis, of which the row's quotient is made.
  double first(int a, const double* row, int64_t c) const { return row[(1 + a) * columns + c]; }
  // sum c z^2 K; with channels less what cancels in the difference of two of them.
  double squares(int a, const double* row, int64_t c, int64_t i) const {
    const Axis& axis = element_.plan.axis[a];
    if (!flat_column_[a]) return row[(4 + a) * columns + c] / (axis.half * axis.half);
    return first(a, row, flat_column_[a] + c) -
           place(axis, element_.queries.axis(element_.plan, a)[i]) * first(a, row, c);
  }
  // What `squares` leaves out of the total.
  double left_out(int a, const double* row) const { return flat_column_[a] ? 0 : row[0]; }

  // d out_c / d q and d out_c / d w, of the channels from 1 on, by the feature of an axis.
  double by_query(int a, const double* row, int64_t c) const {
    const double mean = row[c] / row[0];
    return (first(a, row, c) - mean * first(a, row, 0)) / row[0] * element_.plan.axis[a].to_local();
  }
  double by_w(int a, const double* row, int64_t c, int64_t i) const {
    const double mean = row[c] / row[0];
    return -((squares(a, row, c, i) - mean * squares(a, row, 0, i)) / row[0]) /
           element_.w(element_.plan.axis[a].feature);
  }

 private:
  static double place(const Axis& axis, R x) { return (static_cast<double>(x) - axis.middle) * axis.to_local(); }

  const Element<R>& element_;
  int channels_ = 0;
  int flat_column_[kAxes] = {};  // the first column of charges times places along an axis, 0 for none
};

// use(i, row) for the queries i of some boxes that are wanted(i) and whose sums, without their own keys, are good
// enough: row (slots, columns) as GridEvaluate has them.
template <typename R, typename Wanted, typename Use>
void expand_queries(Element<R>& element, const Derivatives<R>& derivatives, std::vector<int64_t> boxes, bool serial,
                    const Wanted& wanted, const Use& use) {
  fill_matrices(element.plan);
  const double tail = Plan::beyond(element.plan.radius) * element.mass;
  const int columns = derivatives.columns, order = derivatives.order, slots = derivatives.slots();
  Expansion<R> expansion{
      element.plan,
      element.keys,
      element.queries,
      std::move(boxes),
      columns,
      order,
      [&](int64_t begin, int64_t n, double* charge, int64_t pitch) { derivatives.load(begin, n, charge, pitch); },
      [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound) {
        const double error = error_of(element.plan, bound) + tail;
        std::vector<double> row(slots * columns), own(columns);
        for (int64_t k = 0; k < n; ++k) {
          const int64_t i = begin + k;
          if (!wanted(i)) continue;
          for (int s = 0; s < slots * columns; ++s) row[s] = sums[s * pitch + k];
          if (element.sorted.exclude_self) {
            derivatives.load(element.own[i], 1, own.data(), 1);
            if (!element.subtract_own(i, own.data(), columns, order, row.data())) continue;
          }
          if (row[0] * Accuracy<R>::kAccept >= error) use(i, row.data());
        }
      }};
  expansion.run(serial);
}

}  // namespace grid
}  // namespace nwfast
