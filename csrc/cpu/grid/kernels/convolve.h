// The sums of a mesh: what lies at its nodes, convolved along one feature with an even kernel.
//
// Along the feature that is contiguous a block of sums takes each of its sources by an unaligned load; along another
// one vectors run over the contiguous feature, and a block of rows shares the sources that it loads.

#pragma once

#include "tensors.h"

namespace nwfast {
namespace NWFAST_ISA {

template <int kVectors>
NWFAST_INLINE void convolve_block(const double* from, double* to, const double* taps, int reach) {
  DVec sums[kVectors] = {};
  for (int k = 0; k <= 2 * reach; ++k) {
    const DVec tap = splat(taps[k]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v] += tap * load(from + k + v * kD);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store<double>(to + v * kD, sums[v]);
}

inline void grid_convolve(const GridConvolution& task) {
  constexpr int kBlock = 8;
  const double* const taps = task.taps + kTapPadding;
  int64_t i = 0;
  for (; i + kBlock * kD <= task.n; i += kBlock * kD) {
    convolve_block<kBlock>(task.from + i, task.to + i, taps, task.reach);
  }
  for (; i < task.n; i += kD) convolve_block<1>(task.from + i, task.to + i, taps, task.reach);
}

// kRows rows of sums, each from the 2 reach + 1 rows of sources around it.
template <int kRows, int kVectors>
NWFAST_INLINE void convolve_rows(const double* const* from, double* const* to, int64_t place, const double* taps,
                                 int reach) {
  DVec sums[kRows][kVectors] = {};
  for (int k = 0; k < 2 * reach + kRows; ++k) {
    if (!from[k]) continue;
    DVec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(from[k] + place + v * kD);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const DVec tap = splat(taps[kTapPadding + k - r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += tap * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (!to[r]) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store<double>(to[r] + place + v * kD, sums[r][v]);
  }
}

// Few vectors of all rows after one another, so that what they share stays in the first cache.
template <int kVectors>
NWFAST_ONE_COPY void convolve_strip(const GridRowConvolution& task, int64_t place) {
  constexpr int kRows = kTapPadding + 1;
  int64_t row = 0;
  for (; row + kRows <= task.rows; row += kRows) {
    bool any = false;
    for (int r = 0; r < kRows; ++r) any |= task.to[row + r] != nullptr;
    if (any) convolve_rows<kRows, kVectors>(task.from + row, task.to + row, place, task.taps, task.reach);
  }
  for (; row < task.rows; ++row) {
    if (task.to[row]) convolve_rows<1, kVectors>(task.from + row, task.to + row, place, task.taps, task.reach);
  }
}

inline void grid_convolve_rows(const GridRowConvolution& task) {
  constexpr int kVectors = 3;
  int64_t place = 0;
  for (; place + kVectors * kD <= task.n; place += kVectors * kD) convolve_strip<kVectors>(task, place);
  for (; place < task.n; place += kD) convolve_strip<1>(task, place);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
