// The window of meshes, and the kernel between their nodes.

#include "mesh.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

namespace nwfast {
namespace grid {
namespace {

using Real = long double;

constexpr int kTapNodes = 256;  // of the integral over frequencies

// The modified Bessel function of order 0.
Real bessel(Real x) {
  Real sum = 1, term = 1;
  for (int k = 1; term > sum * 1e-22L; ++k) {
    term *= x * x / (4 * static_cast<Real>(k) * k);
    sum += term;
  }
  return sum;
}

// The window: I_0(beta sqrt(1 - (x / half)^2)) / I_0(beta) between -half and half spacings.
struct Kaiser {
  static constexpr Real kHalf = kWindowNodes / 2;
  Real beta, unit;

  explicit Kaiser(int order) : beta(mesh_kind(order).shape * kWindowNodes), unit(bessel(beta)) {}
  Real value(Real x) const {
    const Real rest = 1 - x * x / (kHalf * kHalf);
    return rest > 0 ? bessel(beta * std::sqrt(rest)) / unit : 1 / unit;
  }
  // Its Fourier transform at so many radians a spacing, at most pi.
  Real transform(Real angle) const {
    const Real root = std::sqrt(beta * beta - kHalf * kHalf * angle * angle);
    return 2 * kHalf * std::sinh(root) / (root * unit);
  }
};

GridWindow make_window(int order) {
  const Kaiser kaiser(order);
  GridWindow window = {};
  constexpr int kCount = kWindowDegree + 1;
  for (int node = 0; node < kWindowNodes; ++node) {
    // In Chebyshev polynomials first, by their values at Chebyshev nodes.
    Real value[kCount], power[kCount] = {}, before[kCount] = {}, last[kCount] = {};
    for (int i = 0; i < kCount; ++i) {
      const Real f = (std::cos(std::numbers::pi_v<Real> * (i + 0.5L) / kCount) + 1) / 2;
      value[i] = kaiser.value(f - node + Kaiser::kHalf - 1);
    }
    last[0] = 1;
    for (int n = 0; n < kCount; ++n) {
      Real coefficient = 0;
      for (int i = 0; i < kCount; ++i)
        coefficient += value[i] * std::cos(std::numbers::pi_v<Real> * n * (i + 0.5L) / kCount);
      coefficient *= (n > 0 ? 2.0L : 1.0L) / kCount;
      for (int k = 0; k <= n; ++k) power[k] += coefficient * last[k];
      Real next[kCount] = {};
      for (int k = 0; k <= n && k + 1 < kCount; ++k) next[k + 1] = (n > 0 ? 2 : 1) * last[k];
      for (int k = 0; n > 0 && k < kCount; ++k) next[k] -= before[k];
      std::copy_n(last, kCount, before);
      std::copy_n(next, kCount, last);
    }
    for (int o = 0; o < 3; ++o) {
      for (int k = 0; k < kCount; ++k) window.power[o][k][node] = static_cast<double>(power[k]);
      for (int k = 0; k + 1 < kCount; ++k) power[k] = 2 * (k + 1) * power[k + 1];  // by f, of powers of 2 f - 1
      power[kCount - 1] = 0;
    }
  }
  return window;
}

// K' at so many spacings from 0 on, or, if `squares`, what z^2 times the Gaussian has in its place.
std::vector<Real> half_of_taps(int order, double spacing, int64_t count, bool squares) {
  const Kaiser kaiser(order);
  std::vector<Real> half(count, 0);
  for (int i = 0; i < kTapNodes; ++i) {
    const Real angle = std::numbers::pi_v<Real> * (i + 0.5L) / kTapNodes, wave = angle / spacing,
               transform = kaiser.transform(angle);
    const Real factor = std::sqrt(2 * std::numbers::pi_v<Real>) / spacing * std::exp(-wave * wave / 2) /
                        (transform * transform) / kTapNodes * (squares ? 1 - wave * wave : 1);
    const Real twice = 2 * std::cos(angle);
    Real last = twice / 2, now = 1;
    for (Real& sum : half) {
      sum += factor * now;
      const Real next = twice * now - last;
      last = now;
      now = next;
    }
  }
  return half;
}

}  // namespace

const GridWindow& grid_window(int order) {
  static const GridWindow windows[2] = {make_window(0), make_window(1)};
  return windows[order > 0];
}

std::vector<double> mesh_taps(int order, double spacing, int reach, bool squares) {
  const std::vector<Real> half = half_of_taps(order, spacing, reach + 1, squares);
  std::vector<double> taps(2 * (kTapPadding + reach) + 1, 0);
  for (int k = -reach; k <= reach; ++k) {
    const Real faded = (std::abs(k) * spacing - kFadeFrom) / (kFadeTo - kFadeFrom);
    const Real left = faded <= 0 ? 1 : faded >= 1 ? 0 : std::cos(std::numbers::pi_v<Real> / 2 * faded);
    taps[kTapPadding + reach + k] = static_cast<double>(half[std::abs(k)] * left * left);
  }
  return taps;
}

void fill_mesh_matrices(int order, int spacings, double spacing, int64_t reach, double* matrices) {
  const int terms = spacings + kWindowNodes - 1;
  const std::vector<Real> tap = half_of_taps(order, spacing, reach * spacings + terms, false);
  for (int64_t apart = 0; apart <= reach; ++apart, matrices += terms * terms) {
    const auto entry = [&](int target, int source) { return tap[std::abs(apart * spacings + target - source)]; };
    for (int source = 0; source < terms; ++source) {
      for (int target = 0; target < terms; ++target) {
        const int p = target < terms / 2 ? 1 : -1, q = source < terms / 2 ? 1 : -1;
        const int i = std::min(target, terms - 1 - target), j = std::min(source, terms - 1 - source);
        const int far_i = terms - 1 - i, far_j = terms - 1 - j;
        matrices[source * terms + target] = static_cast<double>(
            (entry(i, j) + q * entry(i, far_j) + p * entry(far_i, j) + p * q * entry(far_i, far_j)) / 4);
      }
    }
  }
}

}  // namespace grid
}  // namespace nwfast
