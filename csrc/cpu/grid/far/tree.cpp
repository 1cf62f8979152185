// The tree of keys of tree.h: its nodes, and their expansions.

#include "tree.h"

namespace nwfast {
namespace grid {

void KeyTree::build() {
  // 1 / a! in the order of terms: those of fewer features, then the last feature's exponent up by one.
  const auto factorials = [](int degree, int features_left, const auto& self) -> std::vector<double> {
    double factorial = 1;
    for (int k = 2; k <= degree; ++k) factorial *= k;
    if (features_left == 1) return {1 / factorial};
    std::vector<double> terms;
    double last = 1;
    for (int exponent = 0; exponent <= degree; ++exponent) {
      last *= exponent > 0 ? exponent : 1;
      for (const double term : self(degree - exponent, features_left - 1, self)) terms.push_back(term / last);
    }
    return terms;
  };
  inverse_factorial_.allocate(terms());
  double* to = inverse_factorial_.get();
  for (int degree = 0; degree < degrees; ++degree) {
    const std::vector<double> terms = factorials(degree, features, factorials);
    to = std::copy(terms.begin(), terms.end(), to);
  }
  nodes.push_back({0, n_, -1, {}, {}, 0});
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int64_t begin = nodes[i].begin, end = nodes[i].end;
    if (end - begin <= kBoxPoints) continue;
    const int64_t middle = begin + left_of(end - begin);
    nodes[i].first = static_cast<int64_t>(nodes.size());
    nodes.push_back({begin, middle, -1, {}, {}, 0});
    nodes.push_back({middle, end, -1, {}, {}, 0});
  }
  for (int64_t i = static_cast<int64_t>(nodes.size()) - 1; i >= 0; --i) enclose(i);
  expansions_ = std::make_unique<Expansion[]>(nodes.size());
}

// Children come behind their parents.
void KeyTree::enclose(int64_t number) {
  Node& node = nodes[number];
  if (node.first >= 0) {
    const Node &left = nodes[node.first], &right = nodes[node.first + 1];
    node.charge = left.charge + right.charge;
    for (int f = 0; f < features; ++f) {
      node.low[f] = std::fmin(left.low[f], right.low[f]);
      node.high[f] = std::fmax(left.high[f], right.high[f]);
    }
    return;
  }
  for (int f = 0; f < features; ++f) {
    node.low[f] = node.high[f] = key[f * pitch + node.begin];
    for (int64_t j = node.begin; j < node.end; ++j) {
      node.low[f] = std::fmin(node.low[f], key[f * pitch + j]);
      node.high[f] = std::fmax(node.high[f], key[f * pitch + j]);
    }
  }
  for (int64_t j = node.begin; j < node.end; ++j) node.charge += charge[j];
}

const double* KeyTree::expansion(int64_t number, double* scratch) const {
  std::atomic<double*>& kept = expansions_[number].coefficients;
  if (double* const made = kept.load(std::memory_order_acquire)) return made;
  const Node& node = nodes[number];
  double centre[kAxes], half[kAxes];
  extent(node, centre, half);
  std::unique_ptr<double[]> coefficients(new double[columns * terms()]);
  FarMoments task;
  task.features = features;
  task.columns = columns;
  task.degrees = degrees;
  task.n = node.end - node.begin;
  task.key = key.get() + node.begin;
  task.charge = charge.get() + node.begin;
  task.key_pitch = pitch;
  task.centre = centre;
  task.scale = scale;
  task.half = half;
  task.inverse_factorial = inverse_factorial_.get();
  task.scratch = scratch;
  task.coefficients = coefficients.get();
  task.pitch = terms();
  grid_kernels<double>().far_moments(task);
  double* other = nullptr;  // of another thread that needed it at the same time: the same numbers
  if (!kept.compare_exchange_strong(other, coefficients.get(), std::memory_order_acq_rel)) return other;
  return coefficients.release();
}

}  // namespace grid
}  // namespace nwfast
