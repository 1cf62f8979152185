// Moments of boxes, their translation, and the evaluation of series, in two or three features.
//
// All three are products of small matrices, in double. Moments: the charges of a block of points, times their
// polynomials of the first two features, times those of the third. Translation along one feature: the tensor as a
// matrix, times one matrix for each box that it comes from, summed in registers. Evaluation: the series as a matrix
// times the polynomials of the first feature at a few points, which lie in lanes; what is left is summed over the other
// two.

#pragma once

#include "../../linear/kernels/vectors.h"
#include "doubles.h"
#include "tasks.h"

namespace nwfast {
namespace NWFAST_ISA {

using linear::DVec;
using linear::kD;

// Accumulators of a tile of kRows x kVectors fill about three quarters of the registers.
constexpr int kTileVectors = NWFAST_LEVEL == 512 ? 24 : 12;

// The columns of a tile that there are, where they are no whole vectors.
template <bool kAdd>
NWFAST_ONE_COPY void add_ragged(double* to, int to_pitch, int columns, int rows, const double* tile, int pitch) {
  for (int row = 0; row < rows; ++row, to += to_pitch, tile += pitch) {
    int i = 0;
    for (; i + kD <= columns; i += kD) store<double>(to + i, kAdd ? load(to + i) + load(tile + i) : load(tile + i));
#pragma GCC unroll 1
    for (; i < columns; ++i) to[i] = kAdd ? to[i] + tile[i] : tile[i];
  }
}

template <int kRows, int kVectors, bool kAdd>
NWFAST_INLINE void product_tile(double* to, int to_pitch, int columns, int64_t pairs, const double* const* left,
                                int64_t offset, int64_t row_stride, int64_t depth_stride, const double* const* right,
                                int right_pitch, int64_t right_offset, int depth) {
  DVec sums[kRows][kVectors] = {};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const double *l = left[pair] + offset, *r = right[pair] + right_offset;
    for (int k = 0; k < depth; ++k, l += depth_stride, r += right_pitch) {
      DVec column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) column[v] = load(r + v * kD);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const DVec factor = splat(l[row * row_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[row][v] += factor * column[v];
      }
    }
  }
  constexpr int kColumns = kVectors * kD;
  if (columns >= kColumns) {
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        double* const place = to + row * to_pitch + v * kD;
        store<double>(place, kAdd ? load(place) + sums[row][v] : sums[row][v]);
      }
    }
    return;
  }
  alignas(kVectorBytes) double tile[kRows * kColumns];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store<double>(tile + row * kColumns + v * kD, sums[row][v]);
  }
  add_ragged<kAdd>(to, to_pitch, columns, kRows, tile, kColumns);
}

template <int kVectors, bool kAdd>
NWFAST_INLINE void product_panel(double* to, int to_pitch, int columns, int64_t rows, int64_t pairs,
                                 const double* const* left, int64_t row_stride, int64_t depth_stride,
                                 const double* const* right, int right_pitch, int64_t right_offset, int depth) {
  constexpr int kRows = kTileVectors / kVectors > 8 ? 8 : kTileVectors / kVectors;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    product_tile<kRows, kVectors, kAdd>(to + row * to_pitch, to_pitch, columns, pairs, left, row * row_stride,
                                        row_stride, depth_stride, right, right_pitch, right_offset, depth);
  }
  for (; row < rows; ++row) {
    product_tile<1, kVectors, kAdd>(to + row * to_pitch, to_pitch, columns, pairs, left, row * row_stride, row_stride,
                                    depth_stride, right, right_pitch, right_offset, depth);
  }
}

// to (rows, columns) (+)= sum_p left_p @ right_p.
template <bool kAdd>
NWFAST_ONE_COPY void multiply_small(double* to, int to_pitch, int64_t rows, int columns, int64_t pairs,
                                    const double* const* left, int64_t row_stride, int64_t depth_stride,
                                    const double* const* right, int right_pitch, int64_t right_offset, int depth) {
  const auto panel = [&](auto vectors, int first) __attribute__((always_inline)) {
    product_panel<decltype(vectors)::value, kAdd>(to + first, to_pitch, columns - first, rows, pairs, left, row_stride,
                                                  depth_stride, right, right_pitch, right_offset + first, depth);
  };
  for (int first = 0; first < columns;) {
    const int vectors = (columns - first + kD - 1) / kD;
    switch (vectors) {
      case 1:
        panel(std::integral_constant<int, 1>(), first);
        return;
      case 2:
        panel(std::integral_constant<int, 2>(), first);
        return;
      case 3:
        panel(std::integral_constant<int, 3>(), first);
        return;
      default:
        panel(std::integral_constant<int, 4>(), first);
        first += 4 * kD;
    }
  }
}

