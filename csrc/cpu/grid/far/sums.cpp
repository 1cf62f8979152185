// Sums of far rows over the tree of keys of tree.h.
//
// Rows are taken in groups, consecutive ones of a spatial order that lie within about a bandwidth. A group finds a key
// u* near its middle and goes down the tree, nearest nodes first. e.y - |e|^2 / 2 is linear in the row and concave in
// the key, and a sum over features: its largest value over the rows and keys of a pair of boxes is found feature by
// feature. A node is left out where its largest share is negligible beside what the rows have so far (at first the
// weight of u* itself); it acts by its expansion where that is accurate enough and less work than its keys; else its
// children are looked at, and the keys of leaves one by one.

#include <algorithm>
#include <cmath>

#include "tree.h"

namespace nwfast {
namespace grid {
namespace {

// Sums of half extents of a group, in bandwidths: beyond these it is divided, the second where it fills few vectors.
constexpr double kWideGroup = 2, kWidestGroup = 8;
constexpr int64_t kNarrowRows = 8;
constexpr double kMostExponent = 600;
constexpr double kTermWork = 2;  // of a term of an expansion in one column, beside a feature of a key in a direct sum

class FarGroup {
 public:
  explicit FarGroup(const KeyTree& tree) : tree_(tree), scratch_(2 * tree.terms() * kPadding) {
    sums.allocate(tree.columns * kFarRows);
  }

  Buffer<double> sums;  // (columns, kFarRows)
  double shift[kFarRows];

  // False where some row was not settled; query (features, n), of which some rows around `middle`.
  bool sum(const double* query, int64_t n, const uint32_t* some, int64_t rows, const double* middle) {
    rows_ = rows;
    place(query, n, some, middle);
    std::fill_n(sums.get(), tree_.columns * kFarRows, 0.0);
    least_ = tree_.charge[nearest_];
    bool settled = descend();
    for (int64_t i = 0; i < rows; ++i) settled &= sums[i] > 0 && std::isfinite(sums[i]);
    return settled;
  }

 private:
  struct Bounds {
    double most;    // of e.y - |e|^2 / 2 over all rows and keys of a node
    double centre;  // over all rows, of the centre of the node
    double reach;   // of |d.z|
  };
  struct Item {
    int64_t node;
    double bound;   // what it is looked at by: its squared distance, or the most that it may add
    Bounds bounds;  // of what is summed
  };

  // Rows relative to the key nearest to their middle.
  void place(const double* query, int64_t n, const uint32_t* some, const double* middle) {
    const int64_t padded_rows = padded(rows_);
    double farthest = 0;
    nearest_ = nearest(middle);
    std::fill_n(shift, kFarRows, 0.0);
    for (int f = 0; f < tree_.features; ++f) {
      reference_[f] = tree_.key[f * tree_.pitch + nearest_];
      low_[f] = INFINITY;
      high_[f] = -INFINITY;
      for (int64_t i = 0; i < padded_rows; ++i) {
        const double x = query[f * n + some[std::min(i, rows_ - 1)]], difference = x - reference_[f];
        const double y = difference * tree_.scale[f], part = difference - x;
        place_[f * kFarRows + i] = y;
        rest_[f * kFarRows + i] = std::fma(difference, tree_.scale[f], -y) +
                                  ((x - (difference - part)) - (reference_[f] + part)) * tree_.scale[f];
        low_[f] = std::min(low_[f], y);
        high_[f] = std::max(high_[f], y);
        shift[i] += y * y * kHalfLog2E;
      }
      farthest = std::max(farthest, std::max(std::fabs(low_[f]), std::fabs(high_[f])));
    }
    places_ = {rows_, place_, farthest > tree_.plain_within() ? rest_ : nullptr};
  }

