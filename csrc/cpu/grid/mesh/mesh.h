// Meshes: another representation of boxes' sums than Chebyshev series, for sums in float32.
//
// A point at x adds its charge times phi(x - node) to the kWindowNodes nodes around it along each feature; sums between
// nodes are those of a kernel K', and a sum at a point is that of the nodes around it, times phi again. With a spacing
// h of nodes, and phi the window of Kaiser and Bessel, K' is the Gaussian less two convolutions with phi: its transform
// is that of the Gaussian over the square of that of phi, and all that is left as an error are the frequencies beyond
// 2 pi / h - k that phi lets through. A point touches kWindowNodes numbers of a feature whatever the bandwidth is, and
// what lies between costs a convolution of the nodes, which there are so many of in a cube of a bandwidth.
//
// Each box has a mesh of its own, which takes the place of its moments and its series (translation.h). Where three
// features have many boxes beside the volume between them, all are one mesh, whose kernel is a few numbers in the place
// of matrices, and nodes that boxes share are there once (sums.h).

#pragma once

#include <cmath>
#include <vector>

#include "../kernels/tasks.h"

namespace nwfast {
namespace grid {

// How wide nodes may lie apart, in bandwidths, and how narrow the window is, by the order of the derivatives that are
// asked for; how far off interpolation in one feature is taken to be, relative to exp(-z^2 / 8) of a charge at a
// distance z. That is a bound for values, and of the second kind for first derivatives and for sums of z^2 times the
// kernel, which are values of a mesh of their own.
struct MeshKind {
  double spacing, shape, error;
};
constexpr MeshKind kMeshKinds[2] = {{0.35, 2.45, 1e-11}, {0.3, 2.7, 8e-11}};
constexpr double kMeshSecondError = 7e-9;  // of second derivatives by the place in bandwidths, of the second kind
constexpr const MeshKind& mesh_kind(int order) { return kMeshKinds[order > 0]; }
constexpr double kLeastMeshHalf = 1;                     // half width of a cell, in bandwidths
constexpr int kMeshSpacings[] = {5, 9, 13, 19, 25, 29};  // of a box; with B of them it has B + kWindowNodes - 1 nodes
// K' is below the error of the window from the first of these distances on, in bandwidths, and fades out up to the
// second: what is left of it there are frequencies of a sharp edge.
constexpr double kFadeFrom = 7.2, kFadeTo = 9.3;

// Multiply-adds of a column. Of a point: its windows, and the nodes that it touches. Of a node: its convolution along a
// feature. Of a node of a box: to clear it, and to add it to the mesh or to copy it from there. Of a row of nodes, even
// one that is left out.
constexpr double mesh_point_work(int features) { return features == 2 ? 350 : 3500; }
constexpr double kMeshNodeWork = 110, kMeshCopyWork = 40, kMeshRowWork = 100;

// Of the translation of boxes' own meshes: half of what series take, but of tensors that are larger than the caches in
// three features.
constexpr double mesh_translation(int features) { return features == 2 ? 0.5 : 0.9; }

// Bytes of nodes that are held at once: where there is a choice, and at most.
constexpr double kMeshBytes = 6e7, kMostMeshBytes = 8e8;

const GridWindow& grid_window(int order);

// Meshes that the sums of one column take: with second derivatives those of values and one for each feature.
struct MeshKinds {
  int across, sums;  // after the convolution of all features but the first, and of all
};
constexpr MeshKinds mesh_kinds(int order) { return order < 2 ? MeshKinds{1, 1} : MeshKinds{3, 4}; }
// Planes across the first axis that are held for so many cells of this axis at a time.
inline int64_t mesh_planes(const MeshKinds& kinds, int64_t layers, int spacings, int reach) {
  const int64_t own = layers * spacings + kWindowNodes;
  return own * (1 + kinds.sums) + 2 * (own + reach) * kinds.across;
}

// How far apart nodes count for one another.
inline int node_reach(double spacing) { return static_cast<int>(std::ceil(kFadeTo / spacing)); }

// (kTapPadding + 2 reach + 1 + kTapPadding) numbers: K' at so many spacings, or, if `squares`, what z^2 times the
// Gaussian has in its place.
std::vector<double> mesh_taps(int order, double spacing, int reach, bool squares);

// (terms, terms) between boxes of `spacings` intervals so many cells apart, in sums and differences of nodes that
// mirror each other (GridKernels::fold).
void fill_mesh_matrices(int order, int spacings, double spacing, int64_t reach, double* matrices);

}  // namespace grid
}  // namespace nwfast
