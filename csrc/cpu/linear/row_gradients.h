// What the key side of the backward pass knows of a row: its gradients, output and total.

#pragma once

#include "data.h"

namespace nwfast {
namespace linear {

// Rows are numbered as in the data; outputs are centred.
template <typename R>
class RowGradients {
 public:
  RowGradients(const Problem& problem, const BackwardTask<R>& task, int64_t b, const Data<R>& data)
      : problem_(problem), task_(task), data_(data), b_(b) {}

  // Totals relative to the rows' references, and the shifts from those to the rows themselves; whether there is any.
  bool read_totals(int64_t begin, int64_t n, double* total, double* shift) const {
    const double* const state = task_.state + 2 * b_ * problem_.queries;
    if (data_.rows_moved) {
      for (int64_t k = 0; k < n; ++k) {
        const int64_t row = data_.original_row(begin + k);
        shift[k] = state[2 * row];
        total[k] = state[2 * row + 1];
      }
    } else {
      for (int64_t k = 0; k < n; ++k) shift[k] = state[2 * (begin + k)];
      for (int64_t k = 0; k < n; ++k) total[k] = state[2 * (begin + k) + 1];
    }
    int shifted = 0;
    for (int64_t k = 0; k < n; ++k) {
      total[k] *= data_.weight_factor;
      shifted |= shift[k] != 0;
    }
    for (int64_t k = 0; !data_.nan_rows.empty() && k < n; ++k) {
      if (!(total[k] >= 0) && !counts(begin + k)) total[k] = 0;
    }
    return shifted != 0;
  }

  // Whether any gradient of the row is not 0. A row whose gradients are adds nothing, whatever it holds.
  bool counts(int64_t i) const {
    bool any = lse_grad_of(i) != 0;
    for (int c = 0; c < data_.channels; ++c) any |= grad_of(i, c) != 0;
    return any;
  }

  void read_means(int64_t begin, int64_t n, int c, double* mean) const {
    const R* const out = task_.out + b_ * problem_.queries * data_.channels + c;
    const double centre = data_.centre[c];
    if (data_.channels == 1 && !data_.rows_moved) {
      for (int64_t k = 0; k < n; ++k) mean[k] = static_cast<double>(out[begin + k]) - centre;
    } else {
      for (int64_t k = 0; k < n; ++k) {
        mean[k] = static_cast<double>(out[data_.original_row(begin + k) * data_.channels]) - centre;
      }
    }
  }

  void read_grads(int64_t begin, int64_t n, int c, double* grad) const {
    read_rows_of(task_.grad_out, c * task_.grad_out.column_stride, begin, n, grad);
  }
  void read_lse_grads(int64_t begin, int64_t n, double* grad) const {
    if (task_.grad_lse.data) {
      read_rows_of(task_.grad_lse, 0, begin, n, grad);
    } else {
      std::fill(grad, grad + n, 0.0);
    }
  }

  // (g_i, <g_i, out_i - base> - lse_grad_i), not divided by the total; base is centred as outputs are.
  void charge_of(int64_t i, const double* base, double* charge) const {
    double sum = 0;
    for (int c = 0; c < data_.channels; ++c) {
      charge[c] = grad_of(i, c);
      sum += charge[c] * (mean_of(i, c) - (base ? base[c] : 0));
    }
    charge[data_.channels] = sum - lse_grad_of(i);
  }
  double mean_of(int64_t i, int c) const {
    const int64_t row = b_ * problem_.queries + data_.original_row(i);
    return static_cast<double>(task_.out[row * data_.channels + c]) - data_.centre[c];
  }
  double grad_of(int64_t i, int c) const {
    const int64_t original = data_.original_row(i);
    double g = 0;
    read(task_.grad_out,
         task_.grad_out.offset(problem_.batch, b_) + original * task_.grad_out.row_stride +
             c * task_.grad_out.column_stride,
         1, 0, &g);
    return g;
  }
  double lse_grad_of(int64_t i) const {
    if (!task_.grad_lse.data) return 0;
    double g = 0;
    read(task_.grad_lse, task_.grad_lse.offset(problem_.batch, b_) + data_.original_row(i) * task_.grad_lse.row_stride,
         1, 0, &g);
    return g;
  }

  // Whether the total is relative to the nearest key, and not to the row itself.
  bool shifted(int64_t i) const { return task_.state[2 * (b_ * problem_.queries + data_.original_row(i))] != 0; }
  double total_of(int64_t i) const {
    return task_.state[2 * (b_ * problem_.queries + data_.original_row(i)) + 1] * data_.weight_factor;
  }

 private:
  void read_rows_of(const View& view, int64_t offset, int64_t begin, int64_t n, double* out) const {
    offset += view.offset(problem_.batch, b_);
    if (data_.rows_moved) {
      gather(view, offset, data_.row_order + begin, n, view.row_stride, out);
    } else {
      read(view, offset + begin * view.row_stride, n, view.row_stride, out);
    }
  }

  const Problem& problem_;
  const BackwardTask<R>& task_;
  const Data<R>& data_;
  const int64_t b_;
};

}  // namespace linear
}  // namespace nwfast
