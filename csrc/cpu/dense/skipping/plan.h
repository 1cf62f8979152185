// Whether a call leaves out pairs that cannot matter, and the orders of its keys and rows for that.
//
// A pair matters where its weight is more than 2^-kNegligible / keys of what the row's weights add up to: all others
// together are below the rounding error. With keys and rows in a spatial order (order.h) most of them are told by
// bounding boxes (boxes.h), a block of rows and a tile of keys at a time. That pays where many pairs are far apart by
// that measure, which a sample of them shows before anything is ordered; then some blocks are looked at as they would
// be computed (NearKeys::pays, NearRows::pays). Where it does not pay, all is as if there were no order.

#pragma once

#include <memory>
#include <vector>

#include "order.h"

namespace nwfast {

constexpr int64_t kNearRowBlock = 32;  // rows that share the keys that may matter to one of them
// Fewer where rows are few or, as the part of all that others left over, far apart.
inline int64_t near_block(int64_t rows) { return rows < 8 * kNearRowBlock ? 4 : kNearRowBlock; }

template <typename R>
constexpr double kNegligible = sizeof(R) == 4 ? kNegligibleFloat : kNegligibleDouble;

// NWFAST_CPU_SKIPPING=always or never, for tests and comparisons.
enum class Skipping { kNever, kAuto, kAlways };
Skipping skipping();

// The orders of one batch element.
class SpatialPlan {
 public:
  // `negligible`: of the dtype of the data.
  SpatialPlan(const Problem& problem, int64_t b, double negligible, bool serial);
  SpatialPlan(const SpatialPlan&) = delete;
  SpatialPlan& operator=(const SpatialPlan&) = delete;

  bool active() const { return active_; }
  // Rows and keys as they come.
  void give_up();

  // The keys by their places, or null where they stay as they are.
  const uint32_t* key_order() const { return active_ && keys_ ? keys_->order() : nullptr; }
  // All rows, in the order in which they are computed.
  const std::vector<int64_t>& rows() const { return rows_; }
  // A place among keys near a query, or -1; of coordinates as the caller gave them.
  int64_t home(const double* query) const;

 private:
  bool sample_says_so(const Problem& problem, int64_t b, double negligible) const;
  bool comes_in_order(const Problem& problem, int64_t b) const;
  void order_rows(const Problem& problem, int64_t b, bool serial);
  // Coordinates (rows, features) in units of the score, about the middle; finite[i]: whether they are numbers.
  bool scaled(const Problem& problem, const View& view, int64_t b, int64_t n, bool serial, float* out,
              char* finite) const;

  bool active_ = false;
  std::vector<double> scale_, middle_;  // (features)
  std::unique_ptr<SpatialOrder> keys_;
  std::vector<int64_t> rows_;
};

}  // namespace nwfast
