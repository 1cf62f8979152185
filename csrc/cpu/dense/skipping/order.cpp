// The k-d order of order.h.

#include "order.h"

#include <algorithm>

#include "../../order.h"

namespace nwfast {
namespace {

constexpr int64_t kSample = 64;           // points that the widest feature of a node is told by
constexpr int64_t kLocalNumbers = 20480;  // coordinates of a subtree that is finished in the cache
constexpr int64_t kMostLocal = 4096;      // and its points
constexpr int64_t kLeastToCount = 512;    // points whose median is looked for in a histogram
constexpr int kBins = 1024;

int64_t depth_of(int64_t n) {
  int64_t depth = 1;
  for (; n > kBoxPoints; ++depth) n = std::max(left_of(n), n - left_of(n));
  return depth;
}

// The widest feature of points by a sample; at(i, f) is a coordinate of the i-th of n.
template <typename At>
int64_t widest(int64_t n, int64_t features, const At& at) {
  const int64_t count = std::min(n, kSample);
  int64_t best = 0;
  float most = -1;
  for (int64_t f = 0; f < features; ++f) {
    float low = at(0, f), high = low;
    for (int64_t s = 1; s < count; ++s) {
      const float x = at(count < n ? s * (n - 1) / (count - 1) : s, f);
      low = std::min(low, x);
      high = std::max(high, x);
    }
    if (high - low > most) {
      most = high - low;
      best = f;
    }
  }
  return best;
}

// Sorted by coordinate, then by index: no two are equal.
uint64_t item(float x, uint32_t index) { return static_cast<uint64_t>(ordered_bits(x)) << 32 | index; }
float coordinate_of(uint64_t item) { return from_ordered_bits<float>(static_cast<uint32_t>(item >> 32)); }

// The items before place `left` of the sorted ones first, and that one at it; in `spare`, or in `items` themselves, as
// is returned. Counting tells the bin that the place is in, without branches; the rest is among few.
uint64_t* parted(uint64_t* items, uint64_t* spare, int64_t n, int64_t left) {
  const auto few = [&] {
    std::nth_element(items, items + left, items + n);
    return items;
  };
  if (n < kLeastToCount) return few();
  float low = coordinate_of(items[0]), high = low;
  for (int64_t i = 1; i < n; ++i) {
    const float x = coordinate_of(items[i]);
    low = std::min(low, x);
    high = std::max(high, x);
  }
  const float scale = (kBins - 1) / (high - low);
  if (!(scale < 1e30f)) return few();
  const auto bin = [&](uint64_t item) { return static_cast<int>((coordinate_of(item) - low) * scale); };
  uint32_t counts[kBins] = {};
  for (int64_t i = 0; i < n; ++i) ++counts[bin(items[i])];
  int middle = 0;
  int64_t before = 0;
  for (; before + counts[middle] <= left; ++middle) before += counts[middle];
  int64_t ends[3] = {0, before, before + counts[middle]};
  for (int64_t i = 0; i < n; ++i) {
    const int b = bin(items[i]);
    spare[ends[(b >= middle) + (b > middle)]++] = items[i];
  }
  std::nth_element(spare + before, spare + left, spare + before + counts[middle]);
  return spare;
}

}  // namespace

// A node and all below it, on copies of its points.
class SpatialOrder::Subtree {
 public:
  Subtree(SpatialOrder& whole, const Node& node, const float* points)
      : whole_(whole), n_(node.end - node.begin), points_(n_ * whole.features_), index_(n_) {
    uint32_t* const places = whole.order_.get() + node.begin;
    for (int64_t i = 0; i < n_; ++i) {
      index_[i] = static_cast<uint32_t>(i);
      for (int64_t f = 0; f < whole.features_; ++f) points_[f * n_ + i] = points[places[i] * whole.features_ + f];
    }
    divide({node.number, 0, n_}, whole.items_.get() + node.begin, whole.spare_.get() + node.begin);
    for (int64_t i = 0; i < n_; ++i) index_[i] = places[index_[i]];
    std::copy_n(index_.get(), n_, places);
  }

 private:
  void divide(const Node& node, uint64_t* items, uint64_t* spare) {
    const int64_t n = node.end - node.begin;
    if (n <= kBoxPoints) return;
    uint32_t* const index = index_.get() + node.begin;
    const int64_t feature =
        widest(n, whole_.features_, [&](int64_t i, int64_t f) { return points_[f * n_ + index[i]]; });
    const float* const column = points_.get() + feature * n_;
    for (int64_t i = 0; i < n; ++i) items[i] = item(column[index[i]], index[i]);
    const int64_t left = left_of(n);
    const uint64_t* const two = parted(items, spare, n, left);
    for (int64_t i = 0; i < n; ++i) index[i] = static_cast<uint32_t>(two[i]);
    whole_.splits_[node.number] = {feature, coordinate_of(two[left])};
    divide({2 * node.number + 1, node.begin, node.begin + left}, items, spare);
    divide({2 * node.number + 2, node.begin + left, node.end}, items, spare);
  }

  SpatialOrder& whole_;
  int64_t n_;
  Buffer<float> points_;  // (features, n)
  Buffer<uint32_t> index_;
};

SpatialOrder::SpatialOrder(const float* points, int64_t n, int64_t features, bool serial)
    : n_(n), features_(features), order_(n), items_(n), spare_(n), splits_((size_t{1} << depth_of(n)) + 1) {
  for (int64_t i = 0; i < n; ++i) order_[i] = static_cast<uint32_t>(i);
  const int64_t local = std::max(kGroupPoints, std::min(kMostLocal, kLocalNumbers / features));
  std::vector<Node> level = {{0, 0, n}}, next;
  while (!level.empty()) {
    parallel_blocks(static_cast<int64_t>(level.size()), serial, [&](int64_t i) {
      if (level[i].end - level[i].begin <= local) {
        Subtree(*this, level[i], points);
      } else {
        divide(level[i], points);
      }
    });
    next.clear();
    for (const Node& node : level) {
      if (node.end - node.begin <= local) continue;
      const int64_t middle = node.begin + left_of(node.end - node.begin);
      next.push_back({2 * node.number + 1, node.begin, middle});
      next.push_back({2 * node.number + 2, middle, node.end});
    }
    level.swap(next);
  }
}

void SpatialOrder::divide(const Node& node, const float* points) {
  const int64_t n = node.end - node.begin, left = left_of(n);
  uint32_t* const index = order_.get() + node.begin;
  uint64_t* const items = items_.get() + node.begin;
  const int64_t feature = widest(n, features_, [&](int64_t i, int64_t f) { return points[index[i] * features_ + f]; });
  for (int64_t i = 0; i < n; ++i) items[i] = item(points[index[i] * features_ + feature], index[i]);
  const uint64_t* const two = parted(items, spare_.get() + node.begin, n, left);
  for (int64_t i = 0; i < n; ++i) index[i] = static_cast<uint32_t>(two[i]);
  splits_[node.number] = {feature, coordinate_of(two[left])};
}

int64_t SpatialOrder::home(const float* point) const {
  int64_t begin = 0, end = n_, number = 0;
  while (end - begin > kBoxPoints) {
    const Split& split = splits_[number];
    const bool right = point[split.feature] >= split.value;
    const int64_t middle = begin + left_of(end - begin);
    (right ? begin : end) = middle;
    number = 2 * number + (right ? 2 : 1);
  }
  return begin;
}

}  // namespace nwfast
