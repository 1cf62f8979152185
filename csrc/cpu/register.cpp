// The operators nwfast::native_forward and nwfast::native_backward on the CPU: the contract of
// nwfast/backends/__init__.py in terms of LibTorch's stable ABI. Schemas, fakes and autograd are defined in Python.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "drivers.h"

namespace nwfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

enum Needs { kQuery = 1, kKey = 2, kValue = 4, kW = 8, kKeyWeight = 16 };  // as NEEDS_* in nwfast/backends

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "nwfast: expected a tensor of dtype float32, float64, float16 or bfloat16");
  }
}

Tensor empty(const int64_t* sizes, int64_t ndim, ScalarType dtype) {
  int64_t strides[kMaxRank + 2];
  int64_t stride = 1;
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  const int32_t code = dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A tensor of shape (*B, columns...), or an empty one where it is not wanted.
Tensor empty_batched(const Batch& batch, std::initializer_list<int64_t> columns, ScalarType dtype, bool wanted = true) {
  int64_t sizes[kMaxRank + 2] = {0};
  if (!wanted) return empty(sizes, 1, dtype);
  int64_t ndim = 0;
  for (; ndim < batch.rank; ++ndim) sizes[ndim] = batch.sizes[ndim];
  for (const int64_t column : columns) sizes[ndim++] = column;
  return empty(sizes, ndim, dtype);
}

// A view of a tensor (*B, ...) with `trailing` dimensions behind the leading ones, which broadcast from the right.
View view_of(const Tensor& tensor, const Batch& batch, int trailing) {
  View view;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(tensor);
  const int ndim = static_cast<int>(tensor.dim()), leading = ndim - trailing;
  for (int dim = 0; dim < batch.rank; ++dim) {
    const int own = dim - (batch.rank - leading);
    view.batch_strides[dim] = own >= 0 && tensor.size(own) > 1 ? tensor.stride(own) : 0;
  }
  if (trailing == 2) {
    view.row_stride = tensor.size(ndim - 2) > 1 ? tensor.stride(ndim - 2) : 0;
    view.column_stride = tensor.size(ndim - 1) > 1 ? tensor.stride(ndim - 1) : 0;
  } else {
    view.row_stride = view.column_stride = tensor.size(ndim - 1) > 1 ? tensor.stride(ndim - 1) : 0;
  }
  return view;
}

Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                   const std::optional<Tensor>& key_weight, bool exclude_self) {
  const int ndim = static_cast<int>(query.dim());
  STD_TORCH_CHECK(ndim >= 2 && key.dim() == ndim && value.dim() == ndim && w.dim() >= 1 && w.dim() <= ndim - 1,
                  "nwfast: operators take tensors in canonical form; call nwfast.nadaraya_watson");
  Problem problem;
  problem.batch.rank = ndim - 2;
  for (int dim = 0; dim < ndim - 2; ++dim) {
    int64_t size = 1;
    for (const Tensor* tensor : {&query, &key, &value}) {
      const int64_t own = tensor->size(dim);
      STD_TORCH_CHECK(own == 1 || size == 1 || own == size, "nwfast: leading dimensions do not broadcast");
      if (own != 1) size = own;
    }
    problem.batch.sizes[dim] = size;
    problem.batch.count *= size;
  }
  problem.queries = query.size(ndim - 2);
  problem.keys = key.size(ndim - 2);
  problem.features = key.size(ndim - 1);
  problem.channels = value.size(ndim - 1);
  STD_TORCH_CHECK(problem.keys > 0 && value.size(ndim - 2) == problem.keys && problem.features > 0 &&
                      query.size(ndim - 1) == problem.features && problem.channels > 0 &&
                      (!exclude_self || problem.queries == problem.keys) &&
                      (!key_weight || key_weight->size(key_weight->dim() - 1) == problem.keys),
                  "nwfast: operators take tensors in canonical form; call nwfast.nadaraya_watson");
  problem.query = view_of(query, problem.batch, 2);
  problem.key = view_of(key, problem.batch, 2);
  problem.value = view_of(value, problem.batch, 2);
  problem.w = view_of(w, problem.batch, 1);
  if (key_weight) problem.key_weight = view_of(*key_weight, problem.batch, 1);
  problem.exclude_self = exclude_self;
  return problem;
}

