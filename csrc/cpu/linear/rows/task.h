// What all ways of summing rows have in common, and how a key that a row leaves out is taken from its sums.

#pragma once

#include "rows.h"

namespace nwfast {
namespace linear {

constexpr int64_t kEvaluated = 512;               // rows whose results are written together
constexpr int64_t kPaddedRows = kEvaluated + 32;  // kernels write up to 32 rows at a time

template <typename R>
struct RowTask {
  const Data<R>& data;
  const Plan& plan;
  const RowFinish& finish;
  const int columns, slots;
  const LinearKernels<R>& table;

  RowTask(const Data<R>& from, const Plan& by, const RowFinish& to)
      : data(from), plan(by), finish(to), columns(from.channels + 1), slots(by.orders), table(linear_kernels<R>()) {}

  auto loader() const {
    return [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { data.load(begin, n, charge, pitch); };
  }

  // Whether a key's charge is more than those of the keys beside it together. Where it is not, a sum without it that is
  // small beside it is one of terms that cancel, which no other way of adding them makes better.
  bool stands_out(int64_t j, int c) const {
    constexpr int64_t kBeside = 4;
    const double own = std::fabs(data.weight_of(j) * data.value_of(j, c));
    double beside = 0;
    for (int64_t k = std::max<int64_t>(0, j - kBeside); k <= j + kBeside && k < data.keys; ++k) {
      const bool near = std::fabs(static_cast<double>(data.key[k]) - data.key[j]) * plan.scale <= 0.5;
      if (k != j && near) beside += std::fabs(data.weight_of(k) * data.value_of(k, c));
    }
    return !(beside >= own);
  }

  // Takes keys that are the queries themselves out of their sums; `own` (columns, kEvaluated) is room for their
  // charges.
  void subtract_equal(int64_t begin, int64_t end, double* sums, double* own) const {
    const int64_t n = end - begin;
    data.load(begin, n, own, kEvaluated);
    for (int64_t i = 0; i < n; ++i) {
      const double left = sums[i] - own[i];
      sums[i] = left >= 1e-3 * own[i] ? left : -1;
    }
    for (int c = 0; c < data.channels; ++c) {
      double* const column = sums + (c + 1) * kPaddedRows;
      const double* const taken = own + (c + 1) * kEvaluated;
      const auto small = [&](int64_t i) { return kMostOwnValue * std::fabs(column[i]) < std::fabs(taken[i]); };
      int64_t any = 0;
      for (int64_t i = 0; i < n; ++i) {
        column[i] -= taken[i];
        any |= small(i) ? 1 : 0;
      }
      for (int64_t i = 0; any && i < n; ++i) {
        if (small(i) && stands_out(begin + i, c)) sums[i] = -1;
      }
    }
  }

  // Whether sums that the excluded key was taken out of, whose share of the total was `own`, are not small beside that.
  bool keeps_digits(int64_t i, double own, const double* sums, int64_t pitch) const {
    bool keeps = sums[0] >= 1e-3 * own;
    const int64_t j = data.excluded(i);
    for (int c = 0; j >= 0 && c < data.channels; ++c) {
      keeps &=
          kMostOwnValue * std::fabs(sums[(c + 1) * pitch]) >= own * std::fabs(data.value_of(j, c)) || !stands_out(j, c);
    }
    return keeps;
  }

  // Takes the excluded key out of sums that are relative to x - apart; returns its share of the total.
  double subtract_own(int64_t i, double apart, double* sums, int64_t pitch) const {
    const int64_t j = data.excluded(i);
    if (j < 0) return 0;
    const double x = data.query[i], u = data.key[j];
    if (x == u && apart == 0) {
      const double charge = data.weight_of(j);
      sums[0] -= charge;
      for (int c = 0; c < data.channels; ++c) sums[(c + 1) * pitch] -= charge * data.value_of(j, c);
      return charge;
    }
    const double offset = (x - apart) - u, score = score_of(x, x - apart, u);
    const double weight = std::exp(-std::fmin(1400.0, std::fmax(-1400.0, score * plan.scale * plan.scale)) / 2);
    for (int column = 0; column < columns; ++column) {
      const double charge = weight * data.weight_of(j) * (column ? data.value_of(j, column - 1) : 1);
      int slot = 0;
      sums[(slot++ * columns + column) * pitch] -= charge;
      if (plan.offsets) sums[(slot++ * columns + column) * pitch] -= charge * offset;
      if (plan.scores) sums[(slot++ * columns + column) * pitch] -= charge * score;
    }
    return weight * data.weight_of(j);
  }
};

}  // namespace linear
}  // namespace nwfast
