// What all kernels of the linear method read their coordinates with: vectors of doubles from floats or doubles.

#pragma once

#include "../../simd.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

typedef Vec<double> DVec;
constexpr int kD = kLanes<double>;

// The next vector of coordinates, as double.
NWFAST_INLINE DVec load_double(const double* x) { return load(x); }
NWFAST_INLINE DVec load_double(const float* x) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x));
#elif NWFAST_LEVEL == 256
  return (DVec)_mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  DVec v;
  for (int lane = 0; lane < kD; ++lane) v[lane] = static_cast<double>(x[lane]);
  return v;
#endif
}
// The first `count` numbers, fewer than a vector holds, and zeros.
NWFAST_INLINE DVec load_some(const double* x, int64_t count) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), x);
#elif NWFAST_LEVEL == 256
  return (DVec)_mm256_maskload_pd(x, (__m256i)(lane_numbers<double>() < count));
#else
  DVec v = {};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = x[lane];
  return v;
#endif
}
NWFAST_INLINE DVec load_some(const float* x, int64_t count) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_cvtps_pd(0xff, _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), x));
#elif NWFAST_LEVEL == 256
  const __m128i counts = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count)), _mm_setr_epi32(0, 1, 2, 3));
  return (DVec)_mm256_cvtps_pd(_mm_maskload_ps(x, counts));
#else
  DVec v = {};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<double>(x[lane]);
  return v;
#endif
}
template <typename T>
NWFAST_INLINE DVec load_up_to(const T* x, int64_t count) {
  return count >= kD ? load_double(x) : load_some(x, count);
}

// Whether any lane is set.
NWFAST_INLINE bool any_lane(IntVec<double> mask) {
#if NWFAST_LEVEL == 512
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif NWFAST_LEVEL == 256
  return _mm256_movemask_pd((__m256d)mask) != 0;
#else
  int64_t any = 0;
  for (int lane = 0; lane < kD; ++lane) any |= mask[lane];
  return any != 0;
#endif
}

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
