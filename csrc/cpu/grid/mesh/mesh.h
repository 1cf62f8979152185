// Meshes: another representation of a box's sums than Chebyshev series, for sums in float32.
//
// A point at x adds its charge times phi(x - node) to the kWindowNodes nodes around it along each feature; sums between
// nodes are those of a kernel K', and a sum at a point is that of the nodes around it, times phi again. With a spacing
// h of nodes, and phi the window of Kaiser and Bessel, K' is the Gaussian less two convolutions with phi: its transform
// is that of the Gaussian over the square of that of phi, and all that is left as an error are the frequencies beyond
// 2 pi / h - k that phi lets through. A point touches kWindowNodes numbers of a feature whatever the width of its box,
// so boxes may be wide, and there are few of them.

#pragma once

#include "../kernels/tasks.h"

namespace nwfast {
namespace grid {

// How wide nodes may lie apart, in bandwidths, and how narrow the window is, by the order of the derivatives that are
// asked for; how far off interpolation in one feature is taken to be, relative to exp(-z^2 / 8) of a charge at a
// distance z. That is a bound for values, and first derivatives are as good. Second ones are good to 7e-9 only: what
// asks for them (the gradient of w) gets series.
struct MeshKind {
  double spacing, shape, error;
};
constexpr MeshKind kMeshKinds[2] = {{0.35, 2.45, 1e-11}, {0.3, 2.7, 5e-11}};
constexpr const MeshKind& mesh_kind(int order) { return kMeshKinds[order > 0]; }
constexpr double kLeastMeshHalf = 1;                     // half width of a cell, in bandwidths
constexpr int kMeshSpacings[] = {5, 9, 13, 19, 25, 29};  // of a box; with B of them it has B + kWindowNodes - 1 nodes

// Of a point: its windows, and the nodes that it touches; in multiply-adds of a column.
constexpr double mesh_point_work(int features) { return features == 2 ? 350 : 3500; }

// Of translation: half of what series take, but of tensors that are larger than the caches in three features.
constexpr double mesh_translation(int features) { return features == 2 ? 0.5 : 0.9; }

const GridWindow& grid_window(int order);

// (terms, terms) between boxes of `spacings` intervals so many cells apart, in sums and differences of nodes that
// mirror each other (GridKernels::fold).
void fill_mesh_matrices(int order, int spacings, double spacing, int64_t reach, double* matrices);

}  // namespace grid
}  // namespace nwfast
