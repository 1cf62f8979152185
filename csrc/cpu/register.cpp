// The operators nwfast::native_forward, native_backward and native_output on the CPU: the contract of
// nwfast/backends/__init__.py in terms of LibTorch's stable ABI. Schemas, fakes and autograd are defined in Python.
//
// Beside the canonical form they take the one-feature forms of the public function as they are, query (M,) with key
// (N,) or (M, N), and return results in those shapes: small calls would otherwise spend more time on views than on
// sums.

#include <Python.h>

#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "drivers.h"
#include "isa/processor.h"
#include "tangents.h"
#include "tensor_views.h"
#include "tiny_weights.h"
#include "zero_weights.h"

namespace nwfast {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// How the shapes of the tensors relate to the problem.
enum class Form { kCanonical, kShared, kPerQuery };

struct Call {
  Problem problem;
  TinyWeights weights;  // what the problem's are, if not the caller's
  Form form = Form::kCanonical;
  bool channels = true;  // whether results have a dimension for them
  mutable std::optional<Tensor> nothing;

  // A tensor of shape (*B, rows, columns), or an empty one where it is not wanted. Dimensions that the form does
  // without are left out.
  Tensor allocate(int64_t rows, int64_t columns, bool has_columns, ScalarType dtype, bool wanted = true) const {
    int64_t sizes[kMaxRank + 2] = {0};
    if (!wanted) {
      if (form == Form::kCanonical) return empty(sizes, 1, dtype);
      if (!nothing) nothing = empty(sizes, 1, dtype);  // calls on the short way share it, to save time
      return *nothing;
    }
    int64_t ndim = 0;
    for (; ndim < problem.batch.rank; ++ndim) sizes[ndim] = problem.batch.sizes[ndim];
    if (rows >= 0) sizes[ndim++] = rows;
    if (has_columns) sizes[ndim++] = columns;
    return empty(sizes, ndim, dtype);
  }
  // Rows of the queries: one for each batch element with keys per query, whose dimension the caller did not give.
  int64_t query_rows() const { return form == Form::kPerQuery ? -1 : problem.queries; }
  bool features() const { return form == Form::kCanonical; }
};

// The gradient of out.
View output_view(const Tensor& tensor, const Call& call) {
  switch (call.form) {
    case Form::kShared:
      return view_of(tensor, call.problem.batch, 0, 0, call.channels ? 1 : -1);
    case Form::kPerQuery:
      return view_of(tensor, call.problem.batch, 1, -1, -1);
    default:
      return matrix_view(tensor, call.problem.batch);
  }
}

Call call_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
             const std::optional<Tensor>& key_weight, bool exclude_self) {
  const int ndim = static_cast<int>(query.dim());
  Call call;
  Problem& problem = call.problem;
  Batch& batch = problem.batch;
  problem.exclude_self = exclude_self;
  if (ndim == 1) {
    const bool per_query = key.dim() == 2;
    call.form = per_query ? Form::kPerQuery : Form::kShared;
    call.channels = !per_query && value.dim() == 2;
    check(w.dim() <= 1 && w.numel() == 1 && (!key_weight || key_weight->dim() <= key.dim()));
    problem.features = 1;
    problem.channels = call.channels ? value.size(1) : 1;
    if (per_query) {
      check(value.dim() == 2 && key.size(0) == query.size(0) && value.size(0) == query.size(0) && !exclude_self);
      check(!key_weight || key_weight->dim() == 1 || key_weight->size(0) == query.size(0) || key_weight->size(0) == 1);
      batch.rank = 1;
      batch.sizes[0] = batch.count = query.size(0);
      problem.queries = 1;
      problem.keys = key.size(1);
      check(value.size(1) == problem.keys);
      problem.query = view_of(query, batch, 1, -1, -1);
      problem.key = view_of(key, batch, 1, 1, -1);
      problem.value = view_of(value, batch, 1, 1, -1);
    } else {
      check(key.dim() == 1 && (value.dim() == 1 || value.dim() == 2));
      problem.queries = query.size(0);
      problem.keys = key.size(0);
      check(value.size(0) == problem.keys);
      problem.query = view_of(query, batch, 0, 0, -1);
      problem.key = view_of(key, batch, 0, 0, -1);
      problem.value = view_of(value, batch, 0, 0, call.channels ? 1 : -1);
    }
    problem.w = view_of(w, batch, 0, -1, -1);
    check(problem.key.dtype == problem.query.dtype && problem.value.dtype == problem.query.dtype &&
          problem.w.dtype == problem.query.dtype);
  } else {
    read_canonical(query, key, value, w, problem);
  }
  check_sizes(key_weight, problem);
  if (key_weight) {
    problem.key_weight = vector_view(*key_weight, batch);
    check(ndim > 1 || problem.key_weight.dtype == problem.query.dtype);
    call.weights.rescale(problem);
  }
  return call;
}

