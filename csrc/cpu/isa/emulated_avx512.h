// What the kernels for AVX-512 take from the processor by name, for one that has AVX2 alone: -DNWFAST_EMULATED_AVX512,
// of CXXFLAGS, makes tests of their source possible there, lane for lane (tests/backends/native/test_emulated.py). All
// else is on the compiler's vectors of 64 bytes, which it splits.

#pragma once

namespace nwfast::emulated {
namespace {

// What the lower bits of the mask ask for; 0 in the other lanes.
template <typename Wide, typename Lane>
inline Wide each_lane(unsigned mask, Lane lane) {
  Wide result = {};
  for (unsigned i = 0; i < sizeof(Wide) / sizeof result[0]; ++i) {
    if (mask >> i & 1) result[i] = lane(i);
  }
  return result;
}

template <typename Wide>
inline Wide square_root(unsigned mask, Wide x) {
  return each_lane<Wide>(mask, [&](unsigned i) { return std::sqrt(x[i]); });
}
// x - floor(x); 0 for the infinities.
template <typename Wide>
inline Wide reduce(unsigned mask, Wide x) {
  return each_lane<Wide>(mask, [&](unsigned i) { return std::isinf(x[i]) ? 0 : x[i] - std::floor(x[i]); });
}
// x 2^floor(t), rounded once.
template <typename Wide>
inline Wide scalef(unsigned mask, Wide x, Wide t) {
  return each_lane<Wide>(mask, [&](unsigned i) {
    if (std::isnan(t[i])) return t[i];
    const int power = t[i] < -9999 ? -9999 : t[i] > 9999 ? 9999 : static_cast<int>(std::floor(t[i]));
    return std::ldexp(x[i], power);
  });
}
inline __m512d to_double(unsigned mask, __m256 x) {
  return each_lane<__m512d>(mask, [&](unsigned i) { return static_cast<double>(x[i]); });
}
inline __m512d load_double(unsigned mask, const double* x) {
  return each_lane<__m512d>(mask, [&](unsigned i) { return x[i]; });
}
inline __m256 load_float(unsigned mask, const float* x) {
  return each_lane<__m256>(mask, [&](unsigned i) { return x[i]; });
}
inline __m512d repeat_pair(unsigned mask, __m128d x) {
  return each_lane<__m512d>(mask, [&](unsigned i) { return x[i % 2]; });
}
inline __m512d multiply_subtract(__m512d x, __m512d y, __m512d z) {
  return each_lane<__m512d>(0xff, [&](unsigned i) { return std::fma(x[i], y[i], -z[i]); });
}
inline unsigned signs(__m512i x) {
  unsigned bits = 0;
  for (unsigned i = 0; i < 8; ++i) bits |= unsigned(x[i] < 0) << i;
  return bits;
}

}  // namespace
}  // namespace nwfast::emulated

// clang-format off
#define _mm512_maskz_sqrt_ps(mask, x) nwfast::emulated::square_root<__m512>(mask, x)
#define _mm512_maskz_sqrt_pd(mask, x) nwfast::emulated::square_root<__m512d>(mask, x)
#define _mm512_maskz_reduce_ps(mask, x, to_floor) nwfast::emulated::reduce<__m512>(mask, x)
#define _mm512_maskz_reduce_pd(mask, x, to_floor) nwfast::emulated::reduce<__m512d>(mask, x)
#define _mm512_maskz_scalef_ps(mask, x, t) nwfast::emulated::scalef<__m512>(mask, x, t)
#define _mm512_maskz_scalef_pd(mask, x, t) nwfast::emulated::scalef<__m512d>(mask, x, t)
#define _mm512_maskz_cvtps_pd(mask, x) nwfast::emulated::to_double(mask, x)
#define _mm512_maskz_loadu_pd(mask, x) nwfast::emulated::load_double(mask, x)
#define _mm256_maskz_loadu_ps(mask, x) nwfast::emulated::load_float(mask, x)
#define _mm512_maskz_broadcast_f64x2(mask, x) nwfast::emulated::repeat_pair(mask, x)
#define _mm512_fmsub_pd(x, y, z) nwfast::emulated::multiply_subtract(x, y, z)
#define _mm512_movepi64_mask(x) nwfast::emulated::signs(x)
// clang-format on