constexpr int kProductRows = 24, kProductPairs = 6;  // whose sums and differences are held at once

// With A_n of the lower box and B_n of the higher one, n the degree, targets of even degree get K_n (A_n + (-1)^n B_n)
// and those of odd degree K_n (A_n - (-1)^n B_n).
NWFAST_INLINE void add_and_subtract(const GridProduct& task, int64_t pair, int64_t row, int rows, double* plus,
                                    double* minus) {
  const bool by_depth = task.row_stride == 1;  // (terms, rows) rather than (rows, terms)
  const int terms = task.terms, half = terms / 2;
  const int64_t offset = task.offset + row * task.row_stride;
  const double* const a = task.lower[pair] ? task.lower[pair] + offset : nullptr;
  const double* const b = task.higher[pair] ? task.higher[pair] + offset : nullptr;
  const auto segment = [&](int64_t from, int to, int n, double sign) __attribute__((always_inline)) {
    if (a && b) {
      for (int i = 0; i < n; ++i) {
        const double second = sign * b[from + i];
        plus[to + i] = a[from + i] + second;
        minus[to + i] = a[from + i] - second;
      }
    } else if (a) {
      for (int i = 0; i < n; ++i) plus[to + i] = minus[to + i] = a[from + i];
    } else {
      for (int i = 0; i < n; ++i) {
        plus[to + i] = sign * b[from + i];
        minus[to + i] = -(sign * b[from + i]);
      }
    }
  };
  if (by_depth) {
    for (int n = 0; n < terms; ++n) segment(n * task.depth_stride, n * kProductRows, rows, n < half ? 1.0 : -1.0);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    segment(r * task.row_stride, r * terms, half, 1.0);
    segment(r * task.row_stride + half, r * terms + half, half, -1.0);
  }
}

inline void grid_product(const GridProduct& task) {
  constexpr int kSize = kProductRows * kTensorTerms;
  alignas(64) double plus[kProductPairs][kSize], minus[kProductPairs][kSize];
  const double *all_plus[kProductPairs], *all_minus[kProductPairs];
  for (int pair = 0; pair < kProductPairs; ++pair) {
    all_plus[pair] = plus[pair];
    all_minus[pair] = minus[pair];
  }
  const int terms = task.terms, half = terms / 2;
  const bool by_depth = task.row_stride == 1;
  const int64_t row_stride = by_depth ? 1 : terms, depth_stride = by_depth ? kProductRows : 1;
  for (int64_t row = 0; row < task.rows; row += kProductRows) {
    const int rows = static_cast<int>(task.rows - row < kProductRows ? task.rows - row : kProductRows);
    double* const to = task.to + row * terms;
    if (task.centre) {
      const double* const even[1] = {task.centre + task.offset + row * task.row_stride};
      const double* const odd[1] = {even[0] + half * task.depth_stride};
      const double* const matrix[1] = {task.centre_matrix};
      multiply_small<false>(to, terms, rows, half, 1, even, task.row_stride, task.depth_stride, matrix, terms, 0, half);
      multiply_small<false>(to + half, terms, rows, half, 1, odd, task.row_stride, task.depth_stride, matrix, terms,
                            half * terms + half, half);
    } else {
      for (int i = 0; i < rows * terms; ++i) to[i] = 0;
    }
    for (int64_t first = 0; first < task.pairs; first += kProductPairs) {
      const int64_t pairs = task.pairs - first < kProductPairs ? task.pairs - first : kProductPairs;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        add_and_subtract(task, first + pair, row, rows, plus[pair], minus[pair]);
      }
      multiply_small<true>(to, terms, rows, half, pairs, all_plus, row_stride, depth_stride, task.matrix + first, terms,
                           0, terms);
      multiply_small<true>(to + half, terms, rows, half, pairs, all_minus, row_stride, depth_stride,
                           task.matrix + first, terms, half, terms);
    }
  }
}