bool is_linear(Method method, const Problem& problem) {
  STD_TORCH_CHECK(method != Method::kLinear || problem.features <= 3,
                  "nwfast: the fast Gauss transform is for one, two or three features");
  return method == Method::kLinear || (method == Method::kAuto && linear_is_faster(problem));
}

// Whether the linear method served.
template <typename T>
bool run_forward(const Problem& problem, const Gradients& outputs, bool linear) {
  if (problem.batch.count == 0 || problem.queries == 0) return true;
  const ForwardResult<T> result{data<T>(std::get<0>(outputs)), data<T>(std::get<1>(outputs)),
                                data<double>(std::get<2>(outputs)), data<T>(std::get<3>(outputs)),
                                data<T>(std::get<4>(outputs))};
  if (linear && (problem.features == 1 ? linear_forward(problem, result) : grid::forward(problem, result))) return true;
  problem.single() ? single_forward(problem, result) : tiled_forward(problem, result);
  return false;
}

// With one feature and channel, both; where the linear method serves, of the query (features, channels) for each row
// for any number of channels, and of w (features) for one channel and several features.
bool may_have_tangents(const Problem& problem, bool tangent_w, bool tangent_q) {
  if (problem.single() || !(tangent_w || tangent_q)) return true;
  return problem.features <= 3 && (!tangent_w || (problem.features > 1 && problem.channels == 1));
}

// Which results of a forward pass are wanted, beside out.
struct Wanted {
  bool lse = true, state = true, tangent_w = false, tangent_q = false;
};

Gradients run_forward(const Call& call, Method method, const Wanted& wanted) {
  const WithoutLeftOut kept(call.problem, false);
  const Problem& problem = kept.problem();
  const bool wide = problem.query.dtype == Dtype::kDouble;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t m = call.query_rows(), channels = problem.channels;
  const bool linear = is_linear(method, problem), has_tangents = linear || problem.single();
  Gradients outputs{
      call.allocate(m, channels, call.channels, dtype), call.allocate(m, 0, false, dtype, wanted.lse),
      call.allocate(m, 2, true, ScalarType::Double, wanted.state),
      call.allocate(m, problem.single() ? channels : problem.features, call.channels, dtype,
                    wanted.tangent_w && has_tangents),
      call.allocate(m, problem.features * channels, call.channels, dtype, wanted.tangent_q && has_tangents)};
  const bool served =
      wide ? run_forward<double>(problem, outputs, linear) : run_forward<float>(problem, outputs, linear);
  if (!served && !problem.single() && has_tangents) {
    std::get<3>(outputs) = std::get<4>(outputs) = call.allocate(m, 0, false, dtype, false);
  }
  call.weights.restore_lse(wide ? data<double>(std::get<1>(outputs)) : nullptr, problem.queries);
  return outputs;
}

template <Method method>
Gradients forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                  const std::optional<Tensor>& key_weight, bool exclude_self, bool tangent_w, bool tangent_q) {
  const Call call = call_of(query, key, value, w, key_weight, exclude_self);
  STD_TORCH_CHECK(may_have_tangents(call.problem, tangent_w, tangent_q),
                  "nwfast: tangents are for up to three features; those of w for one channel");
  return run_forward(call, method, {true, true, tangent_w, tangent_q});
}

// What calls need that have no gradient of keys: out, and of lse and the tangents what is asked for.
template <Method method>
std::tuple<Tensor, Tensor, Tensor, Tensor> output(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const Tensor& w, const std::optional<Tensor>& key_weight,
                                                  bool exclude_self, bool lse, bool tangent_w, bool tangent_q) {
  const Call call = call_of(query, key, value, w, key_weight, exclude_self);
  check(may_have_tangents(call.problem, tangent_w, tangent_q));
  const Gradients outputs = run_forward(call, method, {lse, false, tangent_w, tangent_q});
  return {std::get<0>(outputs), std::get<1>(outputs), std::get<3>(outputs), std::get<4>(outputs)};
}

