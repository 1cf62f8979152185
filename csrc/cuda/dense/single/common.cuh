// One feature, one channel, float32 arithmetic: the pieces that sums for rows and sums for keys share.
//
// Scores are taken as they are, t_ij = -c (x_i - k_j)^2 with c = w^2 log2(e) / 2: no running maximum, no shift. A row
// whose total is then too small is far from all keys, and is computed again in double (rows.cuh). Since the weights of
// all other rows are good, tiles outside a window of the keys are skipped where the keys are sorted.

#pragma once

#include "../../kernels.h"
#include "../survey.cuh"

namespace nwfast {

constexpr int kSingleThreads = 128;
constexpr int kSingleTile = 128;  // keys, or rows, staged at once; their sums go to a second set of accumulators
constexpr double kFarTotal = 32;  // a row whose total is below 2^-kFarTotal is far
constexpr double kNegligibleScore = kNegligibleFloat;

// Which of a thread's rows take their powers from the polynomial: every kPolynomialShare-th. A pair with the
// exponential unit takes 8 cycles of it and 6 issue slots, with the polynomial 15 slots: at a share of an eighth both
// are busy all the time. Where the tangents are summed too, issue slots alone are the limit.
constexpr int kPolynomialShare = 8;

static_assert(kSingleTile == kSingleThreads, "a thread stages one key, or one row, of a tile");
static_assert(kPolynomialShare > 0, "a share beyond the rows of a thread takes no polynomial");

// 2^(factor * square), factor <= 0, on the arithmetic units; `most` = -125 / factor. NaN is not kept.
__device__ __forceinline__ float polynomial_power(float square, float factor, float most) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  square = fminf(square, most);
  const float rounded = multiply_add_down(square, factor, kRound);
  const float fraction = fmaf(square, factor, kRound - rounded);
  const float power = exp2_polynomial<float>(fraction);
  return __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
}

// The bandwidth of a batch element, as the kernels want it.
struct Bandwidth {
  float factor;  // -c
  float most;    // squared distances beyond are as good as this one

  __device__ Bandwidth(const Problem& problem, int64_t b) {
    const double w = problem.w.read<double>(problem.w.offset(problem.batch, b));
    factor = static_cast<float>(-kHalfLog2E * w * w);
    most = factor < 0 ? -125 / factor : INFINITY;
  }
};

// Sums over a tile and over all tiles: long float32 sums would lose digits.
template <int kRows>
struct Sums {
  float inner[kRows], outer[kRows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) inner[r] = outer[r] = 0;
  }
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      outer[r] += inner[r];
      inner[r] = 0;
    }
  }
};

}  // namespace nwfast