  // The key nearest to a point.
  int64_t nearest(const double* point) {
    int64_t best = 0;
    double least = INFINITY;
    stack_.assign(1, {0, 0.0, {}});
    while (!stack_.empty()) {
      const Item item = stack_.back();
      stack_.pop_back();
      if (item.bound >= least) continue;
      const KeyTree::Node& node = tree_.nodes[item.node];
      if (node.first >= 0) {
        Item children[2];
        for (int k = 0; k < 2; ++k) {
          children[k] = {node.first + k, distance_to(tree_.nodes[node.first + k], point), {}};
        }
        push(children, children[1].bound < children[0].bound);
        continue;
      }
      for (int64_t j = node.begin; j < node.end; ++j) {
        double square = 0;
        for (int f = 0; f < tree_.features; ++f) {
          const double offset = (point[f] - tree_.key[f * tree_.pitch + j]) * tree_.scale[f];
          square += offset * offset;
        }
        if (square < least) {
          least = square;
          best = j;
        }
      }
    }
    return best;
  }

  double distance_to(const KeyTree::Node& node, const double* point) const {
    double square = 0;
    for (int f = 0; f < tree_.features; ++f) {
      const double gap = std::max(0.0, std::max(node.low[f] - point[f], point[f] - node.high[f])) * tree_.scale[f];
      square += gap * gap;
    }
    return square;
  }

  Bounds bounds_of(const KeyTree::Node& node) const {
    Bounds bounds{0, 0, 0};
    for (int f = 0; f < tree_.features; ++f) {
      const double low = (node.low[f] - reference_[f]) * tree_.scale[f];
      const double high = (node.high[f] - reference_[f]) * tree_.scale[f];
      const double centre = low / 2 + high / 2;
      const double at_low = std::min(std::max(low_[f], low), high), at_high = std::min(std::max(high_[f], low), high);
      bounds.most += std::max(at_low * (low_[f] - at_low / 2), at_high * (high_[f] - at_high / 2));
      bounds.centre += std::max(centre * low_[f], centre * high_[f]) - centre * centre / 2;
      bounds.reach += (high / 2 - low / 2) * std::max(std::fabs(low_[f] - centre), std::fabs(high_[f] - centre));
    }
    return bounds;
  }

  Item item_of(int64_t node) const {
    const Bounds bounds = bounds_of(tree_.nodes[node]);
    return {node, bounds.most, bounds};
  }

  // False where a key is so much nearer to some row than u* that its share would overflow: with u* its nearest key, a
  // row by itself has none.
  bool descend() {
    const double share = tree_.negligible() / tree_.nodes[0].charge;
    stack_.assign(1, item_of(0));
    while (!stack_.empty()) {
      const Item item = stack_.back();
      stack_.pop_back();
      const KeyTree::Node& node = tree_.nodes[item.node];
      if (item.bound < std::log(least_ * share)) continue;
      if (expand(item.node, node, item.bounds)) continue;
      if (node.first < 0) {
        if (rows_ > 1 && item.bound > kMostExponent) return false;
        add_keys(node);
        continue;
      }
      const Item children[2] = {item_of(node.first), item_of(node.first + 1)};
      push(children, children[1].bound > children[0].bound);
    }
    return true;
  }

  // Adds a node by its expansion, if that is accurate and cheap enough.
  bool expand(int64_t number, const KeyTree::Node& node, const Bounds& bounds) {
    const double most = std::max(bounds.most, bounds.centre);
    if (most > kMostExponent || bounds.reach > kMostReach) return false;
    const double allowed = tree_.tolerance() * least_ / node.charge;
    double error = std::exp(most);
    int degrees = 0;
    for (; error > allowed && degrees < tree_.degrees; ++degrees) error *= bounds.reach / (degrees + 1);
    if (error > allowed) return false;
    degrees = std::max(degrees, 1);
    const double keys = static_cast<double>(node.end - node.begin);
    const double expansion = kTermWork * far_terms(tree_.features, degrees) * tree_.columns + kKeyWork;
    if (expansion > keys * (kKeyWork + tree_.features + tree_.columns)) return false;
    FarExpansion task;
    double centre[kAxes], half[kAxes];
    tree_.extent(node, centre, half);
    task.features = tree_.features;
    task.columns = tree_.columns;
    task.degrees = degrees;
    task.rows = places_;
    task.centre = centre;
    task.reference = reference_;
    task.scale = tree_.scale;
    task.half = half;
    task.coefficients = tree_.expansion(number, scratch_.get());
    task.pitch = tree_.terms();
    task.sums = sums.get();
    grid_kernels<double>().far_expansion(task);
    update();
    return true;
  }

