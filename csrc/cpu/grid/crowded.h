// Which boxes of targets are expanded: those for which it is less work than meeting the sources around one by one.

#pragma once

#include "translation.h"

namespace nwfast {
namespace grid {

// Boxes of targets to expand, ascending; none where direct sums are less work for all together.
template <typename R>
std::vector<int64_t> choose_boxes(const Plan& plan, const Points<R>& sources, const Points<R>& targets, int columns,
                                  int order, bool serial) {
  if (plan.direct) return {};
  const int64_t boxes = static_cast<int64_t>(targets.boxes.size());
  const double size = static_cast<double>(plan.size()) * columns * kMultiply;
  double sides = 0;
  for (const Axis& axis : plan.axis) {
    if (axis.terms > 1) sides += static_cast<double>(std::min(2 * axis.reach + 1, axis.cells) * axis.terms);
  }
  // Of a box; a mesh is one for all.
  const double translation = plan.one_mesh ? kMeshCopyWork * size : sides * size,
               evaluation = plan.point_work() * columns * kMultiply * (1 + order);
  const double pair = pair_time<R>(columns, order);
  // Told by a sample first.
  constexpr int64_t kSample = 64;
  std::vector<WindowFinder::Range> ranges;
  const int64_t count = std::min(boxes, kSample);
  double direct = 0, points = 0;
  {
    WindowFinder finder(plan, sources.boxes, plan.near);
    for (int64_t i = 0; i < count; ++i) {
      const Box& box = targets.boxes[i * boxes / count];
      const double rows = static_cast<double>(box.end - box.begin);
      direct += rows * static_cast<double>(finder.find(box.cell, ranges));
      points += rows;
    }
  }
  const double moments = plan.point_work() * columns * kMultiply * static_cast<double>(sources.n) +
                         (plan.one_mesh ? plan.translation * columns * kMultiply
                                        : translation * static_cast<double>(sources.boxes.size()));
  const double rows = static_cast<double>(targets.n);
  const double by_pairs = direct / std::fmax(points, 1) * rows * pair;
  const double by_series = moments + evaluation * rows;
  std::vector<int64_t> expanded;
  if (by_pairs * 4 < by_series) return expanded;
  std::vector<char> chosen(boxes);
  constexpr int64_t kTask = 64;
  std::vector<double> saved((boxes + kTask - 1) / kTask);
  parallel_blocks((boxes + kTask - 1) / kTask, serial, [&](int64_t block) {
    WindowFinder finder(plan, sources.boxes, plan.near);
    std::vector<WindowFinder::Range> found;
    for (int64_t i = block * kTask; i < std::min(boxes, (block + 1) * kTask); ++i) {
      const Box& box = targets.boxes[i];
      const double own = static_cast<double>(box.end - box.begin);
      const double one_by_one = own * static_cast<double>(finder.find(box.cell, found)) * pair;
      const double series = own * evaluation + translation / 3;  // along the last axis; the others are shared
      chosen[i] = one_by_one > series;
      if (chosen[i]) saved[block] += one_by_one - series;
    }
  });
  double all_saved = 0;
  for (const double part : saved) all_saved += part;
  if (all_saved < moments) return expanded;
  for (int64_t i = 0; i < boxes; ++i) {
    if (chosen[i]) expanded.push_back(i);
  }
  return expanded;
}

}  // namespace grid
}  // namespace nwfast
