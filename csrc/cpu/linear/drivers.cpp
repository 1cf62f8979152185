// Drivers of the linear method: the forward pass, and the query side of the backward pass.

#include "element.h"
#include "row_gradients.h"

namespace nwfast {
namespace linear {
namespace {

template <typename R>
bool forward_element(const Problem& problem, const BatchData<R>& batch, const ForwardResult<R>& result, int64_t b,
                     bool serial) {
  Element<R> element;
  if (!element.prepare(batch, b, result.tangent_q, result.tangent_w, serial)) return false;
  const Data<R>& data = element.data;
  const int64_t base = b * problem.queries;
  const int channels = data.channels;
  if (data.keys == 0) {
    for (int64_t i = 0; i < problem.queries; ++i) empty_row(result, channels, base + i, -INFINITY, 0);
  } else {
    forward_rows(element, result, base, serial);
  }
  finish_odd_rows(data, result, base);
  return true;
}

template <typename R>
bool query_element(const Problem& problem, const BatchData<R>& batch, const BackwardTask<R>& task, int64_t b,
                   bool serial) {
  Element<R> element;
  if (!element.prepare(batch, b, task.grad_query, task.grad_w, serial)) return false;
  const Data<R>& data = element.data;
  const RowGradients<R> gradients(problem, task, b, data);
  // Rows that add nothing, by their number in the caller's order.
  std::vector<char> idle(data.infinite_rows.empty() && data.nan_rows.empty() ? 0 : data.queries);
  for (const int64_t row : data.infinite_rows) idle[row] = 1;
  for (int64_t i = 0; !data.nan_rows.empty() && i < data.queries; ++i) {
    if (!gradients.counts(i)) idle[data.original_row(i)] = 1;
  }
  for (const int64_t row : data.nan_rows) {
    if (!idle[row]) return false;
  }
  const int64_t base = b * problem.queries;
  if (data.keys == 0) {
    for (int64_t i = 0; task.grad_query && i < problem.queries; ++i) task.grad_query[base + i] = 0;
    return true;
  }
  const double w = data.w;
  const int channels = data.channels;
  const int64_t grad = task.grad_out.offset(problem.batch, b);
  const int64_t grad_lse = task.grad_lse.data ? task.grad_lse.offset(problem.batch, b) : 0;
  // What each row adds to the gradient of w, summed in the order of rows.
  Buffer<double> partial(task.grad_w ? data.queries : 0);
  const auto row_gradient = [&](int64_t i, const RowSums& sums) {
    const int64_t original = data.original_row(i);
    const double total = !idle.empty() && idle[original] ? 0 : sums.total();
    double by_w = 0, by_query = 0;
    for (int c = 0; total > 0 && c < channels; ++c) {
      double g = 0;
      read(task.grad_out, grad + original * task.grad_out.row_stride + c * task.grad_out.column_stride, 1, 0, &g);
      const double mean = sums.value(c) / total;
      if (task.grad_w) by_w -= g * w * ((sums.score(c + 1) - mean * sums.score(0)) / total);
      if (task.grad_query) by_query -= g * w * (w * sums.offset_covariance(c));
    }
    if (total > 0 && task.grad_lse.data) {
      double g = 0;
      read(task.grad_lse, grad_lse + original * task.grad_lse.row_stride, 1, 0, &g);
      if (task.grad_w) by_w -= g * w * (sums.score(0) / total + sums.apart * sums.apart);
      if (task.grad_query) by_query -= g * w * (w * (sums.offset(0) / total + sums.apart));
    }
    if (task.grad_query) task.grad_query[base + original] = static_cast<R>(by_query);
    if (task.grad_w) partial[i] = by_w;
  };
  element.rows(serial, [&](int64_t first, int64_t n, const double* sums, int64_t pitch, const double* apart) {
    for (int64_t k = 0; k < n; ++k) {
      row_gradient(first + k, RowSums(element.plan, channels, sums + k, pitch, apart ? apart[k] : 0));
    }
  });
  if (task.grad_w) {
    double sum = 0;
    for (int64_t i = 0; i < data.queries; ++i) sum += partial[i];
    task.grad_w[b] = sum;
  }
  return true;
}

}  // namespace

}  // namespace linear

template <typename T>
bool linear_forward(const Problem& problem, const ForwardResult<T>& result) {
  const linear::BatchData<T> batch(problem);
  return linear::over_batch(
      problem, [&](int64_t b, bool serial) { return linear::forward_element(problem, batch, result, b, serial); });
}
template bool linear_forward<float>(const Problem&, const ForwardResult<float>&);
template bool linear_forward<double>(const Problem&, const ForwardResult<double>&);

template <typename T>
bool linear_query_backward(const Problem& problem, const BackwardTask<T>& task) {
  const linear::BatchData<T> batch(problem);
  return linear::over_batch(
      problem, [&](int64_t b, bool serial) { return linear::query_element(problem, batch, task, b, serial); });
}
template bool linear_query_backward<float>(const Problem&, const BackwardTask<float>&);
template bool linear_query_backward<double>(const Problem&, const BackwardTask<double>&);

}  // namespace nwfast
