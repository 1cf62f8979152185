// 2^x by range reduction and a polynomial: 2^x = 2^floor(x) * p(x - floor(x)).
//
// The coefficients are minimax in the relative error on [0, 1) with p(0) = 1, so that equal scores get a weight of
// exactly 1 (w = 0 is average pooling). Found with Remez's algorithm; float coefficients rounded by a search.
// Largest relative error before rounding: 8.6e-8 (float, degree 5), 3.2e-18 (double, degree 11).

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace nwfast {

template <typename T>
struct Exp2;

// Coefficients come from a function, since device code cannot index a static member.
template <>
struct Exp2<float> {
  static constexpr int kDegree = 5;
  static NWFAST_HOST_DEVICE constexpr float coefficient(int i) {
    constexpr float kCoefficients[kDegree + 1] = {1.0f,           0x1.62e4bap-1f, 0x1.ebdb58p-3f,
                                                  0x1.c91ce8p-5f, 0x1.277856p-7f, 0x1.e974fep-10f};
    return kCoefficients[i];
  }
};

template <>
struct Exp2<double> {
  static constexpr int kDegree = 11;
  static NWFAST_HOST_DEVICE constexpr double coefficient(int i) {
    constexpr double kCoefficients[kDegree + 1] = {1.0,
                                                   0.69314718055994592842,
                                                   0.24022650695906330204,
                                                   0.055504108665602253297,
                                                   0.0096181290995507955717,
                                                   0.0013333558629566755226,
                                                   0.00015403512309628660399,
                                                   0.000015253175055562795993,
                                                   1.3208367288951140366e-6,
                                                   1.0253212435721934234e-7,
                                                   6.559529322770528367e-9,
                                                   6.2634661462900210149e-10};
    return kCoefficients[i];
  }
};

// Horner's scheme on anything that multiplies and adds: a scalar or a vector of floats or doubles.
template <typename T, typename V>
NWFAST_HOST_DEVICE V exp2_polynomial(V fraction) {
  V p = fraction * Exp2<T>::coefficient(Exp2<T>::kDegree) + Exp2<T>::coefficient(Exp2<T>::kDegree - 1);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 16
#endif
  for (int i = Exp2<T>::kDegree - 2; i >= 0; --i) p = p * fraction + Exp2<T>::coefficient(i);
  return p;
}

// 2^t in double for t up to 1023; 0 where it would be subnormal; NaN for NaN.
NWFAST_HOST_DEVICE double exp2_of(double t) {
  if (!(t >= -1022)) return t < 0 ? 0.0 : t;
  const double whole = floor(t);
  const int64_t bits = (static_cast<int64_t>(whole) + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return exp2_polynomial<double>(t - whole) * power;
}

}  // namespace nwfast
