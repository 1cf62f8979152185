// Choice of boxes, and the matrices between them.

#include "plan.h"

namespace nwfast {
namespace linear {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kTerms[] = {8, 12, 16, 20, 24};
constexpr double kLeastShare = 1e-12;  // of the largest coordinate, so that edges of boxes are exact

double root_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= std::sqrt(static_cast<double>(i));
  return product;
}

}  // namespace

double half_width(int terms, double error) { return 2 * std::pow(error * root_factorial(terms) / 8.72, 1.0 / terms); }

double short_number(double x) {
  int exponent;
  const double fraction = std::frexp(x, &exponent);
  return std::ldexp(std::floor(fraction * 64), exponent - 6);
}

double expansion_error(int terms, double half) {
  // Two interpolations, one of which has the other's Lebesgue constant (about 3) before it.
  return 4 * 2.18 * std::pow(half / 2, terms) / root_factorial(terms);
}

template <typename R>
void make_plan(const Extent& extent, Plan& plan) {
  plan.scale = extent.scale;
  plan.offsets = extent.offsets;
  plan.scores = extent.scores;
  plan.orders = 1 + extent.offsets + extent.scores;
  plan.log_span = std::log(static_cast<double>(extent.keys) / (Accuracy<R>::kAccept / 4));
  plan.window = std::sqrt(2 * plan.log_span);
  // In units of a nanosecond or so: a point costs its terms, a box of queries the translations to it.
  double best = INFINITY;
  const double points = static_cast<double>(extent.keys) + static_cast<double>(extent.queries) * plan.orders;
  for (const int terms : kTerms) {
    const double half = std::min(half_width(terms, Accuracy<R>::kTruncation), Accuracy<R>::kLargestHalf);
    const double width = 2 * half / extent.scale;  // infinite for w = 0, unless queries may come from anywhere
    const double share =
        static_cast<double>(extent.keys) / std::max<double>(1, static_cast<double>(extent.gaps.size()));
    double boxes = 1;
    for (const double gap : extent.gaps) boxes += std::min(gap / width, share);
    const double neighbours = std::min(2 * plan.window / (2 * half) + 1, boxes);
    const double cost = points * (4 + terms) + boxes * neighbours * terms * terms * plan.orders * 0.7;
    if (!(cost < best)) continue;
    best = cost;
    plan.terms = terms;
    // Boxes no wider than the data need: offsets within a box have rounding errors of its width.
    const double widest = extent.magnitude > 0 ? std::fmax(4 * extent.spread, extent.magnitude * kLeastShare) : 1;
    plan.box = short_number(extent.anywhere ? width : std::min(width, widest));
  }
  plan.pitch = static_cast<int>((plan.terms + 7) / 8 * 8);
  plan.half = plan.box * plan.scale / 2;
  const double boxes_apart = extent.anywhere ? INFINITY : std::ceil(extent.spread / plan.box) + 1;
  plan.reach = static_cast<int64_t>(std::min(std::ceil(plan.window / (2 * plan.half)), boxes_apart));
  fill_bounds(plan);
  const double beyond = static_cast<double>(plan.reach) * 2 * plan.half;
  plan.tail_error = plan.reach < boxes_apart ? std::exp(-beyond * beyond / 2) : 0;
}

void fill_bounds(Plan& plan) {
  const double near_error = expansion_error(plan.terms, plan.half);
  for (auto* bound : {&plan.error, &plan.least_kernel, &plan.largest_kernel}) bound->resize(plan.reach + 1);
  for (int64_t o = 0; o <= plan.reach; ++o) {
    const double nearest = o > 0 ? static_cast<double>(o - 1) * 2 * plan.half : 0;
    const double farthest = static_cast<double>(o + 1) * 2 * plan.half;
    plan.error[o] = near_error * std::exp(-nearest * nearest / 4);
    plan.largest_kernel[o] = std::exp(-nearest * nearest / 2);
    plan.least_kernel[o] = std::exp(-farthest * farthest / 2);
  }
}

template void make_plan<float>(const Extent&, Plan&);
template void make_plan<double>(const Extent&, Plan&);

// K_o[n][m]: the coefficient of s^m t^n in the interpolant of g(s - t + 2 o), where a key at t in its box and a query
// at s in a box o boxes higher are d = half (s - t + 2 o) bandwidths apart, and g is exp(-d^2 / 2), with a factor of (s
// - t + 2 o) for offsets and its square for scores. In Chebyshev polynomials first, whose coefficients are as accurate
// as the function; powers then lose nothing, since the coefficients fall off so fast.
void fill_matrices(Plan& plan) {
  const int terms = plan.terms, pitch = plan.pitch;
  double node[kMostTerms], cosine[kMostTerms][kMostTerms], power[kMostTerms][kMostTerms] = {};
  for (int i = 0; i < terms; ++i) {
    node[i] = std::cos(kPi * (i + 0.5) / terms);
    for (int k = 0; k < terms; ++k) cosine[k][i] = (k ? 2.0 : 1.0) / terms * std::cos(kPi * k * (i + 0.5) / terms);
  }
  power[0][0] = 1;
  power[1][1] = 1;
  for (int k = 2; k < terms; ++k) {
    for (int n = 0; n <= k; ++n) power[k][n] = (n ? 2 * power[k - 1][n - 1] : 0) - power[k - 2][n];
  }
  plan.matrices.assign(static_cast<size_t>(plan.orders * (plan.reach + 1) * terms * pitch), 0.0);
  const int64_t block = static_cast<int64_t>(terms) * pitch;
  double grid[3][kMostTerms][kMostTerms], half[kMostTerms][kMostTerms], both[kMostTerms][kMostTerms];
  for (int64_t o = 0; o <= plan.reach; ++o) {
    for (int i = 0; i < terms; ++i) {
      for (int j = 0; j < terms; ++j) {
        const double apart = node[i] - node[j] + 2 * static_cast<double>(o), d = plan.half * apart;
        const double weight = std::exp(-d * d / 2);
        int order = 0;
        grid[order++][i][j] = weight;
        if (plan.offsets) grid[order++][i][j] = weight * apart;
        if (plan.scores) grid[order++][i][j] = weight * apart * apart;
      }
    }
    for (int order = 0; order < plan.orders; ++order) {
      const int degree = order == 0 ? 0 : order == 1 && plan.offsets ? 1 : 2;
      for (int k = 0; k < terms; ++k) {
        for (int j = 0; j < terms; ++j) {
          double sum = 0;
          for (int i = 0; i < terms; ++i) sum += cosine[k][i] * grid[order][i][j];
          half[k][j] = sum;
        }
      }
      for (int k = 0; k < terms; ++k) {
        for (int l = 0; l < terms; ++l) {
          double sum = 0;
          for (int j = 0; j < terms; ++j) sum += cosine[l][j] * half[k][j];
          both[k][l] = sum;
        }
      }
      for (int m = 0; m < terms; ++m) {
        for (int l = 0; l < terms; ++l) {
          double sum = 0;
          for (int k = m; k < terms; k += 2) sum += power[k][m] * both[k][l];
          half[m][l] = sum;
        }
      }
      double* const matrix = plan.matrices.data() + (order * (plan.reach + 1) + o) * block;
      const double unit = std::pow(plan.box / 2, degree);
      for (int n = 0; n < terms; ++n) {
        for (int m = 0; m < terms; ++m) {
          double sum = 0;
          for (int l = n; l < terms; l += 2) sum += power[l][n] * half[m][l];
          matrix[n * pitch + m] = sum * unit;
        }
      }
    }
  }
}

}  // namespace linear
}  // namespace nwfast
