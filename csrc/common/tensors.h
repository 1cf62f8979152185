// Tensors as the operators take and return them, in terms of LibTorch's stable ABI.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "problem.h"

namespace nwfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A refusal, by whose first words nwfast/op/call.py tells it from a failure.
inline void check(bool valid) {
  STD_TORCH_CHECK(valid, "nwfast: operators take tensors in canonical form; call nwfast.nadaraya_watson");
}

inline Dtype dtype_of(const Tensor& tensor) {
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
      STD_TORCH_CHECK(false, "nwfast: operators take dtypes float32, float64, float16 and bfloat16");
  }
}

// What sums are made in, and results come in.
inline ScalarType arithmetic_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

constexpr int64_t kMostDims = 66;  // torch has no tensors of more than 64; results have up to two more than the batch

// An uninitialised contiguous tensor on a device.
inline Tensor empty_on(int32_t device_type, int32_t device_index, const int64_t* sizes, int64_t ndim,
                       ScalarType dtype) {
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  const int32_t code = dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Long     ? aoti_torch_dtype_int64()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The stride of a dimension, -1 for none: 0 where it is broadcast.
inline int64_t stride_of(const Tensor& tensor, int64_t dim) {
  return dim >= 0 && tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

// The size of a leading dimension of the batch, over which tensors of size 1 are broadcast.
inline int64_t common_size(const Tensor& query, const Tensor& key, const Tensor& value, int64_t dim) {
  int64_t size = 1;
  for (const Tensor* tensor : {&query, &key, &value}) {
    const int64_t own = tensor->size(dim);
    check(own == 1 || size == 1 || own == size);
    if (own != 1) size = own;
  }
  return size;
}

// Sizes of the canonical form, but for those of the batch.
template <typename Problem>
void read_sizes(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w, Problem& problem) {
  const int64_t ndim = query.dim();
  check(ndim >= 2 && key.dim() == ndim && value.dim() == ndim && w.dim() >= 1 && w.dim() <= ndim - 1);
  problem.queries = query.size(ndim - 2);
  problem.keys = key.size(ndim - 2);
  problem.features = key.size(ndim - 1);
  problem.channels = value.size(ndim - 1);
  check(value.size(ndim - 2) == problem.keys && query.size(ndim - 1) == problem.features);
}

// Whether the sizes of any form are such that kernels serve them.
template <typename Problem>
void check_sizes(const std::optional<Tensor>& key_weight, const Problem& problem) {
  check(problem.keys > 0 && problem.features > 0 && problem.channels > 0 &&
        (!problem.exclude_self || problem.queries == problem.keys));
  if (key_weight) check(key_weight->dim() >= 1 && key_weight->size(key_weight->dim() - 1) == problem.keys);
}

}  // namespace nwfast
