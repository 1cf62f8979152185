// The operators of prepared keys in two and three features. The schemas, to be defined in Python:
//   native_grid_compress(Tensor key, Tensor value, Tensor w, Tensor? key_weight) -> (Tensor, Tensor, Tensor, Tensor)
//   native_grid_predict(Tensor query, Tensor cells, Tensor series, Tensor bound, Tensor numbers)
//       -> (Tensor out, Tensor lse, Tensor left)
// key (N, D) without keys of weight 0, value (N, C), w (D,) and key_weight (N,), of one dtype, float or double. The
// four tensors of the first, in order, are the last four arguments of the second; numbers is empty where they cannot
// serve. query (D, M) is contiguous. `left` has the rows without a result, which the caller computes from all keys.

#include "../../common/tensors.h"
#include "grid.h"

namespace nwfast {
namespace {

Tensor empty(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[2] = {rows, columns};
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, columns < 0 ? 1 : 2, dtype);
}

template <typename V>
Tensor tensor_of(const std::vector<V>& from, ScalarType dtype) {
  const Tensor tensor = empty(static_cast<int64_t>(from.size()), -1, dtype);
  if (!from.empty()) std::memcpy(tensor.mutable_data_ptr(), from.data(), from.size() * sizeof(V));
  return tensor;
}

View view_of(const Tensor& tensor) {
  View view;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(tensor);
  const bool vector = tensor.dim() == 1;
  view.row_stride = tensor.stride(0);
  view.column_stride = vector ? tensor.stride(0) : tensor.stride(1);
  return view;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compress(const Tensor& key, const Tensor& value, const Tensor& w,
                                                    const std::optional<Tensor>& key_weight) {
  check(key.dim() == 2 && value.dim() == 2 && w.dim() == 1 && w.size(0) == key.size(1) && key.size(0) > 0 &&
        (key.size(1) == 2 || key.size(1) == 3) && value.size(0) == key.size(0));
  Problem problem;
  problem.queries = 0;
  problem.keys = key.size(0);
  problem.features = key.size(1);
  problem.channels = value.size(1);
  problem.exclude_self = false;
  problem.query = problem.key = view_of(key);
  problem.value = view_of(value);
  problem.w = view_of(w);
  if (key_weight) problem.key_weight = view_of(*key_weight);
  grid::PreparedKeys prepared;
  const bool wide = problem.key.dtype == Dtype::kDouble;
  if (!(wide ? grid::compress<double>(problem, prepared) : grid::compress<float>(problem, prepared))) prepared = {};
  return {tensor_of(prepared.cells, ScalarType::Long), tensor_of(prepared.series, ScalarType::Double),
          tensor_of(prepared.bound, ScalarType::Double), tensor_of(prepared.numbers, ScalarType::Double)};
}

template <typename R>
std::vector<int64_t> predict_as(const grid::PreparedKeysView& prepared, const Tensor& query, const Tensor& out,
                                const Tensor& lse) {
  return grid::predict<R>(
      prepared, static_cast<const R*>(query.const_data_ptr()), query.size(1),
      {static_cast<R*>(out.mutable_data_ptr()), static_cast<R*>(lse.mutable_data_ptr()), nullptr, nullptr, nullptr});
}

std::tuple<Tensor, Tensor, Tensor> predict(const Tensor& query, const Tensor& cells, const Tensor& series,
                                           const Tensor& bound, const Tensor& numbers) {
  check(query.dim() == 2 && query.is_contiguous() && numbers.numel() > 1);
  const double* const known = static_cast<const double*>(numbers.const_data_ptr());
  check(query.size(0) == static_cast<int64_t>(known[0]));
  const auto data = [](const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); };
  const grid::PreparedKeysView prepared = {static_cast<const int64_t*>(cells.const_data_ptr()), cells.size(0),
                                           data(series), data(bound), known};
  const ScalarType dtype = query.scalar_type();
  const Tensor out = empty(query.size(1), static_cast<int64_t>(known[1]), dtype), lse = empty(query.size(1), -1, dtype);
  const std::vector<int64_t> left = dtype == ScalarType::Double ? predict_as<double>(prepared, query, out, lse)
                                                                : predict_as<float>(prepared, query, out, lse);
  return {out, lse, tensor_of(left, ScalarType::Long)};
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, CPU, m) {
  m.impl("native_grid_compress", TORCH_BOX(&nwfast::compress));
  m.impl("native_grid_predict", TORCH_BOX(&nwfast::predict));
}
