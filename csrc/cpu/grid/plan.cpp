// Choice of the grid, and the matrices between its boxes.

#include "plan.h"

#include <climits>
#include <numbers>
#include <numeric>

namespace nwfast {
namespace grid {
namespace {

using Real = long double;

constexpr double kWindowCells[] = {0.5, 1, 2, 3};  // within the radius of direct sums, where all sums are direct
constexpr double kRoundedUp = 1 + 0x1p-5;          // before short_number rounds down
constexpr int kTerms[] = {4, 8, 12, 16, 20, 24};

// The error that a series may have, such that its derivatives are as good as is asked for: those of a polynomial of
// degree T on [-1, 1] are up to T^2 and T^2 (T^2 - 1) / 3 times as large.
template <typename R>
double truncation_of(int features, int terms, int order) {
  const double square = static_cast<double>(terms) * terms;
  const double growth = order == 0 ? 1 : order == 1 ? square : square * (square - 1) / 3;
  return Accuracy<R>::kTruncation[features - 2] / growth;
}

// Of second derivatives by places in bandwidths over that of values: in the mean over a box, since T^4 / 3 is that of
// its ends alone.
double moment_growth(int terms, double half) {
  return terms * terms * terms / std::numbers::sqrt2 / std::fmin(1, half * half);
}

// Half the width of boxes in bandwidths.
template <typename R>
double half_of(const Extent& extent, int terms) {
  if (!extent.moments) {
    const double truncation = truncation_of<R>(extent.features, terms, extent.order);
    return std::min(linear::half_width(terms, truncation), Accuracy<R>::kLargestHalf);
  }
  const double most = Accuracy<R>::kTruncation[extent.features - 2] * Accuracy<R>::kMomentTruncation;
  double half = 1;
  for (int step = 0; step < 6; ++step) {
    half = std::min(linear::half_width(terms, most / moment_growth(terms, half)), Accuracy<R>::kLargestHalf);
  }
  return half;
}

// One axis for boxes of this half width; `terms` at most.
template <typename R>
void set_axis(const Extent& extent, int f, double half, int terms, Axis& axis) {
  axis = Axis();
  axis.feature = f;
  axis.scale = extent.scale[f];
  axis.from = extent.low[f];
  axis.to = extent.high[f];
  const double spread = extent.high[f] - extent.low[f];
  axis.terms = terms;
  axis.single = !(spread * axis.scale > 2 * half);
  if (axis.single) {
    axis.side = spread > 0 ? spread : 1;
    axis.middle = extent.low[f] + spread / 2;
    axis.half = spread * axis.scale / 2;
    for (const int fewer : kTerms) {
      // Small distances are what derivatives are made of: errors are small beside those, too.
      const double error = linear::expansion_error(fewer, axis.half);
      const double most = linear::expansion_error(terms, half) * std::fmin(1, axis.half * axis.half);
      if (fewer < terms && error <= most) axis.terms = std::min(axis.terms, fewer);
    }
    return;
  }
  axis.side = linear::short_number(2 * half / axis.scale);
  axis.half = axis.width() / 2;
}

// The same with a mesh of so many spacings; false where distances are so small that only a series keeps their digits.
template <typename R>
bool set_mesh_axis(const Extent& extent, int f, int spacings, Axis& axis) {
  const double spacing = mesh_kind(extent.order).spacing;
  set_axis<R>(extent, f, spacings * spacing / 2, 1, axis);
  axis.spacings = spacings;
  for (const int fewer : kMeshSpacings) {
    if (axis.single && axis.width() <= fewer * spacing) axis.spacings = std::min(axis.spacings, fewer);
  }
  axis.terms = axis.spacings + kWindowNodes - 1;
  axis.node_reach = std::min(node_reach(axis.width() / axis.spacings), axis.single ? axis.terms - 1 : INT_MAX);
  return !axis.single || axis.half >= kLeastMeshHalf;
}

// How much larger than for points that are spread evenly within cells the bound of a mesh's error is, whose cells are
// wide: the sum of exp(-z^2 / 8) by distances of cells over that by distances of points.
double evenly_spread(const Axis& axis) {
  double cells = 1;
  for (int64_t apart = 1; !axis.single && apart < kMostPairs; ++apart) {
    const double gap = axis.gap_of(apart);
    cells += 2 * std::exp(-gap * gap / 8);
  }
  return std::fmax(1, cells * axis.width() / (2 * std::sqrt(2 * std::numbers::pi)));
}

// The cells of a window, between these axes.
struct Window {
  int crossed = 0;  // features with more than one cell
  double width = 1, cells = 0, ranges = 0;

