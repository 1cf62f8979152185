// The operators nwfast::native_fgt_local_linear and native_auto_local_linear: local lines in two and three features in
// one pass (grid/local_linear.h), of canonical input. Results are in the arithmetic dtype of query: fit (*B, M, C) and
// slope (*B, M, D, C); with `moments` means (*B, M, C + D) and inverse (*B, M, D, D), else these are empty; and of
// LocalLinearRows the rows that are left, those that are weak and the moments of these. The first are [-1] where the
// dense method is faster, or the data is none for this pass: there are no results then.

#include "grid/local_linear.h"

#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "drivers.h"
#include "tensor_views.h"
#include "tiny_weights.h"
#include "zero_weights.h"

namespace nwfast {
namespace {

using Lines = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor lines_of(const Problem& problem, int64_t rows, int64_t columns, ScalarType dtype, bool wanted) {
  int64_t sizes[kMaxRank + 3] = {0};
  int64_t ndim = 0;
  if (!wanted) return empty(sizes, 1, dtype);
  for (; ndim < problem.batch.rank; ++ndim) sizes[ndim] = problem.batch.sizes[ndim];
  sizes[ndim++] = problem.queries;
  if (rows > 0) sizes[ndim++] = rows;
  sizes[ndim++] = columns;
  return empty(sizes, ndim, dtype);
}

template <typename R>
bool run_lines(const Problem& problem, const Tensor (&lines)[4], grid::LocalLinearRows& rest) {
  return grid::local_linear<R>(problem, {data<R>(lines[0]), data<R>(lines[1]), data<R>(lines[2]), data<R>(lines[3])},
                               rest);
}

template <Method method>
Lines local_linear(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& w,
                   const std::optional<Tensor>& key_weight, bool exclude_self, bool moments) {
  Problem problem;
  TinyWeights weights;
  problem.exclude_self = exclude_self;
  read_canonical(query, key, value, w, problem);
  check(problem.features == 2 || problem.features == 3);
  check_sizes(key_weight, problem);
  if (key_weight) {
    problem.key_weight = vector_view(*key_weight, problem.batch);
    weights.rescale(problem);
  }
  const WithoutLeftOut kept(problem, false);
  grid::LocalLinearRows rest;
  const bool empty_batch = problem.batch.count == 0 || problem.queries == 0;
  bool serves = true;
  if (method == Method::kAuto && !empty_batch) {
    Problem all = kept.problem();  // the columns of the passes that serve otherwise
    all.channels += problem.features;
    serves = linear_is_faster(kept.problem()) || linear_is_faster(all);
  }
  const bool wide = problem.query.dtype == Dtype::kDouble;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t channels = problem.channels, features = problem.features;
  const Tensor lines[4] = {lines_of(problem, 0, channels, dtype, serves),
                           lines_of(problem, features, channels, dtype, serves),
                           lines_of(problem, 0, channels + features, dtype, serves && moments),
                           lines_of(problem, features, features, dtype, serves && moments)};
  if (serves && !empty_batch) {
    serves = wide ? run_lines<double>(kept.problem(), lines, rest) : run_lines<float>(kept.problem(), lines, rest);
  }
  if (!serves) {
    rest = {};
    rest.left.assign(1, -1);
  }
  return {lines[0], lines[1], lines[2], lines[3], tensor_of(rest.left), tensor_of(rest.weak), tensor_of(rest.moments)};
}

}  // namespace
}  // namespace nwfast

STABLE_TORCH_LIBRARY_IMPL(nwfast, CPU, m) {
  using nwfast::Method;
  m.impl("native_fgt_local_linear", TORCH_BOX(&nwfast::local_linear<Method::kLinear>));
  m.impl("native_auto_local_linear", TORCH_BOX(&nwfast::local_linear<Method::kAuto>));
}
