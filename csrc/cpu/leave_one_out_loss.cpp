// The operators nwfast::native_leave_one_out, native_fgt_leave_one_out and native_auto_leave_one_out: the squared
// leave-one-out residual of one feature and its derivative in w, in one pass,
//
//   loss = sum_i a_i r_i^2 / s,   d loss / d w = sum_i 2 a_i r_i (d out_i / d w) / s,   r_i = out_i - y_i,
//
// s = sum of a_i for the mean and 1 for the sum; out_i without key i. Rows without any other key that counts, and rows
// of weight 0, are left out of all sums. The forward pass is parallel as that of the op; the sums are taken in order.
// How a row leaves its own key out (exclude_self) is each kernel's: `excluded` and `subtract_own`, see ARCHITECTURE.md.

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

// x (N,), y (N,), w of one element, key_weight (N,), all of one dtype.
Problem problem_of(const Tensor& x, const Tensor& y, const Tensor& w, const std::optional<Tensor>& key_weight,
                   TinyWeights& weights) {
  Problem problem;
  const Batch& batch = problem.batch;
  check(x.dim() == 1 && y.dim() == 1 && w.dim() <= 1 && w.numel() == 1 && y.size(0) == x.size(0) && x.size(0) > 0 &&
        (!key_weight || (key_weight->dim() == 1 && key_weight->size(0) == x.size(0))));
  problem.features = problem.channels = 1;
  problem.queries = problem.keys = x.size(0);
  problem.exclude_self = true;
  problem.query = problem.key = view_of(x, batch, 0, 0, -1);
  problem.value = view_of(y, batch, 0, 0, -1);
  problem.w = view_of(w, batch, 0, -1, -1);
  if (key_weight) problem.key_weight = view_of(*key_weight, batch, 0, 0, -1);
  for (const View* view : {&problem.value, &problem.w}) check(view->dtype == problem.query.dtype);
  check(!key_weight || problem.key_weight.dtype == problem.query.dtype);
  weights.rescale(problem);
  return problem;
}

template <typename T>
void run(const Problem& problem, Method method, int exponent, bool mean, bool differentiate, T* loss, T* grad_w) {
  const int64_t n = problem.keys;
  const WithoutLeftOut kept(problem, false);
  Buffer<T> out(n), tangent(differentiate ? n : 0);
  const ForwardResult<T> result{out.get(), nullptr, nullptr, differentiate ? tangent.get() : nullptr, nullptr};
  const bool linear = method == Method::kLinear || (method == Method::kAuto && linear_is_faster(kept.problem()));
  if (!linear || !linear_forward(kept.problem(), result)) single_forward(kept.problem(), result);
  const auto at = [](const View& view, int64_t i) {
    return static_cast<double>(static_cast<const T*>(view.data)[i * view.row_stride]);
  };
  const auto weight = [&](int64_t i) { return problem.key_weight.data ? at(problem.key_weight, i) : 1.0; };
  int64_t counted = 0;
  for (int64_t i = 0; i < n; ++i) counted += weight(i) != 0;
  double squares = 0, slope = 0, weights = 0;
  for (int64_t i = 0; i < n && counted > 1; ++i) {
    const double a = weight(i);
    if (a == 0) continue;
    const double residual = static_cast<double>(out[i]) - at(problem.value, i);
    squares += a * residual * residual;
    weights += a;
    // A row without gradient adds nothing: its residual is 0, or it is NaN for want of keys at a distance.
    if (!differentiate || residual == 0 || (tangent[i] == 0 && std::isnan(residual))) continue;
    check(!std::isinf(tangent[i]));  // T does not hold it: refused, so that the caller goes the general way
    slope += 2 * a * residual * static_cast<double>(tangent[i]);
  }
  const auto reduced = [&](double sum) { return static_cast<T>(mean ? sum / weights : std::ldexp(sum, exponent)); };
  *loss = reduced(squares);
  // Where nothing is counted the mean is NaN, of rows without gradient.
  if (differentiate) *grad_w = counted > 1 ? reduced(slope) : 0;
}

template <Method method>
std::tuple<Tensor, Tensor> leave_one_out(const Tensor& x, const Tensor& y, const Tensor& w,
                                         const std::optional<Tensor>& key_weight, bool mean, bool differentiate) {
  TinyWeights weights;
  const Problem problem = problem_of(x, y, w, key_weight, weights);
  const bool wide = problem.query.dtype == Dtype::kDouble;
  check(wide || problem.query.dtype == Dtype::kFloat);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t one = 1;
  const Tensor loss = empty(&one, 0, dtype);
  const Tensor grad_w = empty(&one, differentiate ? w.dim() : 0, dtype);
  const int exponent = weights.exponent(0);  // of the weights' unit, which a sum is in
  wide ? run(problem, method, exponent, mean, differentiate, data<double>(loss), data<double>(grad_w))
       : run(problem, method, exponent, mean, differentiate, data<float>(loss), data<float>(grad_w));
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
