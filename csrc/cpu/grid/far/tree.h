// Far rows in two and three features: a tree of keys, whose crowded nodes act by an expansion.
//
// Far from all keys a row's sum is one of tiny numbers, and only the keys behind the nearest edge count. Relative to
// the Gaussian of a key u* near the row they are of the order of 1: with y = x - u* and e = u - u* in bandwidths,
//   K(x - u) / K(x - u*) = exp(e.y - |e|^2 / 2)
// which is computed from differences of coordinates, so that nothing is lost however far the row is.
//
// About the centre c of a node, with d = u - c and z = x - c, K(x - u) = K(x - c) exp(-|d|^2 / 2) exp(d.z). The series
// of exp(d.z) is cut off where |d.z|^p / p! is small enough; |d.z| is at most `reach`, the sum over features of half
// the extent of the node times |z|. A node far from the row has a share in the row's sum of exp(-distance^2 / 2)
// relative to the nearest key, so that it may be larger than one near the edge, or have fewer terms: that is decided
// for each group of rows and each node (sums.cpp), by bounds that hold for all of its rows and keys.
//
// The tree is the spatial order of dense/skipping/order.h; expansions are made when the first group needs them, by
// whichever thread that is, always of the same numbers.

#pragma once

#include <atomic>
#include <memory>

#include "../../dense/skipping/order.h"
#include "../element.h"

namespace nwfast {
namespace grid {

class KeyTree {
 public:
  struct Node {
    int64_t begin, end;  // its keys, in the order of the tree
    int64_t first;       // of its two children, -1 for a leaf
    double low[kAxes], high[kAxes];
    double charge;  // the sum of the weights of its keys
  };

  template <typename R>
  KeyTree(const Element<R>& element, bool serial)
      : features(element.plan.features),
        columns(static_cast<int>(element.sorted.channels) + 1),
        degrees(sizeof(R) == 8  ? far_degrees(features)
                : features == 2 ? 20
                                : 14),
        tolerance_(Accuracy<R>::kAccept / 64),
        negligible_(Accuracy<R>::kBeyond),
        plain_within_(sizeof(R) == 4 ? 1e6 : 32) {
    // Those without a weight have no part in any sum, and may lie nearer to a row than all others by any measure.
    std::vector<int64_t> some;
    for (int64_t j = 0; j < element.keys.n; ++j) {
      if (element.weight(j) > 0) some.push_back(j);
    }
    const int64_t n = n_ = static_cast<int64_t>(some.size());
    for (int f = 0; f < features; ++f) {
      scale[f] = std::fabs(element.w(f));
      middle_[f] = element.key_low[f] / 2 + element.key_high[f] / 2;
    }
    const auto column = [&](int f) { return element.keys.columns.get() + f * element.keys.pitch; };
    Buffer<float> points(n * features);
    for (int f = 0; f < features; ++f) {
      for (int64_t j = 0; j < n; ++j) points[j * features + f] = place(f, column(f)[some[j]]);
    }
    const SpatialOrder order(points.get(), n, features, serial);
    pitch = padded(n);
    key.allocate(features * pitch);
    charge.allocate(columns * pitch);
    Buffer<double> loaded(columns * element.keys.n);
    element.load(0, element.keys.n, loaded.get(), element.keys.n);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t from = some[order.order()[j]];
      for (int f = 0; f < features; ++f) key[f * pitch + j] = column(f)[from];
      for (int c = 0; c < columns; ++c) charge[c * pitch + j] = loaded[c * element.keys.n + from];
    }
    build();
  }
  KeyTree(const KeyTree&) = delete;
  KeyTree& operator=(const KeyTree&) = delete;

  float place(int f, double x) const { return spatial_coordinate(x, middle_[f], scale[f]); }
  // Of a node's expansion: its centre, as keys are, and half of its extent, in bandwidths.
  void extent(const Node& node, double* centre, double* half) const {
    for (int f = 0; f < features; ++f) {
      centre[f] = node.low[f] / 2 + node.high[f] / 2;
      half[f] = (node.high[f] / 2 - node.low[f] / 2) * scale[f];
    }
  }
  // Of an expansion: (columns, terms()), made if it is not there yet.
  const double* expansion(int64_t node, double* scratch) const;
  int64_t terms() const { return far_terms(features, degrees); }
  // How far off the sum that a node adds may be, and how much all that is left out may add, relative to a row's total.
  double tolerance() const { return tolerance_; }
  double negligible() const { return negligible_; }
  // In bandwidths: rounding takes some 1e-15 times the distance from exponents, which further rows have in two parts.
  double plain_within() const { return plain_within_; }

  const int features, columns, degrees;  // of expansions: no node that needs more acts by one
  double scale[kAxes];                   // |w|
  int64_t pitch;
  Buffer<double> key, charge;  // (features, pitch), (columns, pitch)
  std::vector<Node> nodes;     // the first is the root

 private:
  void build();
  void enclose(int64_t number);

  int64_t n_;
  double middle_[kAxes], tolerance_, negligible_, plain_within_;
  Buffer<double> inverse_factorial_;
  struct Expansion {
    std::atomic<double*> coefficients{nullptr};
    ~Expansion() { delete[] coefficients.load(); }
  };
  std::unique_ptr<Expansion[]> expansions_;
};

// Sums of n rows, query (features, n): sums (n, columns) relative to 2^-shift; a total of 0 or one that is not finite
// where the row was not settled. Rows are computed in groups side by side, each by itself: in any number of threads.
void sum_far_rows(const KeyTree& tree, const double* query, int64_t n, bool serial, double* shift, double* sums);

}  // namespace grid
}  // namespace nwfast
