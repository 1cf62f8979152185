// Near rows: of one channel, with few keys in their windows, summed one by one in the precision of the input
// (kernels/near_rows.h).

#pragma once

#include "direct.h"

namespace nwfast {
namespace linear {

constexpr int64_t kNearKeys = 64;       // keys in the common window of a vector of rows that are summed one by one
constexpr int64_t kNearSpread = 48;     // keys between the rows of a vector from which on rows are summed singly
constexpr int64_t kAloneKeys = 128;     // the same of a single row, where queries are sparse
constexpr int64_t kFewKeys = 64;        // just beyond that window
constexpr double kNearWeightSpan = 40;  // so that the sum of float weights stays far above the least float
// Floats do not underflow to 0 where near kernels sum (kernels/near_rows.h), and what far keys add by that must not
// show.
constexpr double kNearMost = 1e13;  // bandwidths from 0
constexpr double kNearMostValue = 1e15;
constexpr double kNearLeastCharge = -40;  // log of the least product of the size of values and a float weight
constexpr double kNearMostGrad = 1e12;    // divided by the total
constexpr double kNearLeast = 1e-15;      // scale, whose square and the squares of whose bandwidths are floats

// Whether R has the range for sums one by one (kernels/near_rows.h).
template <typename R>
bool near_suits(const Data<R>& data, const Plan& plan) {
  const double magnitude = std::fmax(data.key_range.magnitude(), data.query_range.magnitude());
  if (magnitude * plan.scale > kNearMost) return false;
  const double size = data.channels == 1 ? data.values[0].magnitude() : 0;
  if (sizeof(R) == 4 && size > 0 && std::log(size) - data.weight_span < kNearLeastCharge) return false;
  return data.channels == 1 && data.weight_span < kNearWeightSpan && data.weight_factor < 1e38 &&
         plan.scale > kNearLeast && plan.scale < 1 / kNearLeast && magnitude * plan.scale * plan.scale < 1e36 &&
         size < kNearMostValue;
}

template <typename R>
class NearRowPass {
 public:
  explicit NearRowPass(const RowTask<R>& rows) : rows_(rows), suits_(near_suits(rows.data, rows.plan)) {
    if (!suits_) return;
    sums_.resize(rows.slots * rows.columns * kPaddedRows);
    apart_.resize(kPaddedRows);
  }

  // Sums and finishes rows from `begin` on, whose windows begin at `window`; returns how many, 0 where too many keys
  // count for them.
  int64_t run(int64_t begin, int64_t end, int64_t window, double reach, DirectRows<R>& direct) {
    if (!suits_ || !few_keys(begin, std::min(begin + kGroup, end), window, reach)) return 0;
    const int64_t n = sum(begin, std::min(end, begin + kEvaluated), direct.place_at(begin));
    if (n > 0) rows_.finish(begin, n, sums_.data(), kPaddedRows, apart_.data());
    return n;
  }

 private:
  // Whether sum() is likely to serve row i: not too many keys in its window, which begins at `window`.
  bool few_keys(int64_t i, int64_t stop, int64_t window, double reach) const {
    const double x = rows_.data.query[i], last = rows_.data.query[stop - 1];
    const auto beyond = [&](int64_t place, double bound) {
      return place >= rows_.data.keys || rows_.data.key[place] > bound;
    };
    const bool sparse = !beyond(window + kNearSpread, last - reach);
    const int64_t most = sparse ? kAloneKeys : kNearKeys;
    return beyond(window + most + most / 4, x + reach);
  }

  // Sums rows one by one as long as few keys count for them; returns how many it summed.
  int64_t sum(int64_t begin, int64_t end, int64_t place) {
    NearTask<R> task;
    task.x = rows_.data.query + begin;
    task.rows = end - begin;
    task.first_row = begin;
    task.key = rows_.data.key;
    task.keys = rows_.data.keys;
    task.place = place;
    task.value = rows_.data.value;
    task.value_stride = rows_.data.row_stride;
    task.centre = static_cast<R>(rows_.data.centre[0]);
    task.weight = rows_.data.weight;
    task.weight_factor = static_cast<R>(rows_.data.weight_factor);
    task.exclude = rows_.data.exclude;
    const int64_t* const places = rows_.data.excluded_places();
    task.excluded = places ? places + begin : nullptr;
    task.scale = rows_.plan.scale;
    task.log_span = rows_.plan.log_span + rows_.data.weight_span;
    task.near_span = std::min(task.log_span, std::log(kFewKeys / (Accuracy<R>::kAccept / 4)) + rows_.data.weight_span);
    task.level_zero = kLevelZero;
    task.most = kNearKeys;
    task.most_alone = kAloneKeys;
    task.spread = kNearSpread;
    task.few = kFewKeys;
    task.offsets = rows_.plan.offsets;
    task.scores = rows_.plan.scores;
    task.sums = sums_.data();
    task.apart = apart_.data();
    task.sums_pitch = kPaddedRows;
    return rows_.table.near(task);
  }

  const RowTask<R>& rows_;
  const bool suits_;
  std::vector<double> sums_, apart_;
};

}  // namespace linear
}  // namespace nwfast
