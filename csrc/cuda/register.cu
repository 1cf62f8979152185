// The operators nwfast::cuda_forward and nwfast::cuda_backward: the contract of nwfast/backends/__init__.py, canonical
// form, in terms of LibTorch's stable ABI. Schemas, fakes and autograd are defined in Python.

#include <Python.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensors.h"
#include "kernels.h"

// Tests build this file for the CPU, with the kernels emulated.
#ifdef NWFAST_EMULATED
#define NWFAST_DISPATCH_KEY CPU
#else
#define NWFAST_DISPATCH_KEY CUDA
#endif

namespace nwfast {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

#ifdef NWFAST_EMULATED

struct OnDevice {
  explicit OnDevice(const Tensor&) { device = {emulated_multiprocessors(), nullptr}; }
  void finish() const {}
  Device device;
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
};

#else

int multiprocessors_of(int index) {
  static std::vector<int> known(128, 0);  // the same number, whichever thread writes it
  if (index < 128 && known[index] > 0) return known[index];
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index));
  if (index < 128) known[index] = count;
  return count;
}

// Makes the tensor's device current for as long as it lives, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    device = {multiprocessors_of(index), static_cast<cudaStream_t>(stream)};
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  void finish() const { STD_CUDA_CHECK(cudaGetLastError()); }

  Device device;
  int32_t type = aoti_torch_device_type_cuda(), index;

 private:
  CUDAGuardHandle guard_ = nullptr;
};

#endif

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const OnDevice& where) {
  return empty_on(where.type, where.index, sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

// Leading dimensions with the strides of every view: those that all views walk through in one go are merged, so that
// the kernels see few.
class Dimensions {
 public:
  explicit Dimensions(std::vector<int64_t> sizes) : sizes_(std::move(sizes)) {}

  // `leading` dimensions of the tensor are dimensions of the batch, from the right.
  void add(View* view, const Tensor& tensor, int64_t leading) {
    views_.push_back(view);
    const int64_t rank = static_cast<int64_t>(sizes_.size());
    std::vector<int64_t> strides(sizes_.size(), 0);
    for (int64_t dim = 0; dim < leading; ++dim) {
      if (tensor.size(dim) > 1) strides[dim + rank - leading] = tensor.stride(dim);
    }
    strides_.push_back(std::move(strides));
  }

  Batch merge() {
    Batch batch;
    for (size_t dim = 0; dim < sizes_.size(); ++dim) {
      batch.count *= sizes_[dim];
      if (sizes_[dim] == 1) continue;
      bool together = batch.rank > 0;
      for (size_t v = 0; v < views_.size() && together; ++v) {
        together = views_[v]->batch_strides[batch.rank - 1] == strides_[v][dim] * sizes_[dim];
      }
      if (!together) {
        STD_TORCH_CHECK(batch.rank < kMaxDims, "nwfast: backend 'cuda' serves at most ", kMaxDims,
                        " leading dimensions that cannot be merged");
        batch.sizes[batch.rank++] = 1;
      }
      batch.sizes[batch.rank - 1] *= sizes_[dim];
      for (size_t v = 0; v < views_.size(); ++v) views_[v]->batch_strides[batch.rank - 1] = strides_[v][dim];
    }
    return batch;
  }

 private:
  std::vector<int64_t> sizes_;
  std::vector<View*> views_;
  std::vector<std::vector<int64_t>> strides_;
};

// (*B, rows, columns)
void view_matrix(const Tensor& tensor, View& view, Dimensions& dimensions) {
  const int64_t ndim = tensor.dim();
  view.data = tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr;
  view.dtype = dtype_of(tensor);
  view.row_stride = stride_of(tensor, ndim - 2);
  view.column_stride = stride_of(tensor, ndim - 1);
  dimensions.add(&view, tensor, ndim - 2);
}

// (*B, n), of fewer leading dimensions perhaps: key weights, w, gradients of lse.
void view_vector(const Tensor& tensor, View& view, Dimensions& dimensions) {
  const int64_t ndim = tensor.dim();
  view.data = tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr;
  view.dtype = dtype_of(tensor);
  view.row_stride = view.column_stride = stride_of(tensor, ndim - 1);
  dimensions.add(&view, tensor, ndim - 1);
}

Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                   const std::optional<Tensor>& key_weight, bool exclude_self) {
  Problem problem;
  problem.exclude_self = exclude_self;
  read_sizes(query, key, value, w, problem);
  check_sizes(key_weight, problem);
  return problem;
}

std::vector<int64_t> batch_sizes(const Tensor& query, const Tensor& key, const Tensor& value) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < query.dim() - 2; ++dim) sizes.push_back(common_size(query, key, value, dim));
  return sizes;
}

void view_inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                 const std::optional<Tensor>& key_weight, Problem& problem, Dimensions& dimensions) {
  view_matrix(query, problem.query, dimensions);
  view_matrix(key, problem.key, dimensions);
  view_matrix(value, problem.value, dimensions);
  view_vector(w, problem.w, dimensions);
  if (key_weight) view_vector(*key_weight, problem.key_weight, dimensions);
}

std::vector<int64_t> with(std::vector<int64_t> sizes, std::initializer_list<int64_t> more) {
  sizes.insert(sizes.end(), more);
  return sizes;
}