// The places of n points, 0 for those that there are not.
template <int kPoints, typename R>
NWFAST_INLINE void fill_places(const R* x, int64_t n, double centre, double scale, double* t) {
  for (int i = 0; i < kPoints; ++i) t[i] = i < n ? (static_cast<double>(x[i]) - centre) * scale : 0.0;
}

// T_n at the places t, in the order of places of degrees.
template <int kPoints>
NWFAST_INLINE void fill_polynomials(const double* t, int terms, double (*table)[kPoints]) {
  for (int i = 0; i < kPoints; i += kD) {
    const DVec place = load(t + i), twice = place + place;
    DVec before = splat(1.0), last = place;
    store<double>(table[0] + i, before);
    if (terms > 1) store<double>(table[place_of_degree(1, terms)] + i, last);
    for (int n = 2; n < terms; ++n) {
      const DVec next = twice * last - before;
      store<double>(table[place_of_degree(n, terms)] + i, next);
      before = last;
      last = next;
    }
  }
}

template <typename R>
void grid_moments(const GridMoments<R>& task) {
  constexpr int kPoints = 32;
  alignas(64) double t[kPoints], table[3][kGridTerms][kPoints], left[kGridTerms][kPoints];
  alignas(64) double right[kPoints * kGridTerms + kMatrixPadding];
  const double* const lefts[1] = {left[0]};
  const double* const rights[1] = {right};
  const int a_terms = task.terms[0], b_terms = task.terms[1], c_terms = task.terms[2];
  for (int64_t begin = 0; begin < task.n; begin += kPoints) {
    const int64_t n = task.n - begin < kPoints ? task.n - begin : kPoints;
    for (int f = 0; f < 3; ++f) {
      if (!task.x[f]) continue;
      fill_places<kPoints>(task.x[f] + begin, n, task.centre[f], task.scale[f], t);
      fill_polynomials<kPoints>(t, task.terms[f], table[f]);
    }
    for (int i = 0; i < kPoints; ++i) {
      for (int c = 0; c < c_terms; ++c) right[i * c_terms + c] = table[2][c][i];
    }
    double* to = task.moments;
    for (int column = 0; column < task.columns; ++column) {
      alignas(64) double charge[kPoints];
      for (int i = 0; i < kPoints; ++i) charge[i] = i < n ? task.charge[column * task.pitch + begin + i] : 0.0;
      if (b_terms == 1) {
        for (int a = 0; a < a_terms; ++a) {
          for (int i = 0; i < kPoints; ++i) left[a][i] = charge[i] * table[0][a][i];
        }
        multiply_small<true>(to, c_terms, a_terms, c_terms, 1, lefts, kPoints, 1, rights, c_terms, 0,
                             static_cast<int>(n));
        to += a_terms * c_terms;
        continue;
      }
      for (int a = 0; a < a_terms; ++a) {
        alignas(64) double base[kPoints];
        for (int i = 0; i < kPoints; ++i) base[i] = charge[i] * table[0][a][i];
        for (int b = 0; b < b_terms; ++b) {
          for (int i = 0; i < kPoints; ++i) left[b][i] = base[i] * table[1][b][i];
        }
        multiply_small<true>(to, c_terms, b_terms, c_terms, 1, lefts, kPoints, 1, rights, c_terms, 0,
                             static_cast<int>(n));
        to += b_terms * c_terms;
      }
    }
  }
}

constexpr int kEvaluateVectors = kEvaluatedPoints >= 2 * kD ? 2 : 1;
constexpr int kEvaluateLanes = kEvaluateVectors * kD;
constexpr int kColumnSlots = kFirstSlots + kPairSlots;