bool scalar(const Problem& problem) { return problem.features == 1 && problem.channels == 1; }

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <typename T>
void run_forward(const Problem& problem, const Gradients& outputs) {
  if (problem.batch.count == 0 || problem.queries == 0) return;
  const ForwardResult<T> result{data<T>(std::get<0>(outputs)), data<T>(std::get<1>(outputs)),
                                data<double>(std::get<2>(outputs)), data<T>(std::get<3>(outputs)),
                                data<T>(std::get<4>(outputs))};
  scalar(problem) ? scalar_forward(problem, result) : tiled_forward(problem, result);
}

Gradients forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                  const std::optional<Tensor>& key_weight, bool exclude_self, bool tangent_w, bool tangent_q) {
  const Problem problem = problem_of(query, key, value, w, key_weight, exclude_self);
  STD_TORCH_CHECK(scalar(problem) || !(tangent_w || tangent_q),
                  "nwfast: tangents are for one feature and one channel");
  const bool wide = problem.query.dtype == Dtype::kDouble;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Batch& batch = problem.batch;
  const int64_t m = problem.queries, channels = problem.channels;
  Gradients outputs{empty_batched(batch, {m, channels}, dtype), empty_batched(batch, {m}, dtype),
                    empty_batched(batch, {m, 2}, ScalarType::Double),
                    empty_batched(batch, {m, channels}, dtype, tangent_w),
                    empty_batched(batch, {m, channels}, dtype, tangent_q)};
  wide ? run_forward<double>(problem, outputs) : run_forward<float>(problem, outputs);
  return outputs;
}

// The gradients of w and query from the tangents that the forward pass saved.
template <typename T>
void apply_tangents(const Problem& problem, const BackwardTask<T>& task) {
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    const int64_t grad = task.grad_out.offset(problem.batch, b);
    double sum = 0;
    for (int64_t i = 0; i < problem.queries; ++i) {
      const int64_t row = b * problem.queries + i;
      if (task.state[2 * row + 1] == 0) {  // no key left: out is NaN, and so may be its gradient
        if (task.grad_query) task.grad_query[row] = 0;
        continue;
      }
      T g = 0;
      read(task.grad_out, grad + i * task.grad_out.row_stride, 1, 0, &g);
      if (task.grad_query) task.grad_query[row] = g * task.tangent_q[row];
      if (task.grad_w) sum += static_cast<double>(g) * static_cast<double>(task.tangent_w[row]);
    }
    if (task.grad_w) task.grad_w[b] = sum;
  }
}

// Sum (batches, features) over what w was broadcast over, in order, into the contiguous gradient of w.
template <typename R>
void reduce_w(const Problem& problem, const Tensor& w, const double* grad, R* out) {
  const int ndim = static_cast<int>(w.dim());
  View target;
  int64_t stride = 1;
  target.column_stride = w.size(ndim - 1) > 1 ? 1 : 0;
  stride *= w.size(ndim - 1);
  for (int dim = problem.batch.rank - 1; dim >= 0; --dim) {
    const int own = dim - (problem.batch.rank - (ndim - 1));
    const int64_t size = own >= 0 ? w.size(own) : 1;
    target.batch_strides[dim] = size > 1 ? stride : 0;
    stride *= size;
  }
  Buffer<double> sums(stride);
  for (int64_t i = 0; i < stride; ++i) sums[i] = 0;
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    const int64_t offset = target.offset(problem.batch, b);
    for (int64_t f = 0; f < problem.features; ++f) {
      sums[offset + f * target.column_stride] += grad[b * problem.features + f];
    }
  }
  for (int64_t i = 0; i < stride; ++i) out[i] = static_cast<R>(sums[i]);
}