  template <typename Axes>
  Window(const Axes& axes, int features, double radius) {
    for (int f = 0; f < features; ++f) {
      crossed += !axes[f].single;
      if (!axes[f].single) width = axes[f].width();
    }
    const auto reach = [&](double within) { return static_cast<int>(std::ceil(within / width)); };
    const int far_a = crossed > 1 ? reach(radius) : 0, far_b = crossed > 2 ? reach(radius) : 0;
    for (int i = -far_a; i <= far_a; ++i) {
      for (int j = -far_b; j <= far_b; ++j) {
        const double gap = width * std::hypot(std::max(std::abs(i) - 1, 0), std::max(std::abs(j) - 1, 0));
        if (gap > radius) continue;
        ++ranges;
        cells += crossed > 0 ? 2 * reach(std::sqrt(radius * radius - gap * gap)) + 1 : 1;
      }
    }
  }
  double volume() const { return cells * std::pow(width, crossed); }
};

// Plan::near, such that it serves rows among keys that lie alike everywhere, twice over.
template <typename R>
double near_radius(const Extent& extent, const Axis (&axes)[kAxes], double radius) {
  const Window wide(axes, extent.features, radius);
  const double charge = 2 * wide.volume() / std::pow(2 * std::numbers::pi, wide.crossed / 2.0);
  return std::fmin(radius, std::sqrt(2 * std::log(charge / Accuracy<R>::kBeyond)));
}

// What direct sums of all rows cost, in nanoseconds, with windows of cells of these axes. A window holds all keys along
// an axis of one cell; along the others it is larger than the ball of this radius.
template <typename R>
double window_work(const Extent& extent, const Axis (&axes)[kAxes], double radius, double boxes) {
  const Window window(axes, extent.features, radius);
  bool all[kAxes];
  for (int f = 0; f < extent.features; ++f) all[f] = axes[f].single;
  const double pairs = pairs_within(extent, radius, all);
  const double ball[kAxes + 1] = {1, 2 * radius, std::numbers::pi * radius * radius,
                                  4 * std::numbers::pi / 3 * radius * radius * radius};
  const double queries = static_cast<double>(extent.queries), windows = std::fmin(boxes, queries);
  const double found =
      std::fmin(pairs * window.volume() / ball[window.crossed], static_cast<double>(extent.keys) * queries);
  return found * pair_time<R>(extent.columns, extent.order) +
         windows * (kWindow + kWindowRange * window.ranges + kWindowKey * found / queries);
}

// The features by their numbers of cells, most first.
void by_cells(const Extent& extent, const Axis (&axes)[kAxes], int* order) {
  double cells[kAxes] = {};
  for (int f = 0; f < kAxes; ++f) {
    order[f] = f;
    if (f < extent.features) cells[f] = axes[f].single ? 1 : (extent.high[f] - extent.low[f]) / axes[f].side + 2;
  }
  std::stable_sort(order, order + extent.features, [&](int a, int b) { return cells[a] > cells[b]; });
}

// How much of the volume lies within a box and a half of any key, told by a sample.
double reached_share(const Extent& extent, const Axis (&axes)[kAxes]) {
  constexpr int kPlaces = 64;
  constexpr double kStep[kAxes] = {0.8191725133961644, 0.6710436067037893, 0.5497004779019702};  // fills a cube evenly
  const int64_t count = static_cast<int64_t>(extent.sample[0].size()), step = std::max<int64_t>(1, count / 256);
  int reached = 0;
  for (int i = 0; i < kPlaces; ++i) {
    bool any = false;
    for (int64_t j = 0; j < count && !any; j += step) {
      any = true;
      for (int f = 0; f < extent.features && any; ++f) {
        const double share = (i + 0.5) * kStep[f], spread = extent.high[f] - extent.low[f];
        const double place = extent.low[f] + (share - std::floor(share)) * spread;
        any = std::fabs(place - extent.sample[f][j]) * extent.scale[f] <= axes[f].width() / 2 + kFadeTo;
      }
    }
    reached += any;
  }
  return (reached + 0.5) / (kPlaces + 0.5);
}

// Numbers of occupied boxes, told by a sample.
double occupied(const Extent& extent, const Axis (&axes)[kAxes]) {
  double all = 1;
  const size_t count = extent.sample[0].size();
  std::vector<double> cell(count);
  for (int f = 0; f < extent.features; ++f) {
    const Axis& axis = axes[f];
    if (axis.single) continue;
    all *= (extent.key_high[f] - extent.key_low[f]) / axis.side + 1;
    for (size_t i = 0; i < count; ++i) cell[i] = cell[i] * 1e6 + std::floor(extent.sample[f][i] / axis.side) * 1.37;
  }
  std::sort(cell.begin(), cell.end());
  const double distinct = static_cast<double>(std::unique(cell.begin(), cell.end()) - cell.begin());
  const double most = std::fmin(all, static_cast<double>(extent.keys)), samples = static_cast<double>(count);
  // Of B boxes that are alike, B (1 - exp(-samples / B)) show.
  double low = distinct, high = std::fmax(most, distinct);
  for (int step = 0; step < 40; ++step) {
    const double middle = std::sqrt(low * high);
    (middle * -std::expm1(-samples / middle) < distinct ? low : high) = middle;
  }
  return std::fmin(high, most);
}

}  // namespace

double pairs_within(const Extent& extent, double radius, const bool* all) {
  const auto& queries = extent.query_sample[0].empty() ? extent.sample : extent.query_sample;
  const auto count = [](const std::vector<double>& of) { return static_cast<int64_t>(of.size()); };
  const int64_t step_query = std::max<int64_t>(1, count(queries[0]) / 64);
  const int64_t step_key = std::max<int64_t>(1, count(extent.sample[0]) / 256);
  double pairs = 0, near = 0.5;
  for (int64_t i = 0; i < count(queries[0]); i += step_query) {
    for (int64_t j = 0; j < count(extent.sample[0]); j += step_key) {
      double square = 0;
      for (int f = 0; f < extent.features; ++f) {
        const double z = (queries[f][i] - extent.sample[f][j]) * extent.scale[f];
        square += all && all[f] ? 0 : z * z;
      }
      near += square <= radius * radius;
      ++pairs;
    }
  }
  return near / (pairs + 0.5) * static_cast<double>(extent.keys) * static_cast<double>(extent.queries);
}

template <typename R>
bool make_plan(const Extent& extent, Plan& plan) {
  plan.features = extent.features;
  plan.log_span = log_span_of<R>(extent.keys);
  plan.radius = plan.radius_at(kLevelDistance[0]);
  double best = INFINITY;
  const double points =
      static_cast<double>(extent.keys) + static_cast<double>(extent.queries) * (1 + extent.order + extent.moments);
  const double multiply = extent.columns * kMultiply;
  Axis chosen[kAxes];
  // Of translating all boxes between these axes, and the number of boxes.
  const auto translation = [&](const Axis(&axes)[kAxes], double& boxes) {
    double size = 1, sides = 0;
    for (int f = 0; f < extent.features; ++f) {
      size *= axes[f].terms;
      const double apart = axes[f].single ? 0 : std::ceil(plan.radius / axes[f].width());
      const double spread = axes[f].single ? 0 : (extent.high[f] - extent.low[f]) / axes[f].side;
      sides += (2 * std::fmin(apart, spread) + 1) * axes[f].terms;
    }
    boxes = occupied(extent, axes);
    return boxes * size * sides;
  };
  // Of a mesh: its nodes but for those that lie too far from all keys; INFINITY where planes of it are too large.
  const MeshKinds kinds = mesh_kinds(extent.order);
  const auto convolution = [&](const Axis(&axes)[kAxes], double& boxes) {
    int order[kAxes];
    double nodes[kAxes], all = 1, rows = 1, size = 1;
    by_cells(extent, axes, order);
    boxes = occupied(extent, axes);
    for (int f = 0; f < extent.features; ++f) {
      const Axis& axis = axes[f];
      const double spread = axis.single ? 1 : (extent.high[f] - extent.low[f]) / axis.side + 1;
      nodes[f] = spread * axis.spacings + kWindowNodes;
      all *= nodes[f];
      size *= axis.terms;
      if (f != order[extent.features - 1]) rows *= nodes[f];
    }
    const Axis& first = axes[order[0]];
    const double planes = static_cast<double>(mesh_planes(kinds, 1, first.spacings, first.node_reach));
    if (!(planes * all / nodes[order[0]] * 8 * extent.columns < kMostMeshBytes)) return double{INFINITY};
    const double passes = extent.features + 1.5 * (kinds.sums + kinds.across - 2);
    return all * reached_share(extent, axes) * passes * kMeshNodeWork + rows * kMeshRowWork +
           boxes * size * kMeshCopyWork * (1 + kinds.sums) / 2;
  };
  for (const int terms : kTerms) {
    if (terms == 4) continue;
    const double half = half_of<R>(extent, terms);
    if (2 * plan.radius / (2 * half) + 3 > kMostPairs) continue;
    Axis axes[kAxes];
    double size = 1, boxes;
    for (int f = 0; f < extent.features; ++f) {
      set_axis<R>(extent, f, half, terms, axes[f]);
      size *= axes[f].terms;
    }
    const double between = translation(axes, boxes), cost = multiply * (points * size * (1 + 2.0 / terms) + between);
    if (!(cost < best)) continue;
    best = cost;
    plan.translation = between;
    plan.boxes = boxes;
    plan.work = cost;
    std::copy(axes, axes + kAxes, chosen);
  }
  plan.order = extent.order;
  plan.moments = extent.moments;
  plan.mesh = plan.one_mesh = false;
  for (const int spacings : kMeshSpacings) {
    if (sizeof(R) == 8) break;
    Axis axes[kAxes];
    bool fits = true;
    double boxes;
    for (int f = 0; f < extent.features; ++f) fits &= set_mesh_axis<R>(extent, f, spacings, axes[f]);
    if (!fits) continue;
    for (const bool one : {false, true}) {
      // Second derivatives of a mesh are not good enough: one mesh has others for them.
      if (one ? extent.features < 3 : extent.order == 2) continue;
      const double between =
          one ? convolution(axes, boxes) : translation(axes, boxes) * mesh_translation(extent.features);
      const double cost = multiply * (points * mesh_point_work(extent.features) + between);
      if (!(cost < best)) continue;
      best = cost;
      plan.translation = between;
      plan.mesh = true;
      plan.one_mesh = one;
      plan.boxes = boxes;
      plan.work = cost;
      std::copy(axes, axes + kAxes, chosen);
    }
  }
  plan.direct = false;
  for (const double cells : kWindowCells) {
    if (extent.expand) break;
    Axis axes[kAxes];
    double near = plan.radius;
    for (int step = 0; step < 2; ++step) {  // the radius and the width of cells depend on one another
      for (int f = 0; f < extent.features; ++f) set_axis<R>(extent, f, near / cells * kRoundedUp / 2, 4, axes[f]);
      near = near_radius<R>(extent, axes, plan.radius);
    }
    const double boxes = occupied(extent, axes);
    const double cost = window_work<R>(extent, axes, near, boxes);
    if (!(cost < best)) continue;
    best = cost;
    plan.mesh = plan.one_mesh = false;
    plan.direct = true;
    plan.boxes = boxes;
    plan.work = cost;
    std::copy(axes, axes + kAxes, chosen);
  }
  plan.near = near_radius<R>(extent, chosen, plan.radius);
  // Without a third feature the axis in the middle is empty.
  int order[kAxes];
  by_cells(extent, chosen, order);
  const int places[2][kAxes] = {{0, 2, 1}, {0, 1, 2}};
  double all = 1;
  double even = 1;
  plan.truncation = plan.moment_error = 0;
  for (int a = 0; a < kAxes; ++a) plan.axis[a] = Axis();
  for (int i = 0; i < extent.features; ++i) {
    const int f = order[i];
    Axis& axis = plan.axis[places[extent.features - 2][i]];
    axis = chosen[f];
    plan.truncation +=
        axis.spacings > 0 ? mesh_kind(extent.order).error : linear::expansion_error(axis.terms, axis.half);
    even *= axis.spacings > 0 ? evenly_spread(axis) : 1;
    plan.moment_error += axis.spacings > 0
                             ? kMeshSecondError
                             : linear::expansion_error(axis.terms, axis.half) * moment_growth(axis.terms, axis.half);
    if (axis.single) continue;
    const double most = std::fmax(std::fabs(extent.key_low[f]), std::fabs(extent.key_high[f]));
    if (!(most * axis.scale < kMostScaled) || !(most / axis.side < kMostIndex / 4)) return false;
    // Around the keys lie cells of queries, as far as rows may be summed directly.
    const double around = std::ceil(plan.radius_at(kLevelDistance[kLevels - 1]) / axis.width()) + 1;
    axis.low = static_cast<int64_t>(std::floor(extent.key_low[f] / axis.side) - around);
    axis.cells = static_cast<int64_t>(std::floor(extent.key_high[f] / axis.side) + around) - axis.low + 1;
    axis.cells += static_cast<int64_t>(around);  // so that no window reaches into the next row of cells
    axis.low -= static_cast<int64_t>(around);
    axis.cells += static_cast<int64_t>(around);
    all *= static_cast<double>(axis.cells);
    const double spread = std::ceil((extent.high[f] - extent.low[f]) / axis.side) + 1;
    axis.reach = static_cast<int64_t>(std::fmin(std::ceil(plan.radius / axis.width()), spread));
  }
  plan.truncation *= 1 + plan.truncation;  // products of the errors of two features
  plan.moment_error /= even;
  return all < kMostCells;
}
template bool make_plan<float>(const Extent&, Plan&);
template bool make_plan<double>(const Extent&, Plan&);

namespace {

// Chebyshev coefficients, in source and target, of exp(-z^2 / 2) for boxes `apart` cells apart.
void fill_matrix(const Axis& axis, int64_t apart, double* matrix) {
  const int terms = axis.terms;
  const Real half = axis.half;
  // Where all distances are small, what differs from 1 has to keep its own digits.
  const bool small = apart == 0 && half < 0.25L;
  std::vector<Real> polynomial(terms * terms), values(terms * terms), half_done(terms * terms);
  std::vector<Real> node(terms);
  for (int p = 0; p < terms; ++p) {
    node[p] = std::cos(std::numbers::pi_v<Real> * (p + 0.5L) / terms);
    for (int n = 0; n < terms; ++n) {
      polynomial[n * terms + p] =
          std::cos(std::numbers::pi_v<Real> * (p + 0.5L) * n / terms) * (n > 0 ? 2.0L : 1.0L) / terms;
    }
  }
  for (int p = 0; p < terms; ++p) {
    for (int q = 0; q < terms; ++q) {
      const Real z = half * (node[p] - node[q] + 2 * static_cast<Real>(apart));
      values[p * terms + q] = small ? std::expm1(-z * z / 2) : std::exp(-z * z / 2);
    }
  }
  for (int m = 0; m < terms; ++m) {
    for (int q = 0; q < terms; ++q) {
      Real sum = 0;
      for (int p = 0; p < terms; ++p) sum += polynomial[m * terms + p] * values[p * terms + q];
      half_done[m * terms + q] = sum;
    }
  }
  for (int n = 0; n < terms; ++n) {
    for (int m = 0; m < terms; ++m) {
      Real sum = 0;
      for (int q = 0; q < terms; ++q) sum += polynomial[n * terms + q] * half_done[m * terms + q];
      if (small && n == 0 && m == 0) sum += 1;
      matrix[place_of_degree(n, terms) * terms + place_of_degree(m, terms)] = static_cast<double>(sum);
    }
  }
}

}  // namespace

void fill_matrices(Plan& plan) {
  for (Axis& axis : plan.axis) {
    const int terms = axis.terms;
    axis.decay.assign(axis.reach + 1, 1);
    for (int64_t apart = 0; apart <= axis.reach; ++apart) {
      const double gap = axis.gap_of(apart);
      axis.decay[apart] = std::exp(-gap * gap / (axis.spacings > 0 ? 8 : 4));
    }
    if (plan.one_mesh) {
      for (const bool squares : {false, true}) {
        if (squares && plan.order < 2) break;
        axis.taps_[squares] = mesh_taps(plan.order, axis.width() / axis.spacings, axis.node_reach, squares);
      }
      continue;
    }
    axis.matrices.assign((axis.reach + 1) * terms * terms + kMatrixPadding, 0);
    if (terms == 1) {
      axis.matrices[0] = 1;
      continue;
    }
    if (plan.mesh) {
      fill_mesh_matrices(plan.order, axis.spacings, axis.width() / axis.spacings, axis.reach, axis.matrices.data());
      continue;
    }
    for (int64_t apart = 0; apart <= axis.reach; ++apart) {
      fill_matrix(axis, apart, axis.matrices.data() + apart * terms * terms);
    }
  }
}

}  // namespace grid
}  // namespace nwfast