// T_n, and with kOrder its first and second derivatives by the place.
template <int kOrder>
NWFAST_INLINE void fill_derivatives(const double* t, int terms, double (*table)[kGridTerms][kEvaluateLanes]) {
  fill_polynomials<kEvaluateLanes>(t, terms, table[0]);
  if (kOrder == 0) return;
  for (int i = 0; i < kEvaluateLanes; i += kD) {
    const DVec place = load(t + i), twice = place + place;
    DVec before[2] = {}, last[2] = {splat(1.0), DVec{}};
    for (int n = 0; n < 2 && n < terms; ++n) {
      const int at = place_of_degree(n, terms);
      store<double>(table[1][at] + i, n == 0 ? before[0] : last[0]);
      if (kOrder > 1) store<double>(table[2][at] + i, DVec{});
    }
    // T'_n+1 = 2 t T'_n - T'_n-1 + 2 T_n, and so on.
    for (int n = 2; n < terms; ++n) {
      const int at = place_of_degree(n, terms);
      const DVec value = load(table[0][place_of_degree(n - 1, terms)] + i);
      const DVec first = twice * last[0] - before[0] + value * 2.0;
      const DVec second = twice * last[1] - before[1] + last[0] * 4.0;
      before[0] = last[0];
      before[1] = last[1];
      last[0] = first;
      last[1] = second;
      store<double>(table[1][at] + i, first);
      if (kOrder > 1) store<double>(table[2][at] + i, second);
    }
  }
}

// Sums over one feature of kRows rows of a series at kEvaluateLanes points, by its polynomials and their derivatives.
template <int kOrder, int kRows>
NWFAST_INLINE void contract_rows(const double* series, int depth, const double (*a)[kGridTerms][kEvaluateLanes],
                                 DVec (&sums)[kOrder + 1][kRows][kEvaluateVectors]) {
  for (int k = 0; k < depth; ++k) {
    DVec column[kOrder + 1][kEvaluateVectors];
#pragma GCC unroll 3
    for (int o = 0; o <= kOrder; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kEvaluateVectors; ++v) column[o][v] = load(a[o][k] + v * kD);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const DVec factor = splat(series[row * depth + k]);
#pragma GCC unroll 3
      for (int o = 0; o <= kOrder; ++o) {
#pragma GCC unroll 2
        for (int v = 0; v < kEvaluateVectors; ++v) sums[o][row][v] += factor * column[o][v];
      }
    }
  }
}

// Adds kRows rows of a series, times the polynomials of another feature from degree number `at` on: the value, its
// derivatives by the first feature and by the other, and the second ones, that by both with kPairs.
template <int kOrder, int kRows, bool kPairs>
NWFAST_INLINE void add_rows(const double* series, int depth, const double (*a)[kGridTerms][kEvaluateLanes],
                            const double (*other)[kGridTerms][kEvaluateLanes], int at, DVec (&value)[kEvaluateVectors],
                            DVec (&by_a)[kEvaluateVectors], DVec (&by_other)[kEvaluateVectors],
                            DVec (&by_aa)[kEvaluateVectors], DVec (&by_others)[kEvaluateVectors],
                            DVec (&by_both)[kEvaluateVectors]) {
  DVec rows[kOrder + 1][kRows][kEvaluateVectors] = {};
  contract_rows<kOrder, kRows>(series, depth, a, rows);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kEvaluateVectors; ++v) {
      const DVec factor = load(other[0][at + r] + v * kD);
      value[v] += rows[0][r][v] * factor;
      if (kOrder > 0) {
        by_a[v] += rows[kOrder > 0][r][v] * factor;
        by_other[v] += rows[0][r][v] * load(other[1][at + r] + v * kD);
      }
      if (kOrder > 1) {
        by_aa[v] += rows[kOrder][r][v] * factor;
        by_others[v] += rows[0][r][v] * load(other[2][at + r] + v * kD);
      }
      if (kPairs) by_both[v] += rows[kOrder > 0][r][v] * load(other[1][at + r] + v * kD);
    }
  }
}

