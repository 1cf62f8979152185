// Keys behind the edge of a gap, as few weighted sources: for rows in the gap that lie delta from the edge, a key z
// behind it counts exp(-z (2 delta + z) w^2 / 2). Boxes in z have the half width 2^-level bandwidths, delta at most 2 *
// 2^level: within a box the weights differ by e^4 at most (and by the Gaussian of z), so that a box's sum is accurate
// relative to itself, however little it counts beside others. Each crowded box becomes `terms` keys at its Chebyshev
// nodes.

#pragma once

#include "data.h"

namespace nwfast {
namespace linear {

struct EdgeBox {
  int64_t begin, end;   // keys
  double centre, half;  // in z
  int64_t source;       // its first source
  bool crowded;
};

template <typename R>
class Edge {
 public:
  // side 0: keys up to place `edge` and below, side 1: from it on upwards; those at most `depth` behind it.
  Edge(const R* key, int64_t n, int64_t edge, int side, double half, double depth, int terms)
      : key_(key), side_(side), terms_(terms), origin_(key[edge]) {
    const double pi = 3.14159265358979323846;
    for (int i = 0; i < terms; ++i) node_[i] = std::cos(pi * (i + 0.5) / terms);
    int64_t begin = side == 0 ? 0 : edge, end = side == 0 ? edge + 1 : n;
    (side == 0 ? begin : end) = first_behind(begin, end, [depth](double z) { return z > depth; });
    keys_begin_ = begin;
    keys_end_ = end;
    if (end - begin <= 2 * kDirectKeys) {
      push(begin, end, 0, half, false);
      return;
    }
    while (begin < end) {  // from the edge outwards
      const double z = behind(side == 0 ? end - 1 : begin);
      const double number = std::floor(z / (2 * half)), far = (number + 1) * 2 * half;
      const int64_t edge_of_box =
          first_behind(begin, end, [z, far](double other) { return other >= far && other > z; });
      const int64_t first = side == 0 ? edge_of_box : begin, last = side == 0 ? end : edge_of_box;
      push(first, last, number * 2 * half + half, half, last - first > terms);
      (side == 0 ? end : begin) = side == 0 ? first : last;
    }
  }

  int64_t sources() const { return static_cast<int64_t>(position_.size()); }
  const double* position() const { return position_.data(); }  // -z of each source
  int64_t keys_begin() const { return keys_begin_; }
  int64_t keys_end() const { return keys_end_; }
  const std::vector<EdgeBox>& boxes() const { return boxes_; }
  double behind(int64_t j) const { return std::fabs(origin_ - static_cast<double>(key_[j])); }

  // Charges of the sources, (columns, sources), from those of the keys.
  template <typename Load>
  std::vector<double> compress(int columns, const Load& load) const {
    std::vector<double> charge(columns * sources()), keys(columns * kSpan), moments(columns * terms_);
    for (const EdgeBox& box : boxes_) {
      std::fill(moments.begin(), moments.end(), 0.0);
      for (int64_t p = box.begin; p < box.end; p += kSpan) {
        const int64_t n = std::min(kSpan, box.end - p);
        load(p, n, keys.data(), kSpan);
        if (!box.crowded) {
          for (int c = 0; c < columns; ++c) {
            for (int64_t j = 0; j < n; ++j) {
              charge[c * sources() + box.source + (p - box.begin) + j] = keys[c * kSpan + j];
            }
          }
          continue;
        }
        double last[kSpan], current[kSpan], t[kSpan];
        for (int64_t j = 0; j < n; ++j) {
          t[j] = (behind(p + j) - box.centre) / box.half;
          current[j] = 1;
          last[j] = t[j];  // T_-1 = T_1
        }
        for (int k = 0; k < terms_; ++k) {
          for (int c = 0; c < columns; ++c) {
            double sum = 0;
            for (int64_t j = 0; j < n; ++j) sum += current[j] * keys[c * kSpan + j];
            moments[c * terms_ + k] += sum;
          }
          for (int64_t j = 0; j < n; ++j) {
            const double next = 2 * t[j] * current[j] - last[j];
            last[j] = current[j];
            current[j] = next;
          }
        }
      }
      for (int c = 0; box.crowded && c < columns; ++c) {
        for (int i = 0; i < terms_; ++i) {
          double sum = 0, last = node_[i], current = 1;
          for (int k = 0; k < terms_; ++k) {
            sum += (k ? 2 : 1) * current * moments[c * terms_ + k];
            const double next = 2 * node_[i] * current - last;
            last = current;
            current = next;
          }
          charge[c * sources() + box.source + i] = sum / terms_;
        }
      }
    }
    return charge;
  }

  // The transpose: what the keys [begin, end) get from values at the sources, (columns, pitch); sums (columns,
  // sums_pitch) are added to.
  void distribute(int64_t begin, int64_t end, int columns, const double* field, int64_t pitch, double* sums,
                  int64_t sums_pitch) const {
    for (const EdgeBox& box : boxes_) {
      for (int64_t j = std::max(begin, box.begin); j < std::min(end, box.end); ++j) {
        if (!box.crowded) {
          for (int c = 0; c < columns; ++c) {
            sums[c * sums_pitch + j - begin] += field[c * pitch + box.source + j - box.begin];
          }
          continue;
        }
        // Lagrange polynomials: (1 + 2 sum_k T_k(node) T_k(t)) / terms.
        const double t = (behind(j) - box.centre) / box.half;
        for (int i = 0; i < terms_; ++i) {
          double sum = 1, a_last = 1, a = t, b_last = 1, b = node_[i];
          for (int k = 1; k < terms_; ++k) {
            sum += 2 * a * b;
            const double a_next = 2 * t * a - a_last, b_next = 2 * node_[i] * b - b_last;
            a_last = a;
            a = a_next;
            b_last = b;
            b = b_next;
          }
          for (int c = 0; c < columns; ++c) {
            sums[c * sums_pitch + j - begin] += sum / terms_ * field[c * pitch + box.source + i];
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kSpan = 64;

  // Where among [begin, end) the keys end, seen from the edge, that are not beyond: by their distances, since sums with
  // those may round onto the edge itself.
  template <typename Beyond>
  int64_t first_behind(int64_t begin, int64_t end, const Beyond& beyond) const {
    const R *const from = key_ + begin, *const to = key_ + end;
    const auto counts = [&](R u) { return !beyond(std::fabs(origin_ - static_cast<double>(u))); };
    if (side_ == 1) return std::partition_point(from, to, counts) - key_;
    return std::partition_point(from, to, [&](R u) { return !counts(u); }) - key_;
  }

  void push(int64_t begin, int64_t end, double centre, double half, bool crowded) {
    boxes_.push_back({begin, end, centre, half, sources(), crowded});
    if (crowded) {
      for (int i = 0; i < terms_; ++i) position_.push_back(-(centre + half * node_[i]));
    } else {
      for (int64_t j = begin; j < end; ++j) position_.push_back(-behind(j));
    }
  }

  const R* key_;
  int side_, terms_;
  double origin_, node_[kMostTerms];
  int64_t keys_begin_ = 0, keys_end_ = 0;
  std::vector<EdgeBox> boxes_;
  std::vector<double> position_;
};

}  // namespace linear
}  // namespace nwfast
