// Twice a query less a key, without rounding: what tells which of two keys is nearer, and by how much.
//
// The squared distances of k and k* from x differ by (k* - k)(2 x - k* - k). Where k and k* lie on either side of x the
// second factor cancels; taken from the two parts below it is right to a rounding, and its sign is always right.

#pragma once

namespace nwfast {

// 2 x - k* = high + low, exactly.
template <typename T>
struct Mirrored {
  T high, low;
};

// Inlined wherever it is used: no copy compiled for a newer processor may serve another.
template <typename T>
inline __attribute__((always_inline)) Mirrored<T> mirrored(T x, T nearest) {
  const T twice = x + x, high = twice - nearest, rest = high - twice;
  return {high, (twice - (high - rest)) - (nearest + rest)};
}

// Whether a is nearer to x than b is.
template <typename T>
inline __attribute__((always_inline)) bool nearer(T x, T a, T b) {
  const Mirrored<T> twice = mirrored(x, b);
  const T sum = (twice.high - a) + twice.low;  // 2 x - a - b
  return a < b ? sum < 0 : a > b && sum > 0;
}

}  // namespace nwfast
