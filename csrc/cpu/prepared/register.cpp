// The operators of prepared keys in two and three features. The schemas, to be defined in Python:
//   native_grid_compress(Tensor key, Tensor value, Tensor w, Tensor? key_weight) -> (Tensor, Tensor, Tensor, Tensor)
//   native_grid_predict(Tensor query, Tensor cells, Tensor series, Tensor bound, Tensor numbers)
//       -> (Tensor out, Tensor lse, Tensor left)
// key (N, D) without keys of weight 0, value (N, C), w (D,) and key_weight (N,), of one dtype, float or double. The
// four tensors of the first, in order, are the last four arguments of the second; numbers is empty where they cannot
// serve. query (D, M) is contiguous. `left` has the rows without a result, which the caller computes from all keys.

#include "../tensor_views.h"
#include "grid.h"

namespace nwfast {
namespace {

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
  const Batch& batch = problem.batch;
  problem.query = problem.key = view_of(key, batch, 0, 0, 1);
  problem.value = view_of(value, batch, 0, 0, 1);
  problem.w = view_of(w, batch, 0, -1, 0);
  if (key_weight) problem.key_weight = view_of(*key_weight, batch, 0, 0, -1);
  grid::PreparedKeys prepared;
  const bool wide = problem.key.dtype == Dtype::kDouble;
  if (!(wide ? grid::compress<double>(problem, prepared) : grid::compress<float>(problem, prepared))) prepared = {};
  return {tensor_of(prepared.cells), tensor_of(prepared.series), tensor_of(prepared.bound),
          tensor_of(prepared.numbers)};
}

template <typename R>
std::vector<int64_t> predict_as(const grid::PreparedKeysView& prepared, const Tensor& query, const Tensor& out,
                                const Tensor& lse) {
  return grid::predict<R>(prepared, data<R>(query), query.size(1),
                          {data<R>(out), data<R>(lse), nullptr, nullptr, nullptr});
}

std::tuple<Tensor, Tensor, Tensor> predict(const Tensor& query, const Tensor& cells, const Tensor& series,
                                           const Tensor& bound, const Tensor& numbers) {
  check(query.dim() == 2 && query.is_contiguous() && numbers.numel() > 1);
  const double* const known = data<double>(numbers);
  check(query.size(0) == static_cast<int64_t>(known[0]));
  const grid::PreparedKeysView prepared = {data<int64_t>(cells), cells.size(0), data<double>(series),
                                           data<double>(bound), known};
  const ScalarType dtype = query.scalar_type();
  const int64_t sizes[2] = {query.size(1), static_cast<int64_t>(known[1])};
  const Tensor out = empty(sizes, 2, dtype), lse = empty(sizes, 1, dtype);
  const std::vector<int64_t> left = dtype == ScalarType::Double ? predict_as<double>(prepared, query, out, lse)
                                                                : predict_as<float>(prepared, query, out, lse);
  return {out, lse, tensor_of(left)};
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, CPU, m) {
  m.impl("native_grid_compress", TORCH_BOX(&nwfast::compress));
  m.impl("native_grid_predict", TORCH_BOX(&nwfast::predict));
}
