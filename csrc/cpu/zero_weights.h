// Keys that a weight of 0 leaves out must not matter, whatever they hold: NaN, infinities, a sentinel far away.
//
// Where there are any, drivers get copies of keys and values in which those keys carry the coordinates and the value of
// a kept key of the same batch element: they lie no nearer than the nearest key that counts, and their extremes set no
// scale. Their gradients are written afterwards. Copies are as large as keys, values and weights need by their own
// batch dimensions: what is broadcast stays so.

#pragma once

#include <algorithm>
#include <vector>

#include "problem.h"

namespace nwfast {

// A copy of rows (keys or values), contiguous in the dimensions that it moves along.
template <typename S>
class RowCopy {
 public:
  // Left-out rows get those of the first kept row, or 0 where none is kept; with `own`, only where they are not finite.
  void copy(const Problem& problem, const View& rows, int64_t columns, bool own) {
    const View& weights = problem.key_weight;
    const int64_t n = problem.keys;
    View moved;  // offsets of the elements that differ, in rows of the copy
    int64_t count = 1;
    view_ = rows;
    for (int dim = problem.batch.rank - 1; dim >= 0; --dim) {
      const bool moves = rows.batch_strides[dim] != 0 || weights.batch_strides[dim] != 0;
      moved.batch_strides[dim] = moves ? count : 0;
      view_.batch_strides[dim] = moves ? count * n * columns : 0;
      if (moves) count *= problem.batch.sizes[dim];
    }
    data_.allocate(count * n * columns);
    std::vector<char> done(static_cast<size_t>(count));
    Buffer<double> weight(n);
    for (int64_t b = 0; b < problem.batch.count; ++b) {
      const int64_t place = moved.offset(problem.batch, b);
      if (done[place]) continue;
      done[place] = true;
      read(weights, weights.offset(problem.batch, b), n, weights.row_stride, weight.get());
      S* const to = data_.get() + place * n * columns;
      const int64_t from = rows.offset(problem.batch, b);
      for (int64_t c = 0; c < columns; ++c) {
        copy_column(static_cast<const S*>(rows.data) + from + c * rows.column_stride, rows.row_stride, weight.get(), n,
                    own, to + c, columns);
      }
    }
    view_.data = data_.get();
    view_.row_stride = columns;
    view_.column_stride = 1;
  }
  const View& view() const { return view_; }

 private:
  static void copy_column(const S* from, int64_t stride, const double* weight, int64_t n, bool own, S* to,
                          int64_t columns) {
    S anchor = S(0);
    for (int64_t j = 0; j < n; ++j) {
      if (weight[j] == 0) continue;
      anchor = from[j * stride];
      break;
    }
    for (int64_t j = 0; j < n; ++j) {
      const S x = from[j * stride];
      to[j * columns] = weight[j] != 0 || (own && std::isfinite(static_cast<double>(x))) ? x : anchor;
    }
  }

  Buffer<S> data_;
  View view_;
};

// Whether any key is left out, in any batch element.
inline bool leaves_out(const Problem& problem) {
  const View& weights = problem.key_weight;
  if (!weights.data) return false;
  bool moves = false;
  for (int dim = 0; dim < problem.batch.rank; ++dim) moves |= weights.batch_strides[dim] != 0;
  constexpr int64_t kPart = 512;
  float part[kPart];
  for (int64_t b = 0; b < (moves ? problem.batch.count : 1); ++b) {
    for (int64_t first = 0; first < problem.keys; first += kPart) {
      const int64_t n = std::min(kPart, problem.keys - first);
      read(weights, weights.offset(problem.batch, b) + first * weights.row_stride, n, weights.row_stride, part);
      bool found = false;
      for (int64_t i = 0; i < n; ++i) found |= part[i] == 0;
      if (found) return true;
    }
  }
  return false;
}

// The same problem without what left-out keys hold.
class WithoutLeftOut {
 public:
  // own: left-out keys keep what they hold, as far as it is finite. That is what the gradient of their weight is by.
  WithoutLeftOut(const Problem& problem, bool own) : problem_(problem) {
    if (!leaves_out(problem)) return;
    switch (problem.key.dtype) {
      case Dtype::kFloat:
        replace(float_, own);
        break;
      case Dtype::kDouble:
        replace(double_, own);
        break;
      case Dtype::kHalf:
        replace(half_, own);
        break;
      case Dtype::kBFloat16:
        replace(bfloat16_, own);
        break;
    }
  }
  WithoutLeftOut(const WithoutLeftOut&) = delete;
  WithoutLeftOut& operator=(const WithoutLeftOut&) = delete;

  bool any() const { return any_; }
  const Problem& problem() const { return problem_; }

 private:
  template <typename S>
  struct Copies {
    RowCopy<S> key, value;
  };
  template <typename S>
  void replace(Copies<S>& copies, bool own) {
    any_ = true;
    copies.key.copy(problem_, problem_.key, problem_.features, own);
    copies.value.copy(problem_, problem_.value, problem_.channels, own);
    problem_.key = copies.key.view();
    problem_.value = copies.value.view();
  }

  Problem problem_;
  bool any_ = false;
  Copies<float> float_;
  Copies<double> double_;
  Copies<torch::headeronly::Half> half_;
  Copies<torch::headeronly::BFloat16> bfloat16_;
};

// The gradients of left-out keys: 0 for key and value; that of the weight as given, but finite, and 0 where the key
// holds anything that is not.
template <typename T>
void settle_left_out(const Problem& problem, const BackwardTask<T>& task, const T* grad_key_weight) {
  const int64_t n = problem.keys, features = problem.features, channels = problem.channels;
  Buffer<double> weight(n), row(std::max(features, channels));
  constexpr T most = std::numeric_limits<T>::max();
  const auto finite = [&](const View& view, int64_t b, int64_t j, int64_t columns) {
    read(view, view.offset(problem.batch, b) + j * view.row_stride, columns, view.column_stride, row.get());
    bool all = true;
    for (int64_t c = 0; c < columns; ++c) all &= std::isfinite(row[c]);
    return all;
  };
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    read(problem.key_weight, problem.key_weight.offset(problem.batch, b), n, problem.key_weight.row_stride,
         weight.get());
    for (int64_t j = 0; j < n; ++j) {
      if (weight[j] != 0) continue;
      const int64_t place = b * n + j;
      if (task.grad_key) std::fill_n(task.grad_key + place * features, features, T(0));
      if (task.grad_value) std::fill_n(task.grad_value + place * channels, channels, T(0));
      if (!task.grad_key_weight) continue;
      T gradient = grad_key_weight[place];
      if (!finite(problem.key, b, j, features) || !finite(problem.value, b, j, channels)) {
        gradient = 0;
      } else if (std::isinf(gradient)) {  // kept finite: a mask that the caller multiplies it by is 0 there
        gradient = std::copysign(most, gradient);
      }
      task.grad_key_weight[place] = gradient;
    }
  }
}

}  // namespace nwfast
