// Meshes: the charges of points are spread over the nodes around them, and sums at points are gathered from these.
//
// The nodes of a feature that a point touches lie in lanes, three vectors of four. A box of B spacings has
// B + kWindowNodes - 1 nodes, so that the windows of its points lie inside. One point after the other: a point touches
// kWindowNodes nodes of each feature, and neither kernel does more than pass over these once for each column.

#pragma once

#include "doubles.h"
#include "tensors.h"

namespace nwfast {
namespace NWFAST_ISA {

typedef double Quad __attribute__((vector_size(32)));
typedef double AnyQuad __attribute__((vector_size(32), aligned(8), may_alias));
constexpr int kQuads = kWindowNodes / 4;

// By reference: not all processors of this build have registers that return four doubles.
NWFAST_INLINE const AnyQuad& quad(const double* p) { return *reinterpret_cast<const AnyQuad*>(p); }
NWFAST_INLINE AnyQuad& quad(double* p) { return *reinterpret_cast<AnyQuad*>(p); }

constexpr int kMeshPoints = 16;  // whose windows are held at once

// Of one feature: the first node of each point's window, and its weights with their derivatives up to kOrder by the
// place in a box.
template <int kOrder>
struct Windows {
  int first[kMeshPoints];
  alignas(64) double weight[kMeshPoints][kOrder + 1][kWindowNodes];