  void add_keys(const KeyTree::Node& node) {
    FarDirect task;
    task.features = tree_.features;
    task.columns = tree_.columns;
    task.rows = places_;
    task.n = node.end - node.begin;
    task.key = tree_.key.get() + node.begin;
    task.charge = tree_.charge.get() + node.begin;
    task.pitch = tree_.pitch;
    task.reference = reference_;
    task.scale = tree_.scale;
    task.sums = sums.get();
    grid_kernels<double>().far_direct(task);
    update();
  }

  // What every row has at least: what may be left out is relative to it.
  void update() {
    double least = INFINITY;
    for (int64_t i = 0; i < rows_; ++i) least = std::min(least, sums[i]);
    least_ = std::max(least_, least);
  }

  // Two children, the one to look at first last.
  void push(const Item* children, bool second_first) {
    stack_.push_back(children[second_first ? 0 : 1]);
    stack_.push_back(children[second_first ? 1 : 0]);
  }

  static constexpr double kMostReach = 12, kKeyWork = 14;

  const KeyTree& tree_;
  Buffer<double> scratch_;
  std::vector<Item> stack_;
  int64_t rows_ = 0, nearest_ = 0;
  double least_ = 0;
  FarPlaces places_{};
  alignas(64) double place_[kAxes * kFarRows], rest_[kAxes * kFarRows];
  double reference_[kAxes], low_[kAxes], high_[kAxes];
};

// The groups of some rows, consecutive ones of a spatial order.
class FarRows {
 public:
  FarRows(const KeyTree& tree, const double* query, int64_t n, double* shift, double* sums)
      : tree_(tree), query_(query), n_(n), shift_(shift), sums_(sums), group_(tree) {}

  void sum(const uint32_t* some, int64_t rows) {
    double middle[kAxes];
    const double extent = extent_of(some, rows, middle);
    const bool wide = rows > kNarrowRows ? extent > kWideGroup : rows > 1 && extent > kWidestGroup;
    if (rows <= kFarRows && !wide && (group_.sum(query_, n_, some, rows, middle) || rows == 1)) {
      for (int64_t i = 0; i < rows; ++i) {
        shift_[some[i]] = group_.shift[i];
        for (int c = 0; c < tree_.columns; ++c) sums_[some[i] * tree_.columns + c] = group_.sums[c * kFarRows + i];
      }
      return;
    }
    const int64_t left = rows > kBoxPoints ? left_of(rows) : rows / 2;
    sum(some, left);
    sum(some + left, rows - left);
  }

 private:
  // The sum of half extents of some rows, in bandwidths, and their middle.
  double extent_of(const uint32_t* some, int64_t rows, double* middle) const {
    double extent = 0;
    for (int f = 0; f < tree_.features; ++f) {
      double low = INFINITY, high = -INFINITY;
      for (int64_t i = 0; i < rows; ++i) {
        low = std::min(low, query_[f * n_ + some[i]]);
        high = std::max(high, query_[f * n_ + some[i]]);
      }
      middle[f] = low / 2 + high / 2;
      extent += (high / 2 - low / 2) * tree_.scale[f];
    }
    return extent;
  }

  const KeyTree& tree_;
  const double* query_;
  int64_t n_;
  double *shift_, *sums_;
  FarGroup group_;
};

}  // namespace

void sum_far_rows(const KeyTree& tree, const double* query, int64_t n, bool serial, double* shift, double* sums) {
  Buffer<float> points(n * tree.features);
  for (int f = 0; f < tree.features; ++f) {
    for (int64_t i = 0; i < n; ++i) points[i * tree.features + f] = tree.place(f, query[f * n + i]);
  }
  const SpatialOrder order(points.get(), n, tree.features, serial);
  const int64_t groups = (n + kGroupPoints - 1) / kGroupPoints;
  parallel_blocks(groups, serial, [&](int64_t group) {
    const int64_t begin = group * kGroupPoints;
    FarRows(tree, query, n, shift, sums).sum(order.order() + begin, std::min(kGroupPoints, n - begin));
  });
}

}  // namespace grid
}  // namespace nwfast