// The series of one column at kEvaluateLanes points: all slots of it, and with kPairs derivatives by ab, ac and bc
// behind them. kFlat: there is no second feature.
template <int kOrder, bool kFlat, bool kPairs>
NWFAST_INLINE void evaluate_column(const double* series, const int* terms,
                                   const double (*table)[3][kGridTerms][kEvaluateLanes],
                                   DVec (&sums)[kColumnSlots][kEvaluateVectors]) {
  constexpr int kRows = kOrder == 0 ? 4 : 2;
  const int a_terms = terms[0], b_terms = terms[1], c_terms = terms[2];
  for (int s = 0; s < kColumnSlots; ++s) {
    for (int v = 0; v < kEvaluateVectors; ++v) sums[s][v] = DVec{};
  }
  if (kFlat) {
    for (int c = 0; c < c_terms; c += kRows, series += kRows * a_terms) {
      add_rows<kOrder, kRows, kPairs>(series, a_terms, table[0], table[2], c, sums[0], sums[1], sums[3], sums[4],
                                      sums[6], sums[8]);
    }
    return;
  }
  for (int c = 0; c < c_terms; ++c) {
    DVec part[6][kEvaluateVectors] = {};  // value, by a, by b, by aa, by bb, by ab
    for (int b = 0; b < b_terms; b += kRows, series += kRows * a_terms) {
      add_rows<kOrder, kRows, kPairs>(series, a_terms, table[0], table[1], b, part[0], part[1], part[2], part[3],
                                      part[4], part[5]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kEvaluateVectors; ++v) {
      const DVec factor = load(table[2][0][c] + v * kD);
      sums[0][v] += part[0][v] * factor;
      if (kOrder > 0) {
        sums[1][v] += part[1][v] * factor;
        sums[2][v] += part[2][v] * factor;
        sums[3][v] += part[0][v] * load(table[2][1][c] + v * kD);
      }
      if (kOrder > 1) {
        sums[4][v] += part[3][v] * factor;
        sums[5][v] += part[4][v] * factor;
        sums[6][v] += part[0][v] * load(table[2][2][c] + v * kD);
      }
      if (kPairs) {
        sums[7][v] += part[5][v] * factor;
        sums[8][v] += part[1][v] * load(table[2][1][c] + v * kD);
        sums[9][v] += part[2][v] * load(table[2][1][c] + v * kD);
      }
    }
  }
}

template <int kOrder, bool kFlat, bool kPairs>
NWFAST_ONE_COPY void evaluate(const GridEvaluate<double>& task) {
  alignas(64) double t[kEvaluateLanes], table[3][3][kGridTerms][kEvaluateLanes];
  constexpr int kSlots = kOrder == 0 ? 1 : kOrder == 1 ? 4 : 7;
  const int size = task.terms[0] * task.terms[1] * task.terms[2];
  for (int64_t begin = 0; begin < task.n; begin += kEvaluateLanes) {
    const int64_t n = task.n - begin < kEvaluateLanes ? task.n - begin : kEvaluateLanes;
    for (int f = 0; f < 3; ++f) {
      if (!task.x[f]) continue;
      fill_places<kEvaluateLanes>(task.x[f] + begin, n, task.centre[f], task.scale[f], t);
      fill_derivatives<kPairs ? 2 : kOrder>(t, task.terms[f], table[f]);
    }
    DVec sums[kColumnSlots][kEvaluateVectors];
    const auto put = [&](int slot, int64_t row) __attribute__((always_inline)) {
      for (int v = 0; v < kEvaluateVectors; ++v) {
        store<double>(task.sums + row * task.sums_pitch + begin + v * kD, sums[slot][v]);
      }
    };
    for (int column = 0; column < task.columns; ++column) {
      if (kPairs && column == 0) {
        evaluate_column<2, kFlat, true>(task.series, task.terms, table, sums);
        for (int s = 0; s < kPairSlots; ++s) put(kFirstSlots + s, kFirstSlots * task.columns + s);
      } else {
        evaluate_column<kOrder, kFlat, false>(task.series + column * size, task.terms, table, sums);
      }
      for (int s = 0; s < kSlots; ++s) put(s, s * task.columns + column);
    }
  }
}

template <bool kFlat>
void evaluate_in(const GridEvaluate<double>& task) {
  task.pairs        ? evaluate<1, kFlat, true>(task)
  : task.order == 0 ? evaluate<0, kFlat, false>(task)
  : task.order == 1 ? evaluate<1, kFlat, false>(task)
                    : evaluate<2, kFlat, false>(task);
}

template <typename R>
void grid_evaluate(const GridEvaluate<R>& task) {
  at_doubles(task, task.terms[1] == 1 ? evaluate_in<true> : evaluate_in<false>);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