template <typename T>
void run_backward(const Problem& problem, BackwardTask<T>& task, const Tensor& w, int64_t needs,
                  const Gradients& gradients) {
  task.grad_query = data<T>(std::get<0>(gradients));
  task.grad_key = data<T>(std::get<1>(gradients));
  task.grad_value = data<T>(std::get<2>(gradients));
  task.grad_key_weight = data<T>(std::get<4>(gradients));
  Buffer<double> grad_w(needs & kW ? problem.batch.count * problem.features : 0);
  for (int64_t i = 0; needs & kW && i < problem.batch.count * problem.features; ++i) grad_w[i] = 0;
  task.grad_w = needs & kW ? grad_w.get() : nullptr;
  if (problem.batch.count > 0 && (needs & (kQuery | kW)) && problem.queries > 0) {
    const bool tangents = !task.grad_lse.data && (task.tangent_q || !task.grad_query) && (task.tangent_w || !task.grad_w);
    if (tangents) {
      apply_tangents(problem, task);
    } else {
      scalar(problem) ? scalar_query_backward(problem, task) : tiled_query_backward(problem, task);
    }
  }
  if (problem.batch.count > 0 && (needs & (kKey | kValue | kKeyWeight))) {
    scalar(problem) ? scalar_key_backward(problem, task) : tiled_key_backward(problem, task);
  }
  if (needs & kW && std::get<3>(gradients).numel() > 0) {
    if (std::get<3>(gradients).scalar_type() == ScalarType::Double) {
      reduce_w(problem, w, grad_w.get(), data<double>(std::get<3>(gradients)));
    } else {
      reduce_w(problem, w, grad_w.get(), data<float>(std::get<3>(gradients)));
    }
  }
}

Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& w, const std::optional<Tensor>& key_weight,
                   const Tensor& out, const Tensor& state, const Tensor& tangent_w, const Tensor& tangent_q,
                   bool exclude_self, int64_t needs) {
  const Problem problem = problem_of(query, key, value, w, key_weight, exclude_self);
  const bool wide = problem.query.dtype == Dtype::kDouble;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Batch& batch = problem.batch;
  int64_t w_sizes[kMaxRank + 2] = {0};
  const int64_t w_ndim = needs & kW ? w.dim() : 1;
  for (int64_t dim = 0; needs & kW && dim < w_ndim; ++dim) w_sizes[dim] = w.size(dim);
  const Gradients gradients{
      empty_batched(batch, {problem.queries, problem.features}, dtype, needs & kQuery),
      empty_batched(batch, {problem.keys, problem.features}, dtype, needs & kKey),
      empty_batched(batch, {problem.keys, problem.channels}, dtype, needs & kValue),
      empty(w_sizes, w_ndim, dtype),
      empty_batched(batch, {problem.keys}, dtype, needs & kKeyWeight)};
  const Tensor whole[] = {as_contiguous(out), as_contiguous(state), as_contiguous(tangent_w), as_contiguous(tangent_q)};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    BackwardTask<T> task;
    task.grad_out = view_of(grad_out, batch, 2);
    if (grad_lse) task.grad_lse = view_of(*grad_lse, batch, 1);
    task.out = data<T>(whole[0]);
    task.state = data<double>(whole[1]);
    task.tangent_w = data<T>(whole[2]);
    task.tangent_q = data<T>(whole[3]);
    run_backward(problem, task, w, needs, gradients);
  };
  wide ? run(double()) : run(float());
  return gradients;
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, CPU, m) {
  m.impl("native_forward", TORCH_BOX(&nwfast::forward));
  m.impl("native_backward", TORCH_BOX(&nwfast::backward));
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
