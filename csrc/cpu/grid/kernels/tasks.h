// What the kernels of the grid method are given: plain arrays. See tensors.h for what they compute.

#pragma once

#include <cstdint>

#include "../../dense/kernels.h"

namespace nwfast {

constexpr int kGridTerms = 32;            // of the series of one feature, at most
constexpr int kTensorTerms = 40;          // of those and of the nodes of a mesh
constexpr int kTapPadding = 3;            // zeros before and behind the taps of a convolution
constexpr int kWindowNodes = 12;          // of a mesh that a point adds to, along one feature
constexpr int kWindowDegree = 14;         // of the polynomials that a window is made of
constexpr int kMostSlots = 7;             // values, first and second derivatives in three features
constexpr int kFirstSlots = 4;            // values and first derivatives
constexpr int kPairSlots = 6;             // second derivatives by pairs of axes: aa, bb, cc, ab, ac, bc
constexpr int64_t kMatrixPadding = 8;     // doubles behind each array that kernels may read, and do not use
constexpr int64_t kEvaluatedPoints = 16;  // a multiple of which results are written in

// Polynomials of even degree come first, in all tensors: the place of degree n among `terms`.
constexpr int place_of_degree(int n, int terms) { return n % 2 ? terms / 2 + n / 2 : n / 2; }

// What a point adds to the nodes around it, by its place f in [0, 1] between two of them: polynomials of 2 f - 1, the
// coefficient of each power for all nodes side by side; and those of the first and second derivatives by f.
struct GridWindow {
  alignas(64) double power[3][kWindowDegree + 1][kWindowNodes];
};

// The translation of tensors along one feature: to (rows, terms) = sum_o (left (rows, terms) @ matrix_o), over boxes o
// cells lower and o cells higher. The matrix of -o has the entries of that of o, with changed signs where degrees of
// source and target differ in parity.
struct GridProduct {
  double* to;
  int64_t rows;
  int terms;
  int64_t row_stride, depth_stride;      // of left, one of them 1; rows of matrices and of the result are contiguous
  int64_t offset;                        // of the tensors from where they are said to be
  const double *centre, *centre_matrix;  // of the box at the same place, or null
  int64_t pairs;
  const double *const *lower, *const *higher;  // (pairs) either may be null
  const double* const* matrix;                 // (pairs)
};

// to_i = sum_k taps_k from_(i + k) for i < n rounded up to a vector, and |k| <= reach: `from` starts `reach` before
// what belongs to the first sum, and kernels may read a vector more than the last one needs.
struct GridConvolution {
  const double* from;
  double* to;
  int64_t n;
  const double* taps;  // (kTapPadding + 2 reach + 1 + kTapPadding)
  int reach;
};

// The same for rows, which begin at multiples of the alignment: to (rows) of from (2 reach + rows), null where they are
// zero or not needed.
struct GridRowConvolution {
  const double* const* from;
  double* const* to;
  int64_t rows, n;
  const double* taps;
  int reach;
};

// moments (columns, terms[0], terms[1], terms[2]) += sum_i charge_ci T_a(t_i0) T_b(t_i1) T_c(t_i2), with Chebyshev
// polynomials of the places t = (x - centre) scale in a box.
template <typename R>
struct GridMoments {
  const R* x[3];  // null for an axis of one term
  int64_t n;
  double centre[3], scale[3];
  int terms[3];
  const GridWindow* window;  // of a mesh; null for Chebyshev series
  const double* charge;      // (columns, pitch)
  int64_t pitch;
  int columns;
  double* moments;
};

// A series and its derivatives by the places in a box: for each point
//   sums (slots, columns, sums_pitch) = sum_abc series (columns, terms[2], terms[1], terms[0])_cba T_a T_b T_c
// Slot 0 has the values; with `order` 1 slots 1 to 3 the first derivatives by axis; with 2 slots 4 to 6 the second.
// With `pairs` (and order 1) there follow, (kPairSlots, sums_pitch), the second derivatives of the first column alone.
template <typename R>
struct GridEvaluate {
  const R* x[3];
  int64_t n;
  double centre[3], scale[3];
  int terms[3];
  const GridWindow* window;
  int order;
  bool pairs;
  const double* series;
  int columns;
  double* sums;
  int64_t sums_pitch;
};

// Rows and the keys of a window, one by one: see moments.h.
template <typename R>
struct GridWindowMoments {
  TiledData<R> data;  // with values in columns
  int64_t rows;
  const R* query;           // (rows, features), packed
  const int64_t* excluded;  // (rows) or null
  double *total, *shift;    // (rows)
  double*
      sums;  // (rows, features + pairs + channels (1 + features)) in the order of moments.h, pairs (f, g) by f, then g
};

// Far rows (see ../far/tree.h). Places are in bandwidths and relative to a key u* near a group of rows: y = w (x - u*)
// of a row, e = w (u - u*) of a key. Sums are relative to the Gaussian of u*, exp(-|x - u|^2 / 2 + |x - u*|^2 / 2) =
// exp(e.y - |e|^2 / 2): for a row however far away, of numbers near 1.
constexpr int64_t kFarRows = 32;  // of a group, and in all arrays of rows
// Expansions have terms of lower degrees than this.
constexpr int far_degrees(int features) { return features == 2 ? 26 : 20; }

// Terms of so many features that have a degree below `degrees`.
constexpr int far_terms(int features, int degrees) {
  return features == 2 ? degrees * (degrees + 1) / 2 : degrees * (degrees + 1) * (degrees + 2) / 6;
}

// Rows of a group: y, and what rounding took from it; null where exponents of doubles are good enough without.
struct FarPlaces {
  int64_t rows;
  const double *place, *rest;  // (features, kFarRows)
};

// sums (columns, kFarRows) += sum_j charge_cj exp(e_j.y_i - |e_j|^2 / 2), for n keys.
struct FarDirect {
  int features, columns;
  FarPlaces rows;
  int64_t n;
  const double* key;     // (features, pitch), as the caller has them
  const double* charge;  // (columns, pitch)
  int64_t pitch;
  const double *reference, *scale;  // (features) u* as keys are, and w
  double* sums;
};

// The same of an expansion: with z = y - e for its centre, and terms z^a of the exponents a of lower degrees,
//   sums += exp(e.y - |e|^2 / 2) sum_a coefficient_ca (z half)^a
// Terms are in the order of their degree, in a degree of the exponent of the last feature, then of the second.
struct FarExpansion {
  int features, columns, degrees;
  FarPlaces rows;
  const double* centre;             // (features) as keys are
  const double *reference, *scale;  // (features)
  const double* half;               // (features) what offsets of keys are in units of
  const double* coefficients;       // (columns, pitch)
  int64_t pitch;
  double* sums;
};

// The coefficients: sum_j charge_cj exp(-|d_j|^2 / 2) (d_j / half)^a / a!, for offsets d = w (u - centre).
struct FarMoments {
  int features, columns, degrees;
  int64_t n;
  const double *key, *charge;
  int64_t key_pitch;
  const double *centre, *scale, *half;  // (features) the centre as keys are
  const double* inverse_factorial;      // 1 / a!, in the order of terms
  double* scratch;                      // (2, terms, kPadding)
  double* coefficients;
  int64_t pitch;
};

template <typename R>
struct GridKernels {
  void (*product)(const GridProduct&);
  void (*moments)(const GridMoments<R>&);
  void (*evaluate)(const GridEvaluate<R>&);
  // The same for meshes, up to first derivatives: tensors are values at their nodes.
  void (*spread)(const GridMoments<R>&);
  void (*interpolate)(const GridEvaluate<R>&);
  // Values at nodes that mirror each other become sums and differences, in the places of both, and back but for a
  // factor of 2 a feature: what a translation reads and writes of a mesh.
  void (*fold)(double* tensor, const int* terms);
  // Of one mesh for all boxes.
  void (*convolve)(const GridConvolution&);
  void (*convolve_rows)(const GridRowConvolution&);
  void (*window_moments)(const GridWindowMoments<R>&);
  // In double whatever the data is.
  void (*far_direct)(const FarDirect&);
  void (*far_expansion)(const FarExpansion&);
  void (*far_moments)(const FarMoments&);
};

template <typename R>
const GridKernels<R>& grid_kernels();

}  // namespace nwfast
