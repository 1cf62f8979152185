// The results of rows from their sums: outputs, lse, what is saved for the backward pass, and tangents.

#pragma once

#include "direct.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
NWFAST_INLINE void store_as(double* p, DVec v, int64_t count) {
  if (count >= kD) return store<double>(p, v);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = v[lane];
}
NWFAST_INLINE void store_as(float* p, DVec v, int64_t count) {
  const HalfVec narrow = __builtin_convertvector(v, HalfVec);
  if (count >= kD) {
    std::memcpy(p, &narrow, sizeof narrow);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) p[lane] = narrow[lane];
  }
}

// out[2 i] = a[i], out[2 i + 1] = b[i].
NWFAST_INLINE void store_interleaved(double* out, DVec a, DVec b) {
#if NWFAST_LEVEL == 256
  const __m256d low = _mm256_unpacklo_pd(a, b), high = _mm256_unpackhi_pd(a, b);
  store<double>(out, (DVec)_mm256_permute2f128_pd(low, high, 0x20));
  store<double>(out + kD, (DVec)_mm256_permute2f128_pd(low, high, 0x31));
#else
  for (int lane = 0; lane < kD; ++lane) {
    out[2 * lane] = a[lane];
    out[2 * lane + 1] = b[lane];
  }
#endif
}

// Natural logarithm of positive normal numbers: log(2^e m) = e ln 2 + 2 atanh((m - 1) / (m + 1)), m within sqrt(2)
// of 1.
template <int kTerms>
NWFAST_INLINE DVec logarithm(DVec x) {
  typedef IntVec<double> Int;
  const Int bits = (Int)x, half = (Int)splat(0.70710678118654752440);
  const Int shifted = bits - half;
  const Int exponent = shifted >> 52;
  const DVec m = (DVec)(bits - (exponent << 52));
  const DVec s = (m - 1.0) / (m + 1.0), square = s * s;
  DVec p = splat(1.0 / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 1; --k) p = p * square + 1.0 / (2 * k + 1);
  // The integer as a double, by the bits of 1.5 * 2^52.
  const DVec e = (DVec)((Int)splat(Simd<double>::kRound) + exponent) - Simd<double>::kRound;
  return e * kLn2 + (s * (square * p) + s) * 2.0;
}

template <typename T>
void finish(const FinishTask<T>& task) {
  constexpr int kTerms = sizeof(T) == 4 ? 6 : 11;
  const DVec not_a_number = splat(static_cast<double>(std::numeric_limits<double>::quiet_NaN()));
  const DVec low = splat(task.low), high = splat(task.high);
  for (int64_t i = 0; i < task.rows; i += kD) {
    const int64_t left = task.rows - i;
    const DVec sum = load_up_to(task.total + i, left), value = load_up_to(task.value + i, left);
    const IntVec<double> any = sum > DVec{};
    const DVec total = select<double>(any, sum, splat(1.0)), inverse = splat(1.0) / total;
    const DVec mean = value * inverse;
    DVec out = mean + task.centre;
    out = select<double>(out < low, low, out);
    out = select<double>(out > high, high, out);
    store_as(task.out + i, select<double>(any, out, not_a_number), left);
    const DVec true_total = select<double>(any, total * task.unit, DVec{});
    DVec shift = {};
    if (task.apart) {
      const DVec offset = load_up_to(task.apart + i, left) * task.w;
      shift = offset * offset;
    }
    if (task.lse) {
      DVec lse = logarithm<kTerms>(true_total);
      const IntVec<double> odd = (true_total < 1e-300) | (true_total > 1e300);
      for (int lane = 0; any_lane(odd) && lane < kD; ++lane) {
        if (odd[lane]) lse[lane] = __builtin_log(true_total[lane]);  // of 0: -infinity
      }
      store_as(task.lse + i, lse - shift * 0.5, left);
    }
    shift = select<double>(any, shift * -kMinusHalfLog2E, DVec{});
    if (task.state && left >= kD) {
      store_interleaved(task.state + 2 * i, shift, true_total);
    } else {
      for (int lane = 0; task.state && lane < left; ++lane) {
        task.state[2 * (i + lane)] = shift[lane];
        task.state[2 * (i + lane) + 1] = true_total[lane];
      }
    }
    if (task.tangent_w) {
      const DVec s0 = load_up_to(task.score_total + i, left), s1 = load_up_to(task.score_value + i, left);
      store_as(task.tangent_w + i, select<double>(any, (s1 - mean * s0) * inverse * -task.w, DVec{}), left);
    }
    if (task.tangent_q) {
      const DVec s0 = load_up_to(task.offset_total + i, left), s1 = load_up_to(task.offset_value + i, left);
      store_as(task.tangent_q + i, select<double>(any, (s1 - mean * s0) * inverse * -task.w * task.w, DVec{}), left);
    }
  }
}

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
