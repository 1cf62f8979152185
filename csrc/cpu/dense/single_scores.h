// Scores of one feature.

#pragma once

#include "../simd.h"
#include "kernels.h"
#include "mirrored.h"

namespace nwfast {
namespace NWFAST_ISA {

// How scores are formed: relative to the nearest key, the same where products may overflow, from offsets, or from
// offsets that need no scaling any more.
enum class Scores { kFar, kWide, kNear, kUnit };
constexpr bool relative(Scores mode) { return mode == Scores::kFar || mode == Scores::kWide; }
template <typename T>
constexpr Scores kWideScores = sizeof(T) == 8 ? Scores::kWide : Scores::kFar;  // data beyond float is never in float

// x within [-bound, bound]; NaN stays.
template <typename T>
NWFAST_INLINE Vec<T> within(Vec<T> x, T bound) {
  x = select<T>(x > splat<T>(bound), splat<T>(bound), x);
  return select<T>(x < splat<T>(-bound), splat<T>(-bound), x);
}

// -(k* - k)(2 x - k* - k) scale^2; offset becomes (k* - k) scale. The second factor has the exact 2 x - k* in two
// parts: it keeps all digits where k lies as far on the other side of x.
template <typename T, Scores kMode>
NWFAST_INLINE Vec<T> relative_score(Vec<T> key, Vec<T> nearest, const Mirrored<Vec<T>>& mirrored, Vec<T> scale,
                                    Vec<T>& offset) {
  offset = (nearest - key) * scale;
  Vec<T> other = ((mirrored.high - key) + mirrored.low) * scale;
  if (kMode != Scores::kWide) return Vec<T>{} - offset * other;
  constexpr T kMost = std::numeric_limits<T>::max();
  offset = within<T>(offset, kMost);
  other = within<T>(other, kMost);
  return within<T>(Vec<T>{} - offset * other, std::numeric_limits<T>::max() * T(0x1p-64));
}

template <typename T>
NWFAST_INLINE Mirrored<Vec<T>> splat(const Mirrored<T>& mirrored) {
  return {splat<T>(mirrored.high), splat<T>(mirrored.low)};
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
