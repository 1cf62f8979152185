// What grid.cpp keeps of keys.

#pragma once

#include <vector>

#include "../problem.h"

namespace nwfast {
namespace grid {

struct PreparedKeys {
  std::vector<int64_t> cells;                  // of boxes that hold keys, ascending
  std::vector<double> series, bound, numbers;  // series (boxes, columns, terms) with what their errors are told by
};
struct PreparedKeysView {
  const int64_t* cells;
  int64_t boxes;
  const double *series, *bound, *numbers;
};

// One batch element without queries and without keys of weight 0. False where series do not pay, or cannot serve.
template <typename R>
bool compress(const Problem& problem, PreparedKeys& prepared);
// out and lse of queries (features, rows); returns the rows that have no result, ascending.
template <typename R>
std::vector<int64_t> predict(const PreparedKeysView& prepared, const R* query, int64_t rows,
                             const ForwardResult<R>& result);

}  // namespace grid
}  // namespace nwfast