  template <typename R>
  NWFAST_INLINE void fill(const GridWindow& window, const R* x, int n, double centre, double scale, int terms) {
    const double spacings = static_cast<double>(terms - kWindowNodes + 1);
    for (int i = 0; i < n; ++i) {
      double place = ((static_cast<double>(x[i]) - centre) * scale + 1) * (spacings / 2);
      place = place > 0 ? place : 0;  // rounding may put a point beyond the edge of its box
      const double most = spacings - 1;
      first[i] = static_cast<int>(place < most ? place : most);
      const double f = place - first[i], at = 2 * (f < 1 ? f : 1) - 1;
      double factor = 1;
#pragma GCC unroll 3
      for (int order = 0; order <= kOrder; ++order) {
        Quad sums[kQuads];
        for (int v = 0; v < kQuads; ++v) sums[v] = quad(window.power[order][kWindowDegree] + 4 * v);
        for (int k = kWindowDegree - 1; k >= 0; --k) {
          for (int v = 0; v < kQuads; ++v) sums[v] = sums[v] * at + quad(window.power[order][k] + 4 * v);
        }
        for (int v = 0; v < kQuads; ++v) quad(weight[i][order] + 4 * v) = sums[v] * factor;
        factor *= spacings / 2;
      }
    }
  }
};

template <typename R>
void grid_spread(const GridMoments<R>& task) {
  Windows<0> windows[3];
  const bool flat = !task.x[1];
  const int64_t b_terms = task.terms[1], c_terms = task.terms[2], size = task.terms[0] * b_terms * c_terms;
  const int b_nodes = flat ? 1 : kWindowNodes;
  if (flat) {
    for (int i = 0; i < kMeshPoints; ++i) {
      windows[1].first[i] = 0;
      windows[1].weight[i][0][0] = 1;
    }
  }
  for (int64_t begin = 0; begin < task.n; begin += kMeshPoints) {
    const int n = static_cast<int>(task.n - begin < kMeshPoints ? task.n - begin : kMeshPoints);
    for (int f = 0; f < 3; ++f) {
      if (task.x[f]) windows[f].fill(*task.window, task.x[f] + begin, n, task.centre[f], task.scale[f], task.terms[f]);
    }
    for (int column = 0; column < task.columns; ++column) {
      double* const moments = task.moments + column * size;
      const double* const charge = task.charge + column * task.pitch + begin;
      for (int i = 0; i < n; ++i) {
        Quad along[kQuads];
        for (int v = 0; v < kQuads; ++v) along[v] = quad(windows[2].weight[i][0] + 4 * v) * charge[i];
        double* plane = moments + (windows[0].first[i] * b_terms + windows[1].first[i]) * c_terms + windows[2].first[i];
        for (int a = 0; a < kWindowNodes; ++a, plane += b_terms * c_terms) {
          double* row = plane;
          for (int b = 0; b < b_nodes; ++b, row += c_terms) {
            const double factor = windows[0].weight[i][0][a] * windows[1].weight[i][0][b];
#pragma GCC unroll 3
            for (int v = 0; v < kQuads; ++v) quad(row + 4 * v) += along[v] * factor;
          }
        }
      }
    }
  }
}

NWFAST_INLINE double dot_quads(const Quad* x, const double* weight) {
  Quad sum = {};
  for (int v = 0; v < kQuads; ++v) sum += x[v] * quad(weight + 4 * v);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// What one plane adds up to, times the weights of the middle feature and their derivatives.
template <int kOrder>
NWFAST_INLINE void sum_plane(const double* row, int64_t pitch, const double (*weight)[kWindowNodes],
                             Quad (&sums)[kOrder + 1][kQuads]) {
  for (int b = 0; b < kWindowNodes; ++b, row += pitch) {
#pragma GCC unroll 3
    for (int v = 0; v < kQuads; ++v) {
      const Quad value = quad(row + 4 * v);
#pragma GCC unroll 3
      for (int o = 0; o <= kOrder; ++o) sums[o][v] += value * weight[o][b];
    }
  }
}

// All slots of one column at one point, with kOrder 2 in the order of kFirstSlots and kPairSlots. kFlat: there is no
// second feature. kOrders: of the derivatives that windows have.
template <int kOrder, bool kFlat, int kOrders>
NWFAST_INLINE void interpolate_point(const double* series, const int* terms, const Windows<kOrders>* windows, int i,
                                     double* slots) {
  const int64_t a_terms = terms[0], b_terms = terms[1];
  const auto &by_a = windows[0].weight[i], &by_c = windows[2].weight[i];
  const double* plane =
      series + (windows[2].first[i] * b_terms + (kFlat ? 0 : windows[1].first[i])) * a_terms + windows[0].first[i];
  Quad along_c[kOrder + 1][kQuads] = {};
  if constexpr (kFlat) {
    sum_plane<kOrder>(plane, a_terms, by_c, along_c);
    if (kOrder > 0) slots[2] = 0;
    if (kOrder > 1) slots[5] = slots[7] = slots[9] = 0;
  } else {
    Quad along_b[kOrder + 1][kQuads] = {};  // but for its first entry, which along_c has as well
    Quad along_both[kQuads] = {};
    for (int c = 0; c < kWindowNodes; ++c, plane += b_terms * a_terms) {
      Quad sums[kOrder + 1][kQuads] = {};
      sum_plane<kOrder>(plane, a_terms, windows[1].weight[i], sums);
#pragma GCC unroll 3
      for (int o = 0; o <= kOrder; ++o) {
#pragma GCC unroll 3
        for (int v = 0; v < kQuads; ++v) {
          along_c[o][v] += sums[0][v] * by_c[o][c];
          if (o > 0) along_b[o][v] += sums[o][v] * by_c[0][c];
          if (o > 1) along_both[v] += sums[kOrder > 0][v] * by_c[kOrder > 0][c];
        }
      }
    }
    if (kOrder > 0) slots[2] = dot_quads(along_b[kOrder > 0], by_a[0]);
    if constexpr (kOrder > 1) {
      slots[5] = dot_quads(along_b[2], by_a[0]);
      slots[7] = dot_quads(along_b[1], by_a[1]);
      slots[9] = dot_quads(along_both, by_a[0]);
    }
  }
  slots[0] = dot_quads(along_c[0], by_a[0]);
  if constexpr (kOrder > 0) {
    slots[1] = dot_quads(along_c[0], by_a[1]);
    slots[3] = dot_quads(along_c[1], by_a[0]);
  }
  if constexpr (kOrder > 1) {
    slots[4] = dot_quads(along_c[0], by_a[2]);
    slots[6] = dot_quads(along_c[2], by_a[0]);
    slots[8] = dot_quads(along_c[1], by_a[1]);
  }
}

template <int kOrder, bool kFlat, bool kPairs>
NWFAST_ONE_COPY void interpolate(const GridEvaluate<double>& task) {
  constexpr int kOrders = kPairs ? 2 : kOrder, kSlots = 3 * kOrder + 1;
  Windows<kOrders> windows[3];
  const int size = task.terms[0] * task.terms[1] * task.terms[2];
  for (int64_t begin = 0; begin < task.n; begin += kMeshPoints) {
    const int n = static_cast<int>(task.n - begin < kMeshPoints ? task.n - begin : kMeshPoints);
    for (int f = 0; f < 3; ++f) {
      if (task.x[f]) windows[f].fill(*task.window, task.x[f] + begin, n, task.centre[f], task.scale[f], task.terms[f]);
    }
    for (int column = 0; column < task.columns; ++column) {
      const double* const series = task.series + column * size;
      double* const to = task.sums + begin;
      for (int i = 0; i < n; ++i) {
        double slots[kFirstSlots + kPairSlots];
        if (kPairs && column == 0) {
          interpolate_point<kOrders, kFlat, kOrders>(series, task.terms, windows, i, slots);
          for (int s = 0; s < kPairSlots; ++s) {
            to[(kFirstSlots * task.columns + s) * task.sums_pitch + i] = slots[kFirstSlots + s];
          }
        } else {
          interpolate_point<kOrder, kFlat, kOrders>(series, task.terms, windows, i, slots);
        }
        for (int s = 0; s < kSlots; ++s) to[(s * task.columns + column) * task.sums_pitch + i] = slots[s];
      }
    }
  }
}

template <bool kFlat>
void interpolate_in(const GridEvaluate<double>& task) {
  task.pairs        ? interpolate<1, kFlat, true>(task)
  : task.order == 0 ? interpolate<0, kFlat, false>(task)
                    : interpolate<1, kFlat, false>(task);
}

template <typename R>
void grid_interpolate(const GridEvaluate<R>& task) {
  at_doubles(task, task.x[1] ? interpolate_in<false> : interpolate_in<true>);
}

// (outer, terms, inner) along the feature in the middle.
NWFAST_INLINE void fold_along(double* tensor, int64_t outer, int terms, int64_t inner) {
  for (int64_t block = 0; block < outer; ++block, tensor += terms * inner) {
    for (int n = 0; n < terms / 2; ++n) {
      double *const lower = tensor + n * inner, *const upper = tensor + (terms - 1 - n) * inner;
      for (int64_t i = 0; i < inner; ++i) {
        const double first = lower[i], second = upper[i];
        lower[i] = first + second;
        upper[i] = first - second;
      }
    }
  }
}

inline void grid_fold(double* tensor, const int* terms) {
  fold_along(tensor, 1, terms[0], static_cast<int64_t>(terms[1]) * terms[2]);
  fold_along(tensor, terms[0], terms[1], terms[2]);
  fold_along(tensor, static_cast<int64_t>(terms[0]) * terms[1], terms[2], 1);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
