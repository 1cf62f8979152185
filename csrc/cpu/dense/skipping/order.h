// A spatial order of points: consecutive points lie together, in any number of features.
//
// Recursive splits at a median (a k-d tree): a range of points is divided along its widest feature, as a sample of it
// shows, until it is no longer than kBoxPoints. Ranges of kGroupPoints and their halves, down to kBoxPoints, are
// nodes of the tree: every aligned part of so many points has a tight bounding box. O(n log n), in parallel over the
// nodes of a level; small nodes are finished in the cache.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../../problem.h"

namespace nwfast {

constexpr int64_t kBoxPoints = 32, kGroupPoints = 512;

// Of n > kBoxPoints points of a node: how many its first child has.
inline int64_t left_of(int64_t n) {
  const int64_t unit = n > kGroupPoints ? kGroupPoints : kBoxPoints;  // a multiple of the parts that are to be nodes
  return (n / 2 + unit / 2) / unit * unit;
}

// A coordinate as orders take it. Far away they may fall together: an order is none of exactness.
inline float spatial_coordinate(double x, double middle, double scale) {
  return static_cast<float>(std::fmin(std::fmax((x - middle) * scale, -1e30), 1e30));
}

class SpatialOrder {
 public:
  // points (n, features), finite; n < 2^32. The order does not depend on the number of threads.
  SpatialOrder(const float* points, int64_t n, int64_t features, bool serial);

  // Which point comes at each place.
  const uint32_t* order() const { return order_.get(); }
  // The first place of the leaf that a point would fall into.
  int64_t home(const float* point) const;

 private:
  struct Split {
    int64_t feature = -1;  // none: a leaf
    float value = 0;
  };
  // The node of this number, with children 2 number + 1 and 2 number + 2, of the points at [begin, end).
  struct Node {
    int64_t number, begin, end;
  };
  class Subtree;

  void divide(const Node& node, const float* points);

  int64_t n_, features_;
  Buffer<uint32_t> order_;
  Buffer<uint64_t> items_, spare_;  // (coordinate, point) of the nodes being divided
  std::vector<Split> splits_;
};

}  // namespace nwfast
