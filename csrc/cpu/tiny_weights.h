// Weights so small that a row's total has no normal number (float64 alone): where the largest of a batch element is
// below 2^-960, drivers get a copy of its weights that is a power of two larger. Only lse and the gradients of weights
// depend on the unit of the weights, and they are brought back to it; a state stays in the unit of the copy, which
// the backward pass makes in the same way.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "problem.h"

namespace nwfast {

class TinyWeights {
 public:
  // Puts the copy into the problem, where there is to be one. It must live as long as the problem; it may move.
  void rescale(Problem& problem) {
    View& weights = problem.key_weight;
    if (!weights.data || weights.dtype != Dtype::kDouble) return;
    const int64_t n = problem.keys;
    std::vector<double> row(static_cast<size_t>(n));
    for (int64_t b = 0; b < problem.batch.count; ++b) {
      read(weights, weights.offset(problem.batch, b), n, weights.row_stride, row.data());
      double largest = 0;
      for (const double weight : row) largest = std::fmax(largest, weight);
      if (!(largest > 0 && largest < kLeast)) continue;
      if (exponents_.empty()) copy(problem);
      exponents_[static_cast<size_t>(b)] = std::ilogb(largest);
    }
    if (exponents_.empty()) return;
    for (int64_t b = 0; b < problem.batch.count; ++b) {
      double* const first = copy_.data() + b * n;
      for (int64_t j = 0; j < n; ++j) first[j] = std::ldexp(first[j], -exponents_[static_cast<size_t>(b)]);
    }
    weights.data = copy_.data();
    weights.row_stride = 1;
    for (int64_t dim = problem.batch.rank - 1, stride = n; dim >= 0; --dim) {
      weights.batch_strides[dim] = stride;
      stride *= problem.batch.sizes[dim];
    }
  }
  // The weights of a batch element are those of the copy times two to this power.
  int exponent(int64_t b) const { return exponents_.empty() ? 0 : exponents_[static_cast<size_t>(b)]; }

  // lse (B, rows) by the copy becomes that by the weights themselves.
  template <typename T>
  void restore_lse(T* lse, int64_t rows) const {
    each(lse, rows, [](T& x, int exponent) { x = static_cast<T>(x + exponent * kLn2); });
  }
  // The gradients of the weights (B, rows), likewise; finite ones stay so.
  template <typename T>
  void restore_gradients(T* grad_key_weight, int64_t rows) const {
    each(grad_key_weight, rows, [](T& x, int exponent) {
      constexpr double kMost = std::numeric_limits<T>::max();
      if (std::isfinite(x)) x = static_cast<T>(std::clamp<double>(std::ldexp(x, -exponent), -kMost, kMost));
    });
  }

 private:
  static constexpr double kLeast = 0x1p-960;

  void copy(const Problem& problem) {
    const int64_t n = problem.keys;
    exponents_.resize(static_cast<size_t>(problem.batch.count));
    copy_.resize(static_cast<size_t>(problem.batch.count * n));
    for (int64_t b = 0; b < problem.batch.count; ++b) {
      read(problem.key_weight, problem.key_weight.offset(problem.batch, b), n, problem.key_weight.row_stride,
           copy_.data() + b * n);
    }
  }
  template <typename T, typename Restore>
  void each(T* results, int64_t rows, const Restore& restore) const {
    for (size_t b = 0; results && b < exponents_.size(); ++b) {
      for (int64_t i = 0; i < rows; ++i) restore(results[static_cast<int64_t>(b) * rows + i], exponents_[b]);
    }
  }

  std::vector<int> exponents_;  // by batch element; empty where there is no copy
  std::vector<double> copy_;    // (B, N)
};

}  // namespace nwfast
