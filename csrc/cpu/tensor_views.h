// From torch's tensors to views of them, and to new ones: what every file that registers operators of the CPU needs.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

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

// (*B, rows, columns) in canonical form.
inline View matrix_view(const Tensor& tensor, const Batch& batch) {
  const int ndim = static_cast<int>(tensor.dim());
  return view_of(tensor, batch, ndim - 2, ndim - 2, ndim - 1);
}

// (*B, n): key weights, w, gradients of lse.
inline View vector_view(const Tensor& tensor, const Batch& batch) {
  const int ndim = static_cast<int>(tensor.dim());
  return view_of(tensor, batch, ndim - 1, ndim - 1, ndim - 1);
}

// Sizes and views of the canonical form, but for key weights.
inline void read_canonical(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                           Problem& problem) {
  Batch& batch = problem.batch;
  read_sizes(query, key, value, w, problem);
  batch.rank = static_cast<int>(query.dim()) - 2;
  for (int dim = 0; dim < batch.rank; ++dim) {
    batch.sizes[dim] = common_size(query, key, value, dim);
    batch.count *= batch.sizes[dim];
  }
  problem.query = matrix_view(query, batch);
  problem.key = matrix_view(key, batch);
  problem.value = matrix_view(value, batch);
  problem.w = vector_view(w, batch);
}

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// A copy, (rows, columns), or a vector where there are no columns.
template <typename V>
Tensor tensor_of(const std::vector<V>& from, int64_t columns = 0) {
  const int64_t sizes[2] = {static_cast<int64_t>(from.size()) / (columns > 0 ? columns : 1), columns};
  const ScalarType dtype = std::is_same<V, int64_t>::value  ? ScalarType::Long
                           : std::is_same<V, double>::value ? ScalarType::Double
                                                            : ScalarType::Float;
  const Tensor tensor = empty(sizes, columns > 0 ? 2 : 1, dtype);
  if (!from.empty()) std::memcpy(tensor.mutable_data_ptr(), from.data(), from.size() * sizeof(V));
  return tensor;
}

}  // namespace nwfast
