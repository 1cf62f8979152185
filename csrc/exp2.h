// 2^x by range reduction and a polynomial: 2^x = 2^floor(x) * p(x - floor(x)).
//
// The coefficients are minimax in the relative error on [0, 1) with p(0) = 1, so that equal scores get a weight of
// exactly 1 (w = 0 is average pooling). Found with Remez's algorithm; float coefficients rounded by a search.
// Largest relative error before rounding: 8.6e-8 (float, degree 5), 3.2e-18 (double, degree 11).

#pragma once

namespace nwfast {

template <typename T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kDegree = 5;
  static constexpr float kCoefficients[kDegree + 1] = {1.0f,           0x1.62e4bap-1f, 0x1.ebdb58p-3f,
                                                       0x1.c91ce8p-5f, 0x1.277856p-7f, 0x1.e974fep-10f};
};

template <>
struct Exp2<double> {
  static constexpr int kDegree = 11;
  static constexpr double kCoefficients[kDegree + 1] = {1.0,
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
};

// Horner's scheme on anything that multiplies and adds: a scalar or a vector of floats or doubles.
template <typename T, typename V>
inline __attribute__((always_inline)) V exp2_polynomial(V fraction) {
  V p = fraction * Exp2<T>::kCoefficients[Exp2<T>::kDegree] + Exp2<T>::kCoefficients[Exp2<T>::kDegree - 1];
#pragma GCC unroll 16
  for (int i = Exp2<T>::kDegree - 2; i >= 0; --i) p = p * fraction + Exp2<T>::kCoefficients[i];
  return p;
}

}  // namespace nwfast