// Sum (batches, features) over what w was broadcast over, in order, into the contiguous gradient of w.
template <typename R>
void reduce_w(const Problem& problem, const Tensor& w, const double* grad, R* out) {
  const int ndim = static_cast<int>(w.dim()) > 0 ? static_cast<int>(w.dim()) : 1;  // a scalar is as (1,)
  View target;
  int64_t stride = w.dim() > 0 ? w.size(ndim - 1) : 1;
  target.column_stride = stride > 1 ? 1 : 0;
  for (int dim = problem.batch.rank - 1; dim >= 0; --dim) {
    const int own = dim - (problem.batch.rank - (ndim - 1));
    const int64_t size = own >= 0 ? w.size(own) : 1;
    target.batch_strides[dim] = size > 1 ? stride : 0;
    stride *= size;
  }
  // There may be many features and batch elements: their sum keeps what rounding takes from it (Knuth's two-sum).
  Buffer<double> sums(stride), rests(stride);
  for (int64_t i = 0; i < stride; ++i) sums[i] = rests[i] = 0;
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    const int64_t offset = target.offset(problem.batch, b);
    for (int64_t f = 0; f < problem.features; ++f) {
      const int64_t place = offset + f * target.column_stride;
      const double term = grad[b * problem.features + f], sum = sums[place], next = sum + term, part = next - sum;
      rests[place] += (sum - (next - part)) + (term - part);
      sums[place] = next;
    }
  }
  // An overflow leaves no rest.
  for (int64_t i = 0; i < stride; ++i) out[i] = static_cast<R>(std::isfinite(rests[i]) ? sums[i] + rests[i] : sums[i]);
}

template <typename T>
void run_query_backward(const Problem& problem, const BackwardTask<T>& task, bool linear) {
  if (linear && (problem.features == 1 ? linear_query_backward(problem, task) : grid::query_backward(problem, task))) {
    return;
  }
  problem.single() ? single_query_backward(problem, task) : tiled_query_backward(problem, task);
}

template <typename T>
void run_key_backward(const Problem& problem, const BackwardTask<T>& task, bool linear) {
  if (linear && (problem.features == 1 ? linear_key_backward(problem, task) : grid::key_backward(problem, task)))
    return;
  problem.single() ? single_key_backward(problem, task) : tiled_key_backward(problem, task);
}

template <typename T>
void run_backward(const Problem& problem, const WithoutLeftOut& kept, BackwardTask<T>& task, const Tensor& w,
                  int64_t needs, const Gradients& gradients, bool linear) {
  task.grad_query = data<T>(std::get<0>(gradients));
  task.grad_key = data<T>(std::get<1>(gradients));
  task.grad_value = data<T>(std::get<2>(gradients));
  task.grad_key_weight = data<T>(std::get<4>(gradients));
  Buffer<double> grad_w(needs & kNeedW ? problem.batch.count * problem.features : 0);
  for (int64_t i = 0; needs & kNeedW && i < problem.batch.count * problem.features; ++i) grad_w[i] = 0;
  task.grad_w = needs & kNeedW ? grad_w.get() : nullptr;
  const bool of_keys = problem.batch.count > 0 && (needs & (kNeedKey | kNeedValue | kNeedKeyWeight));
  bool both = false;
  if (problem.batch.count > 0 && (needs & (kNeedQuery | kNeedW)) && problem.queries > 0) {
    const bool tangents = !task.grad_lse.data && problem.channels == 1 && problem.features <= 3 &&
                          (task.tangent_q || !task.grad_query) && (task.tangent_w || !task.grad_w);
    check(tangents || task.state);
    // Without a state the dense way alone serves.
    if (!tangents || !apply_tangents(problem, task)) {
      both = of_keys && !linear && !problem.single();
      both ? tiled_backward(kept.problem(), task) : run_query_backward(kept.problem(), task, linear && task.state);
    }
  }
  if (of_keys) {
    if (!both) run_key_backward(kept.problem(), task, linear);
    if (kept.any()) {
      // A pass of its own, so that what left-out keys hold reaches the gradient of their weight and no other.
      BackwardTask<T> weights = task;
      Buffer<T> own(task.grad_key_weight ? problem.batch.count * problem.keys : 0);
      weights.grad_key = weights.grad_value = nullptr;
      weights.grad_key_weight = own.get();
      if (task.grad_key_weight) run_key_backward(WithoutLeftOut(problem, true).problem(), weights, linear);
      settle_left_out(problem, task, own.get());
    }
  }
  const Tensor& sum = std::get<3>(gradients);
  if (!(needs & kNeedW) || sum.numel() == 0) return;
  switch (dtype_of(sum)) {
    case Dtype::kFloat:
      return reduce_w(problem, w, grad_w.get(), data<float>(sum));
    case Dtype::kDouble:
      return reduce_w(problem, w, grad_w.get(), data<double>(sum));
    case Dtype::kHalf:
      return reduce_w(problem, w, grad_w.get(), data<torch::headeronly::Half>(sum));
    case Dtype::kBFloat16:
      return reduce_w(problem, w, grad_w.get(), data<torch::headeronly::BFloat16>(sum));
  }
}

