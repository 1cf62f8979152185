// Sums of squared distances, and of their differences, that double cannot hold: of one row and one key, by one thread,
// with an exponent of their own. Rows that need them are those of coordinates and w at the ends of float64.

#pragma once

#include "../problem.cuh"

namespace nwfast {

constexpr double kWide = 0x1p1000;  // from here on sums are taken so

// x 2^exponent, for sums beyond all doubles.
struct Wide {
  double x = 0;
  int exponent = 0;

  __device__ void add(double y, int by) {
    if (y == 0) return;
    if (x == 0 || by > exponent) {
      x = ldexp(x, exponent - by) + y;
      exponent = by;
    } else {
      x += ldexp(y, by - exponent);
    }
  }
};

__device__ inline bool large(double x) { return fabs(x) >= kWide; }

// (q - k) + (q - origin) to its own rounding, however small it is beside the two.
__device__ inline double both_distances(double q, double k, double origin) {
  const double twice = 2 * q, number = twice - origin, back = number - twice;
  const double both = (number - k) + ((twice - (number - back)) - (origin + back));
  return isfinite(both) ? both : (q - k) + (q - origin);  // twice, too, may overflow
}

// sum_f w_f^2 (k*_f - k_f) ((q_f - k_f) + (q_f - k*_f)), where `relative`, or sum_f w_f^2 (q_f - k_f)^2, of numbers at
// these offsets (k* is q where its offset is negative). A function of its own, so that the usual sums keep their
// registers.
__device__ inline __noinline__ Wide wide_sum_of(const Problem& problem, int64_t query, int64_t key, int64_t nearest,
                                                int64_t w, bool relative) {
  Wide sum;
  for (int64_t f = 0; f < problem.features; ++f) {
    const double k = problem.key.read<double>(key + f * problem.key.column_stride);
    const double q = problem.query.read<double>(query + f * problem.query.column_stride);
    const double origin = nearest < 0 ? q : problem.key.read<double>(nearest + f * problem.key.column_stride);
    // Sums of four quarters do not overflow.
    const double one = large(k) || large(origin) ? 0.25 : 1, two = one < 1 || large(q) ? 0.25 : 1;
    int e1, e2, e3;
    const double x = frexp(origin * one - k * one, &e1);
    const double scale = frexp(problem.w.read<double>(w + f * problem.w.column_stride), &e3);
    const double both = relative ? both_distances(q * two, k * two, origin * two) : q * one - k * one;
    const double y = frexp(both, &e2);
    sum.add(x * y * (scale * scale), e1 + e2 + 2 * e3 + (one < 1 ? 2 : 0) + ((relative ? two : one) < 1 ? 2 : 0));
  }
  return sum;
}

// A number that goes up with x; from kWide on not as fast, so that it is finite.
__device__ inline double in_order(const Wide& x) {
  int exponent;
  const double part = frexp(x.x, &exponent);
  exponent += x.exponent - 1000;
  return exponent <= 0 ? ldexp(part, exponent + 1000) : copysign(kWide * (exponent - 1 + 2 * fabs(part)), part);
}

}  // namespace nwfast
