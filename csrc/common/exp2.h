// 2^x by range reduction and a polynomial: 2^x = 2^floor(x) * p(x - floor(x)).
//
// Of the coefficients nwfast/constants.py tells; they are here by csrc/common/constants.h. These are the ones for
// floor; those for round are evaluated in csrc/cpu/linear/kernels/direct.h and near_rows.h, vectors in csrc/cpu/simd.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "constants.h"
#include "host_device.h"

namespace nwfast {

// Horner's scheme on anything that multiplies and adds: a scalar or a vector of floats or doubles.
template <typename T, typename V>
NWFAST_HOST_DEVICE V exp2_polynomial(V fraction) {
  V p = fraction * Exp2Floor<T>::coefficient(Exp2Floor<T>::kDegree) +
        Exp2Floor<T>::coefficient(Exp2Floor<T>::kDegree - 1);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 16
#endif
  for (int i = Exp2Floor<T>::kDegree - 2; i >= 0; --i) p = p * fraction + Exp2Floor<T>::coefficient(i);
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
