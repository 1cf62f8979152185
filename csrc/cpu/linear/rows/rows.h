// Sums over the keys for every row (query): by expansion where boxes are crowded, directly where keys or queries are
// few, and, for rows that would visit many keys one by one, from keys compressed around the gap they lie in.
//
// A row's sums are relative to a reference r: exp(-((x - u)^2 - (x - r)^2) w^2 / 2). r is the row's nearest key where
// that is more than kLevelZero bandwidths away, and x itself elsewhere.

#pragma once

#include <functional>

#include "../boxes.h"
#include "../data.h"

namespace nwfast {
namespace linear {

// The sums of a row: of exp(.) a_j and exp(.) a_j (v_j - centre), and of these times (r - k_j) and times
// (x - k_j)^2 - (x - r)^2 where asked for.
struct RowSums {
  const double* sums;  // (slots, columns, pitch), at the row's place
  int64_t pitch;
  int columns;
  int offset_slot, score_slot;
  double apart;  // x - r

  RowSums(const Plan& plan, int channels, const double* from, int64_t distance, double far)
      : sums(from), pitch(distance), columns(channels + 1), offset_slot(1), score_slot(1 + plan.offsets), apart(far) {}
  double total() const { return sums[0]; }
  double value(int c) const { return sums[(c + 1) * pitch]; }
  double offset(int column) const { return sums[(offset_slot * columns + column) * pitch]; }
  // d out / d query over -w^2: the covariance of the offset and the channel's value.
  double offset_covariance(int c) const { return (offset(c + 1) - value(c) / total() * offset(0)) / total(); }
  double score(int column) const { return sums[(score_slot * columns + column) * pitch]; }
};

// Takes the sums of rows [first, first + n): (slots, columns, pitch), relative to x - apart, or to x where that is
// null.
using RowFinish = std::function<void(int64_t first, int64_t n, const double* sums, int64_t pitch, const double* apart)>;

// Sums every row in the way that its surroundings ask for; `expanded`: whether boxes have moments. Rows are finished by
// several threads, each once.
template <typename R>
void sum_rows(const Data<R>& data, const Plan& plan, const Boxes<R>& boxes, bool expanded, const RowFinish& finish,
              bool serial);

}  // namespace linear
}  // namespace nwfast