template <Method method>
Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& w, const std::optional<Tensor>& key_weight,
                   const Tensor& out, const Tensor& state, const Tensor& tangent_w, const Tensor& tangent_q,
                   bool exclude_self, int64_t needs) {
  const Call call = call_of(query, key, value, w, key_weight, exclude_self);
  const Problem& problem = call.problem;
  const WithoutLeftOut kept(problem, false);
  const bool linear = is_linear(method, kept.problem());
  const bool wide = problem.query.dtype == Dtype::kDouble;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  int64_t w_sizes[kMaxRank + 2] = {0};
  const int64_t w_ndim = needs & kNeedW ? w.dim() : 1;
  for (int64_t dim = 0; needs & kNeedW && dim < w_ndim; ++dim) w_sizes[dim] = w.size(dim);
  const Gradients gradients{
      call.allocate(call.query_rows(), problem.features, call.features(), dtype, needs & kNeedQuery),
      call.allocate(problem.keys, problem.features, call.features(), dtype, needs & kNeedKey),
      call.allocate(problem.keys, problem.channels, call.channels, dtype, needs & kNeedValue),
      empty(w_sizes, w_ndim, needs & kNeedW ? w.scalar_type() : dtype),
      call.allocate(problem.keys, 0, false, dtype, needs & kNeedKeyWeight)};
  const Tensor whole[] = {as_contiguous(out), as_contiguous(state), as_contiguous(tangent_w), as_contiguous(tangent_q)};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    BackwardTask<T> task;
    task.grad_out = output_view(grad_out, call);
    if (grad_lse) {
      task.grad_lse =
          call.form == Form::kPerQuery ? output_view(*grad_lse, call) : vector_view(*grad_lse, problem.batch);
    }
    task.out = data<T>(whole[0]);
    task.state = data<double>(whole[1]);
    task.tangent_w = data<T>(whole[2]);
    task.tangent_q = data<T>(whole[3]);
    const int64_t tangents = problem.batch.count * problem.queries * problem.features;
    for (int i : {2, 3}) check(whole[i].numel() == 0 || problem.channels > 1 || whole[i].numel() == tangents);
    run_backward(problem, kept, task, w, needs, gradients, linear);
  };
  wide ? run(double()) : run(float());
  call.weights.restore_gradients(wide ? data<double>(std::get<4>(gradients)) : nullptr, problem.keys);
  return gradients;
}

// Prepared keys. The schemas, to be defined in Python:
//   native_fgt_compress(Tensor key, Tensor value, Tensor w, Tensor? key_weight)
//       -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)
//   native_fgt_predict(Tensor query, Tensor key, Tensor value, Tensor key_weight, Tensor boxes, Tensor moments,
//       Tensor matrices, Tensor numbers) -> (Tensor out, Tensor lse)
// key (N,), value (N,) or (N, C), w of one element, query (M,); all of one dtype. The seven tensors of the first, in
// order, are the last seven arguments of the second: keys sorted, without those of weight 0, in the arithmetic dtype;
// value (N, C); key_weight (N,), or (0,) where all are 1; the rest is the transform's own. Where numbers is empty (not
// finite numbers, or a scale beyond what boxes can hold) the caller uses native_forward with what it gave. out is (M,
// C).
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Seven compress_as(const Problem& problem) {
  PreparedKeys<T> prepared;
  if (!linear_compress(problem, prepared)) prepared = PreparedKeys<T>();
  return {tensor_of(prepared.key, 0),     tensor_of(prepared.value, problem.channels),
          tensor_of(prepared.weight, 0),  tensor_of(prepared.boxes, 3),
          tensor_of(prepared.moments, 0), tensor_of(prepared.matrices, 0),
          tensor_of(prepared.numbers, 0)};
}

