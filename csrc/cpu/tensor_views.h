// From torch's tensors to views of them, and to new ones: what every file that registers operators of the CPU needs.
#pragma once

#include "../common/tensors.h"
#include "problem.h"

namespace nwfast {

enum class Method { kDense, kLinear, kAuto };

inline Tensor empty(const int64_t* sizes, int64_t ndim, ScalarType dtype) {
  Tensor tensor = empty_on(aoti_torch_device_type_cpu(), 0, sizes, ndim, dtype);
  size_t count = 1;
  for (int64_t dim = 0; dim < ndim; ++dim) count *= static_cast<size_t>(sizes[dim]);
  expect_writes(tensor.mutable_data_ptr(), count * static_cast<size_t>(tensor.element_size()));
  return tensor;
}

// A view of a tensor whose dimensions from `batch_dim`, and `row` and `column`, have these roles; -1 for none. Leading
// dimensions broadcast from the right.
inline View view_of(const Tensor& tensor, const Batch& batch, int leading, int row, int column) {
  View view;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(tensor);
  for (int dim = 0; dim < batch.rank; ++dim) view.batch_strides[dim] = stride_of(tensor, dim - (batch.rank - leading));
  view.row_stride = stride_of(tensor, row);
  view.column_stride = stride_of(tensor, column);
  return view;
}

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace nwfast
