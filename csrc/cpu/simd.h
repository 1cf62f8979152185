// Vectors of floats or doubles on GCC's vector extension, of the width of the instruction set that the including
// source file is compiled for: 64 bytes (AVX-512), 32 (AVX2) or 16 (any other).
//
// Included inside the namespace of one instruction set (NWFAST_ISA), so that no function compiled for a newer
// processor can replace its namesake at link time.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/exp2.h"

#define NWFAST_INLINE inline __attribute__((always_inline))
// Long functions whose call costs nothing beside their work: the compiler would spend its time on copies of them.
#if defined(__clang__)
#define NWFAST_ONE_COPY __attribute__((noinline))
#else
#define NWFAST_ONE_COPY __attribute__((noinline, noclone))
#endif

namespace nwfast {
namespace NWFAST_ISA {

#if NWFAST_LEVEL == 512
constexpr int kVectorBytes = 64;
#elif NWFAST_LEVEL == 256
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Unsigned __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
};

template <typename T>
using Vec = typename Simd<T>::Vec;
template <typename T>
using IntVec = typename Simd<T>::Int;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// p 2^k for the `rounded` that is k + kRound: k goes into the exponent. Anything where that has no room, in lanes that
// nobody reads: hence unsigned, which may overflow.
template <typename T>
NWFAST_INLINE Vec<T> raise(Vec<T> p, Vec<T> rounded) {
  typedef typename Simd<T>::Unsigned Bits;
  return (Vec<T>)((Bits)p + ((Bits)rounded << Simd<T>::kMantissa));
}

template <typename T>
NWFAST_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
NWFAST_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <typename T>
NWFAST_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // a broadcast; setting lane by lane compiles to one instruction a lane
}
template <typename T>
NWFAST_INLINE Vec<T> select(IntVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}
template <typename T>
NWFAST_INLINE Vec<T> absolute(Vec<T> v) {
  const IntVec<T> sign = (IntVec<T>)splat<T>(T(-0.0));
  return (Vec<T>)((IntVec<T>)v & ~sign);
}
template <typename T>
NWFAST_INLINE IntVec<T> lane_numbers() {
  IntVec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}
// The score below which exp2 of it times a factor is taken for 0: no product of that with what is not tiny itself is
// then subnormal. Some processors take a hundred times as long for such a number as for others.
template <typename T>
NWFAST_INLINE T least_score(T factor) {
  typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type bits;
  std::memcpy(&bits, &factor, sizeof bits);
  constexpr int kRoom = 17;
  const int exponent = static_cast<int>(bits >> Simd<T>::kMantissa) - Simd<T>::kBias;
  return static_cast<T>(1 - Simd<T>::kBias + kRoom - exponent);
}
// The same for a row of the backward pass, of the inverse of its total and the gradients that its pairs are multiplied
// by: but for weights of at least 2^-70 or so, which count however small these are.
template <typename T>
NWFAST_INLINE T least_score(T inverse_total, const T* grad, int64_t n, T other) {
  constexpr T kLeast = T(0x1p-40);
  T most = other < 0 ? -other : other;
  for (int64_t c = 0; c < n; ++c) {
    const T size = grad[c] < 0 ? -grad[c] : grad[c];
    most = size > most ? size : most;
  }
  most = most < 1 ? most : T(1);
  return least_score(inverse_total * (most > kLeast ? most : kLeast));
}
template <typename T>
NWFAST_INLINE Vec<T> drop_below(Vec<T> score, T least) {
  return select<T>(score < splat<T>(least), splat<T>(-std::numeric_limits<T>::infinity()), score);
}

// Lanes are added in a fixed order, pairwise, in double.
template <typename T>
NWFAST_INLINE double horizontal_sum(Vec<T> v) {
  constexpr int kHalf = kLanes<T> / 2;
  double sums[kHalf];
  for (int i = 0; i < kHalf; ++i) sums[i] = static_cast<double>(v[i]) + static_cast<double>(v[i + kHalf]);
  for (int width = kHalf / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// out[i] += v[i] for the first `lanes` lanes.
template <typename T>
NWFAST_INLINE void add_lanes(Vec<T> v, int lanes, double* out) {
  alignas(kVectorBytes) T values[kLanes<T>];
  store<T>(values, v);
  if (lanes == kLanes<T>) {
    for (int i = 0; i < kLanes<T>; ++i) out[i] += static_cast<double>(values[i]);
  } else {
    for (int i = 0; i < lanes; ++i) out[i] += static_cast<double>(values[i]);
  }
}

// 2^t for t <= 0 and a little above; exactly 0 far below; NaN for NaN.
template <typename T>
NWFAST_INLINE Vec<T> exp2(Vec<T> t);

#if NWFAST_LEVEL == 512
// Where 2^t would be subnormal it is 0, as everywhere (see least_score). Of an infinity the instructions make 0 without
// a subnormal on the way.
template <>
NWFAST_INLINE Vec<float> exp2<float>(Vec<float> t) {
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  t = drop_below<float>(t, 1 - Simd<float>::kBias);
  const Vec<float> fraction = _mm512_maskz_reduce_ps(0xffff, t, kFloor);
  return _mm512_maskz_scalef_ps(0xffff, exp2_polynomial<float>(fraction), t);
}
template <>
NWFAST_INLINE Vec<double> exp2<double>(Vec<double> t) {
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  t = drop_below<double>(t, 1 - Simd<double>::kBias);
  const Vec<double> fraction = _mm512_maskz_reduce_pd(0xff, t, kFloor);
  return _mm512_maskz_scalef_pd(0xff, exp2_polynomial<double>(fraction), t);
}
#else
NWFAST_INLINE Vec<float> floor_of(Vec<float> t) {
#if NWFAST_LEVEL == 256
  return _mm256_floor_ps(t);
#else
  const Vec<float> nearest = (t + Simd<float>::kRound) - Simd<float>::kRound;
  return nearest - select<float>(nearest > t, splat<float>(1), Vec<float>{});
#endif
}
NWFAST_INLINE Vec<double> floor_of(Vec<double> t) {
#if NWFAST_LEVEL == 256
  return _mm256_floor_pd(t);
#else
  const Vec<double> nearest = (t + Simd<double>::kRound) - Simd<double>::kRound;
  return nearest - select<double>(nearest > t, splat<double>(1), Vec<double>{});
#endif
}
template <typename T>
NWFAST_INLINE Vec<T> exp2(Vec<T> t) {
  // At the clamp the exponent field becomes 0 and the result 0. The comparison keeps NaN.
  const Vec<T> lowest = splat<T>(-Simd<T>::kBias);
  t = select<T>(t < lowest, lowest, t);
  const Vec<T> whole = floor_of(t);
  // Biased before the shift, which drops the bits of kRound: no addition overflows, whatever t is.
  const IntVec<T> exponent = ((IntVec<T>)(whole + Simd<T>::kRound) + Simd<T>::kBias) << Simd<T>::kMantissa;
  return exp2_polynomial<T>(t - whole) * (Vec<T>)exponent;
}
#endif

}  // namespace NWFAST_ISA
}  // namespace nwfast