Seven compress(const Tensor& key, const Tensor& value, const Tensor& w, const std::optional<Tensor>& key_weight) {
  check(key.dim() == 1 && w.numel() == 1);
  const Call call = call_of(key, key, value, w, key_weight, false);
  const WithoutLeftOut kept(call.problem, false);
  Problem problem = kept.problem();
  problem.queries = 0;
  return problem.key.dtype == Dtype::kDouble ? compress_as<double>(problem) : compress_as<float>(problem);
}

template <typename T>
void predict_as(const Tensor& query, const Tensor (&prepared)[7], const Tensor& out, const Tensor& lse) {
  PreparedKeysView<T> view;
  view.key = data<T>(prepared[0]);
  view.value = data<T>(prepared[1]);
  view.weight = data<T>(prepared[2]);
  view.keys = prepared[0].size(0);
  view.channels = prepared[1].size(1);
  view.boxes = data<int64_t>(prepared[3]);
  view.box_count = prepared[3].size(0);
  view.moments = data<double>(prepared[4]);
  view.matrices = data<double>(prepared[5]);
  view.matrices_size = prepared[5].size(0);
  view.numbers = data<double>(prepared[6]);
  view.numbers_size = prepared[6].size(0);
  const View rows = view_of(query, Batch(), 0, 0, -1);
  if (query.size(0) == 0) return;
  STD_TORCH_CHECK(linear_predict<T>(view, rows, query.size(0), {data<T>(out), data<T>(lse), nullptr, nullptr, nullptr}),
                  "nwfast: queries beyond what prepared keys can serve");
}

std::tuple<Tensor, Tensor> predict(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Tensor& key_weight, const Tensor& boxes, const Tensor& moments,
                                   const Tensor& matrices, const Tensor& numbers) {
  const Tensor prepared[7] = {as_contiguous(key),    as_contiguous(value),   as_contiguous(key_weight),
                              as_contiguous(boxes),  as_contiguous(moments), as_contiguous(matrices),
                              as_contiguous(numbers)};
  const bool wide = key.scalar_type() == ScalarType::Double;
  check(query.dim() == 1 && value.dim() == 2 && numbers.size(0) > 0 && value.size(0) == key.size(0) &&
        (dtype_of(query) == Dtype::kDouble) == wide);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t sizes[2] = {query.size(0), value.size(1)};
  const Tensor out = empty(sizes, 2, dtype), lse = empty(sizes, 1, dtype);
  wide ? predict_as<double>(query, prepared, out, lse) : predict_as<float>(query, prepared, out, lse);
  return {out, lse};
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, CPU, m) {
  using nwfast::Method;
  m.impl("native_forward", TORCH_BOX(&nwfast::forward<Method::kDense>));
  m.impl("native_backward", TORCH_BOX(&nwfast::backward<Method::kDense>));
  m.impl("native_output", TORCH_BOX(&nwfast::output<Method::kDense>));
  m.impl("native_fgt_forward", TORCH_BOX(&nwfast::forward<Method::kLinear>));
  m.impl("native_fgt_backward", TORCH_BOX(&nwfast::backward<Method::kLinear>));
  m.impl("native_fgt_output", TORCH_BOX(&nwfast::output<Method::kLinear>));
  m.impl("native_auto_forward", TORCH_BOX(&nwfast::forward<Method::kAuto>));
  m.impl("native_auto_backward", TORCH_BOX(&nwfast::backward<Method::kAuto>));
  m.impl("native_auto_output", TORCH_BOX(&nwfast::output<Method::kAuto>));
  m.impl("native_fgt_compress", TORCH_BOX(&nwfast::compress));
  m.impl("native_fgt_predict", TORCH_BOX(&nwfast::predict));
}

// The module itself holds what is no operator; loading it runs the registration above.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"instruction_set",
       [](PyObject*, PyObject*) -> PyObject* { return PyUnicode_FromString(nwfast::instruction_set()); }, METH_NOARGS,
       "The instruction set that the kernels use on this processor."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