Result result_of(const Tensor& tensor) {
  Result result;
  result.data = tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
  result.wide = tensor.scalar_type() == ScalarType::Double;
  return result;
}

Tensor workspace_of(size_t bytes, const OnDevice& where) {
  return empty({static_cast<int64_t>(bytes / sizeof(double)) + 1}, ScalarType::Double, where);
}

Outputs forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                const std::optional<Tensor>& key_weight, bool exclude_self, bool tangent_w, bool tangent_q) {
  Problem problem = problem_of(query, key, value, w, key_weight, exclude_self);
  const std::vector<int64_t> sizes = batch_sizes(query, key, value);
  Dimensions dimensions(sizes);
  view_inputs(query, key, value, w, key_weight, problem, dimensions);
  problem.batch = dimensions.merge();
  STD_TORCH_CHECK(problem.single() || !(tangent_w || tangent_q),
                  "nwfast: tangents are for one feature and one channel");
  const OnDevice where(query);
  const int64_t m = problem.queries, channels = problem.channels;
  const ScalarType dtype = arithmetic_dtype(query);
  const auto wanted = [&](bool flag) { return flag ? with(sizes, {m, channels}) : std::vector<int64_t>{0}; };
  Outputs outputs{empty(with(sizes, {m, channels}), dtype, where), empty(with(sizes, {m}), dtype, where),
                  empty(with(sizes, {m, 2}), ScalarType::Double, where), empty(wanted(tangent_w), dtype, where),
                  empty(wanted(tangent_q), dtype, where)};
  if (problem.batch.count == 0 || m == 0) return outputs;
  ForwardResult result;
  result.out = result_of(std::get<0>(outputs));
  result.lse = result_of(std::get<1>(outputs));
  result.state = static_cast<double*>(result_of(std::get<2>(outputs)).data);
  result.tangent_w = result_of(std::get<3>(outputs));
  result.tangent_q = result_of(std::get<4>(outputs));
  const Tensor workspace = workspace_of(forward_workspace(problem, where.device, result), where);
  run_forward(problem, where.device, result, workspace.mutable_data_ptr());
  where.finish();
  return outputs;
}

Outputs backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
                 const Tensor& value, const Tensor& w, const std::optional<Tensor>& key_weight, const Tensor& out,
                 const Tensor& state, const Tensor& tangent_w, const Tensor& tangent_q, bool exclude_self,
                 int64_t needs) {
  Problem problem = problem_of(query, key, value, w, key_weight, exclude_self);
  const std::vector<int64_t> sizes = batch_sizes(query, key, value);
  const OnDevice where(query);
  const int64_t m = problem.queries, n = problem.keys, features = problem.features, channels = problem.channels;
  const ScalarType dtype = arithmetic_dtype(query);
  const auto gradient = [&](int64_t need, std::vector<int64_t> shape, ScalarType own) {
    return needs & need ? empty(shape, own, where) : empty({0}, dtype, where);
  };
  std::vector<int64_t> w_sizes;
  for (int64_t dim = 0; dim < w.dim(); ++dim) w_sizes.push_back(w.size(dim));
  const Outputs gradients{
      gradient(kNeedQuery, with(sizes, {m, features}), dtype), gradient(kNeedKey, with(sizes, {n, features}), dtype),
      gradient(kNeedValue, with(sizes, {n, channels}), dtype), gradient(kNeedW, w_sizes, w.scalar_type()),
      gradient(kNeedKeyWeight, with(sizes, {n}), dtype)};
  const Tensor whole[] = {as_contiguous(out), as_contiguous(state), as_contiguous(tangent_w), as_contiguous(tangent_q)};
  BackwardTask task;
  Dimensions dimensions(sizes);
  view_inputs(query, key, value, w, key_weight, problem, dimensions);
  view_matrix(grad_out, task.grad_out, dimensions);
  if (grad_lse) view_vector(*grad_lse, task.grad_lse, dimensions);
  const Tensor& grad_w = std::get<3>(gradients);
  if (needs & kNeedW) view_vector(grad_w, task.grad_w, dimensions);
  task.grad_w_size = needs & kNeedW ? grad_w.numel() : 0;
  problem.batch = dimensions.merge();
  task.out = result_of(whole[0]);
  task.state = static_cast<const double*>(result_of(whole[1]).data);
  task.tangent_w = result_of(whole[2]);
  task.tangent_q = result_of(whole[3]);
  task.grad_query = result_of(std::get<0>(gradients));
  task.grad_key = result_of(std::get<1>(gradients));
  task.grad_value = result_of(std::get<2>(gradients));
  task.grad_key_weight = result_of(std::get<4>(gradients));
  const Tensor workspace = workspace_of(backward_workspace(problem, where.device, task), where);
  run_backward(problem, where.device, task, workspace.mutable_data_ptr());
  where.finish();
  return gradients;
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, NWFAST_DISPATCH_KEY, m) {
  m.impl("cuda_forward", TORCH_BOX(&nwfast::forward));
  m.impl("cuda_backward", TORCH_BOX(&nwfast::backward));
}

// The module itself is empty; loading it runs the registration above.
extern "C" PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
