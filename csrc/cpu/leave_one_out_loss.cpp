// The operators nwfast::native_leave_one_out, native_fgt_leave_one_out and native_auto_leave_one_out: the squared
// leave-one-out residual of one channel and its derivative in w, one for each feature,
//
//   loss = sum_i a_i r_i^2 / s,   d loss / d w = sum_i 2 a_i r_i (d out_i / d w) / s,   r_i = out_i - y_i,
//
// s = sum of a_i for the mean and 1 for the sum; out_i without key i. Rows without any other key that counts, and rows
// of weight 0, are left out of all sums. One pass, which gives d out_i / d w with out_i, where the linear method serves
// or there is one feature; else the dense backward pass of queries after the forward pass. Both are parallel as those
// of the op; the sums are taken in order.
// How a row leaves its own key out (exclude_self) is each kernel's: `excluded` and `subtract_own`, see ARCHITECTURE.md.

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "drivers.h"
#include "tensor_views.h"
#include "tiny_weights.h"
#include "zero_weights.h"

namespace nwfast {
namespace {

// x (N,) or (N, D), y (N,) or (N, 1), w of one element or D, key_weight (N,), all of one dtype.
Problem problem_of(const Tensor& x, const Tensor& y, const Tensor& w, const std::optional<Tensor>& key_weight,
                   TinyWeights& weights) {
  Problem problem;
  const Batch& batch = problem.batch;
  const bool one = x.dim() == 1;
  check((one || x.dim() == 2) && (y.dim() == 1 || (y.dim() == 2 && y.size(1) == 1)) && w.dim() <= 1 &&
        (w.numel() == 1 || (!one && w.numel() == x.size(1))) && y.size(0) == x.size(0) && x.numel() > 0 &&
        (!key_weight || (key_weight->dim() == 1 && key_weight->size(0) == x.size(0))));
  problem.features = one ? 1 : x.size(1);
  problem.channels = 1;
  problem.queries = problem.keys = x.size(0);
  problem.exclude_self = true;
  problem.query = problem.key = view_of(x, batch, 0, 0, one ? -1 : 1);
  problem.value = view_of(y, batch, 0, 0, -1);
  problem.w = view_of(w, batch, 0, -1, w.numel() > 1 ? 0 : -1);
  if (key_weight) problem.key_weight = view_of(*key_weight, batch, 0, 0, -1);
  for (const View* view : {&problem.value, &problem.w}) check(view->dtype == problem.query.dtype);
  check(!key_weight || problem.key_weight.dtype == problem.query.dtype);
  weights.rescale(problem);
  return problem;
}

// The gradient of the loss in w: `grad_out` (N) is that in out.
template <typename T>
void add_dense(const Problem& problem, const Buffer<T>& out, const Buffer<double>& state,
               const Buffer<double>& grad_out, double* grad_w) {
  BackwardTask<T> task{};
  task.grad_out = array_view(grad_out.get(), 1, 0);
  task.out = out.get();
  task.state = state.get();
  task.grad_w = grad_w;
  tiled_query_backward<T>(problem, task);
}

template <typename T>
bool linear_pass(const Problem& problem, const ForwardResult<T>& result) {
  return problem.features == 1 ? linear_forward(problem, result) : grid::forward(problem, result);
}

// grad_w (features), null where it is not wanted.
template <typename T>
void run(const Problem& problem, Method method, int exponent, bool mean, T* loss, double* grad_w) {
  const int64_t n = problem.keys, features = problem.features;
  const WithoutLeftOut kept(problem, false);
  const bool linear = method == Method::kLinear || (method == Method::kAuto && linear_is_faster(kept.problem()));
  Buffer<T> out(n), tangent(grad_w ? n * features : 0);
  Buffer<double> state(grad_w && !problem.single() ? 2 * n : 0), grad_out;
  ForwardResult<T> result{out.get(), nullptr, nullptr, grad_w ? tangent.get() : nullptr, nullptr};
  bool by_tangents = true;
  if (!linear || !linear_pass(kept.problem(), result)) {
    by_tangents = problem.single();
    if (!by_tangents) {
      result.tangent_w = nullptr;
      result.state = grad_w ? state.get() : nullptr;
    }
    by_tangents ? single_forward(kept.problem(), result) : tiled_forward(kept.problem(), result);
  }
  const auto at = [](const View& view, int64_t i) {
    return static_cast<double>(static_cast<const T*>(view.data)[i * view.row_stride]);
  };
  const auto weight = [&](int64_t i) { return problem.key_weight.data ? at(problem.key_weight, i) : 1.0; };
  int64_t counted = 0;
  for (int64_t i = 0; i < n; ++i) counted += weight(i) != 0;
  double squares = 0, weights = 0;
  if (grad_w) {
    std::fill_n(grad_w, features, 0.0);
    grad_out.allocate(n);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double a = weight(i);
    if (grad_w) grad_out[i] = 0;
    if (a == 0 || counted < 2) continue;
    const double residual = static_cast<double>(out[i]) - at(problem.value, i);
    squares += a * residual * residual;
    weights += a;
    // A row without gradient adds nothing: its residual is 0, or it is NaN for want of keys at a distance.
    if (!grad_w || residual == 0) continue;
    if (!by_tangents) {
      if (!std::isnan(residual) || state[2 * i + 1] != 0) grad_out[i] = 2 * a * residual;
      continue;
    }
    for (int64_t f = 0; f < features; ++f) {
      const T by_w = tangent[i * features + f];
      if (by_w == 0 && std::isnan(residual)) continue;
      check(!std::isinf(by_w));  // T does not hold it: refused, so that the caller goes the general way
      grad_w[f] += 2 * a * residual * static_cast<double>(by_w);
    }
  }
  // Where nothing is counted the mean is NaN, of rows without gradient.
  const auto reduced = [&](double sum) { return mean ? sum / weights : std::ldexp(sum, exponent); };
  *loss = static_cast<T>(reduced(squares));
  if (!grad_w || counted < 2) return;
  if (!by_tangents) {
    for (int64_t i = 0; mean && i < n; ++i) grad_out[i] /= weights;
    add_dense(kept.problem(), out, state, grad_out, grad_w);
    for (int64_t f = 0; !mean && f < features; ++f) grad_w[f] = std::ldexp(grad_w[f], exponent);
    return;
  }
  for (int64_t f = 0; f < features; ++f) grad_w[f] = reduced(grad_w[f]);
}

template <Method method>
std::tuple<Tensor, Tensor> leave_one_out(const Tensor& x, const Tensor& y, const Tensor& w,
                                         const std::optional<Tensor>& key_weight, bool mean, bool differentiate) {
  TinyWeights weights;
  const Problem problem = problem_of(x, y, w, key_weight, weights);
  const bool wide = problem.query.dtype == Dtype::kDouble;
  check(wide || problem.query.dtype == Dtype::kFloat);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t one = 1, features = problem.features, size = w.numel();
  const Tensor loss = empty(&one, 0, dtype);
  const Tensor grad_w = empty(&size, differentiate ? w.dim() : 0, dtype);
  const int exponent = weights.exponent(0);  // of the weights' unit, which a sum is in
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    Buffer<double> by_w(differentiate ? features : 0);
    run(problem, method, exponent, mean, data<T>(loss), differentiate ? by_w.get() : nullptr);
    if (!differentiate) return;
    for (int64_t f = 1; f < features && size == 1; ++f) by_w[0] += by_w[f];
    for (int64_t f = 0; f < size; ++f) data<T>(grad_w)[f] = static_cast<T>(by_w[f]);
  };
  wide ? run_as(double()) : run_as(float());
  return {loss, grad_w};
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, CPU, m) {
  using nwfast::Method;
  m.impl("native_leave_one_out", TORCH_BOX(&nwfast::leave_one_out<Method::kDense>));
  m.impl("native_fgt_leave_one_out", TORCH_BOX(&nwfast::leave_one_out<Method::kLinear>));
  m.impl("native_auto_leave_one_out", TORCH_BOX(&nwfast::leave_one_out<Method::kAuto>));
}
