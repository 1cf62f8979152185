// The work of an expansion (expansion.h): moments of boxes, their translation along the axes, and series at points.

#pragma once

#include "mesh/sums.h"

namespace nwfast {
namespace grid {

template <typename R>
double Expansion<R>::sum_points(const Box& box, int64_t begin, int64_t end, double* to) const {
  constexpr int64_t kBlock = 512;
  std::fill_n(to, tensor(), 0.0);
  Buffer<double> charge(columns * kBlock);
  GridMoments<R> task;
  set_box(task, plan, box.cell);
  task.window = plan.window();
  task.charge = charge.get();
  task.pitch = kBlock;
  task.columns = columns;
  task.moments = to;
  double mass = 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    task.n = std::min(kBlock, end - first);
    load(first, task.n, charge.get(), kBlock);
    set_points(task, plan, sources, first);
    plan.mesh ? grid_kernels<R>().spread(task) : grid_kernels<R>().moments(task);
    for (int64_t k = 0; k < task.n; ++k) mass += std::fabs(charge[k]);
  }
  return mass;
}

// Moments of the boxes of some planes, and their translation within each plane.
template <typename R>
void Expansion<R>::translate(const std::vector<const Plane*>& planes, const std::vector<Translated*>& results,
                             bool serial) {
  const GridKernels<R>& table = grid_kernels<R>();
  const Axis &a = plan.axis[0], &b = plan.axis[1], &c = plan.axis[2];
  const int64_t size = tensor(), count = static_cast<int64_t>(planes.size());
  const bool flat = b.terms == 1;
  // Moments: a box of many points in parts, which are added in order.
  struct Part {
    int64_t box, begin, end, slot;
  };
  std::vector<Part> parts;
  std::vector<int64_t> first_slot(count), extra;
  int64_t slots = 0;
  for (int64_t p = 0; p < count; ++p) {
    first_slot[p] = slots;
    for (int64_t i = planes[p]->first; i < planes[p]->last; ++i) slots++;
  }
  const int64_t boxes = slots;
  int64_t slot = 0;
  std::vector<std::pair<int64_t, int64_t>> sums;  // slots of parts, added to those of boxes
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = planes[p]->first; i < planes[p]->last; ++i, ++slot) {
      const Box& box = sources.boxes[i];
      for (int64_t begin = box.begin; begin < box.end; begin += kPointTask) {
        const bool more = begin > box.begin;
        parts.push_back({i, begin, std::min(box.end, begin + kPointTask), more ? slots : slot});
        if (more) sums.push_back({slot, slots++});
      }
    }
  }
  moments.allocate(slots * size);
  std::vector<double> mass(slots);
  parallel_blocks(static_cast<int64_t>(parts.size()), serial, [&](int64_t i) {
    const Part& part = parts[i];
    double* const to = moments.get() + part.slot * size;
    mass[part.slot] = sum_points(sources.boxes[part.box], part.begin, part.end, to);
    if (plan.mesh) {
      const int terms[kAxes] = {a.terms, b.terms, c.terms};
      for (int column = 0; column < columns; ++column) table.fold(to + column * plan.size(), terms);
    }
  });
  parallel_blocks(boxes, serial || sums.empty(), [&](int64_t i) {
    const auto range = std::equal_range(sums.begin(), sums.end(), std::make_pair(i, int64_t{0}),
                                        [](const auto& x, const auto& y) { return x.first < y.first; });
    for (auto at = range.first; at != range.second; ++at) {
      for (int64_t k = 0; k < size; ++k) moments[i * size + k] += moments[at->second * size + k];
      mass[i] += mass[at->second];
    }
  });
  // Along the last axis: (column, a, b, c).
  std::vector<std::vector<Row>> rows(count);
  std::vector<int64_t> row_offset(count + 1);
  parallel_blocks(count, serial, [&](int64_t p) { rows[p] = rows_of(*planes[p], results[p]->place); });
  // Boxes of a row take their sums from much the same boxes, part by part of the tensors.
  struct Task {
    int64_t plane, row, begin, end, slot;  // places of the row
  };
  std::vector<Task> tasks;
  int64_t along_count = 0;
  for (int64_t p = 0; p < count; ++p) {
    row_offset[p] = along_count;
    for (size_t r = 0; r < rows[p].size(); ++r) {
      const int64_t n = static_cast<int64_t>(rows[p][r].place.size());
      for (int64_t begin = 0; begin < n; begin += kBoxGroup) {
        tasks.push_back({p, static_cast<int64_t>(r), begin, std::min(n, begin + kBoxGroup), along_count + begin});
      }
      along_count += n;
    }
  }
  // Without a middle axis this is all, and its results are those of the plane.
  along.allocate(flat ? 0 : along_count * size + kMatrixPadding);
  std::vector<double> along_mass(along_count);
  for (int64_t p = 0; p < count; ++p) {
    results[p]->tensors.allocate(static_cast<int64_t>(results[p]->place.size()) * size + kMatrixPadding);
    results[p]->mass.assign(results[p]->place.size(), 0);
  }
  parallel_blocks(static_cast<int64_t>(tasks.size()), serial, [&](int64_t i) {
    const Task& task = tasks[i];
    const Row& row = rows[task.plane][task.row];
    const Plane& plane = *planes[task.plane];
    const int64_t base = plane.a * b.cells * c.cells + row.b * c.cells;
    std::vector<Sources> from(task.end - task.begin, Sources(c));
    std::vector<GridProduct> products(from.size());
    for (int64_t k = 0; k < task.end - task.begin; ++k) {
      const int64_t target = row.place[task.begin + k];
      int64_t box = first_box(sources.boxes, base + std::max<int64_t>(0, target - c.reach));
      for (; box < row.last && sources.boxes[box].cell <= base + target + c.reach; ++box) {
        const int64_t slot = first_slot[task.plane] + box - plane.first;
        from[k].add(target - (sources.boxes[box].cell - base), moments.get() + slot * size, mass[slot]);
      }
      from[k].give(products[k]);
      products[k].row_stride = c.terms;
      products[k].depth_stride = 1;
      (flat ? results[task.plane]->mass[task.begin + k] : along_mass[task.slot + k]) = from[k].bound;
    }
    double* const to = flat ? results[task.plane]->tensors.get() + task.begin * size : along.get() + task.slot * size;
    const int64_t all_rows = static_cast<int64_t>(columns) * a.terms * b.terms;
    for (int64_t first = 0; first < all_rows; first += kRowsTogether) {
      for (size_t k = 0; k < products.size(); ++k) {
        GridProduct& product = products[k];
        product.rows = std::min(kRowsTogether, all_rows - first);
        product.offset = first * c.terms;
        product.to = to + static_cast<int64_t>(k) * size + first * c.terms;
        table.product(product);
      }
    }
  });
  if (flat) return;
  // Along the middle axis: (column, a, c, b).
  struct Column {
    int64_t plane, c, first, last;  // in `order`
  };
  std::vector<Column> groups;
  std::vector<std::vector<int64_t>> by_column(count);  // places of each plane by c, then b
  for (int64_t p = 0; p < count; ++p) {
    const std::vector<int64_t>& place = results[p]->place;
    std::vector<int64_t>& places = by_column[p];
    for (size_t at = 0; at < place.size(); ++at) places.push_back(static_cast<int64_t>(at));
    std::stable_sort(places.begin(), places.end(),
                     [&](int64_t x, int64_t y) { return place[x] % c.cells < place[y] % c.cells; });
    for (int64_t k = 0; k < static_cast<int64_t>(places.size()); ++k) {
      const int64_t at_c = place[places[k]] % c.cells;
      if (k == 0 || groups.back().c != at_c || k - groups.back().first >= kBoxGroup) groups.push_back({p, at_c, k, k});
      groups.back().last = k + 1;
    }
  }
  parallel_blocks(static_cast<int64_t>(groups.size()), serial, [&](int64_t i) {
    const Column& group = groups[i];
    const int64_t p = group.plane, n = group.last - group.first;
    std::vector<Sources> from(n, Sources(b));
    std::vector<GridProduct> products(n);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = by_column[p][group.first + k], target = results[p]->place[at] / c.cells;
      auto row = std::lower_bound(rows[p].begin(), rows[p].end(), target - b.reach,
                                  [](const Row& r, int64_t number) { return r.b < number; });
      for (; row != rows[p].end() && row->b <= target + b.reach; ++row) {
        const auto found = std::lower_bound(row->place.begin(), row->place.end(), group.c);
        if (found == row->place.end() || *found != group.c) continue;
        const int64_t slot = row_offset[p] + row->offset + (found - row->place.begin());
        from[k].add(target - row->b, along.get() + slot * size, along_mass[slot]);
      }
      from[k].give(products[k]);
      products[k].rows = c.terms;
      products[k].row_stride = 1;
      products[k].depth_stride = c.terms;
      results[p]->mass[at] = from[k].bound;
    }
    const int64_t block = static_cast<int64_t>(b.terms) * c.terms;
    for (int64_t part = 0; part < static_cast<int64_t>(columns) * a.terms; ++part) {
      for (int64_t k = 0; k < n; ++k) {
        products[k].offset = part * block;
        products[k].to = results[p]->tensors.get() + by_column[p][group.first + k] * size + part * block;
        table.product(products[k]);
      }
    }
  });
}

// The targets of some planes.
template <typename R>
void Expansion<R>::evaluate(const std::vector<Plane>& target_planes, size_t first, size_t last,
                            const std::map<int64_t, std::unique_ptr<Translated>>& translated, bool serial) const {
  const GridKernels<R>& table = grid_kernels<R>();
  const Axis& a = plan.axis[0];
  const int64_t size = tensor(), across = plan.axis[1].cells * plan.axis[2].cells;
  // Boxes side by side along the first axis, few of a kind, so that series stay in the cache; one of many points in
  // parts.
  struct Task {
    std::vector<int64_t> boxes;
    int64_t begin, end;  // of its points, where there is one
  };
  std::vector<int64_t> boxes(expanded.begin() + target_planes[first].first,
                             expanded.begin() + target_planes[last - 1].last);
  std::stable_sort(boxes.begin(), boxes.end(), [&](int64_t x, int64_t y) {
    return targets.boxes[x].cell % across < targets.boxes[y].cell % across;
  });
  std::vector<Task> tasks;
  for (const int64_t i : boxes) {
    const Box& box = targets.boxes[i];
    if (!kept_series && box.end - box.begin > kPointTask) {
      for (int64_t begin = box.begin; begin < box.end; begin += kPointTask) {
        tasks.push_back({{i}, begin, std::min(box.end, begin + kPointTask)});
      }
      continue;
    }
    const bool more = !tasks.empty() && tasks.back().end < 0 && tasks.back().boxes.size() < kSeriesTogether &&
                      targets.boxes[tasks.back().boxes[0]].cell % across == box.cell % across;
    if (!more) tasks.push_back({{}, -1, -1});
    tasks.back().boxes.push_back(i);
  }
  parallel_blocks(static_cast<int64_t>(tasks.size()), serial, [&](int64_t i) {
    const Task& task = tasks[i];
    const size_t n = task.boxes.size();
    std::vector<Sources> from(n, Sources(a));
    std::vector<GridProduct> products(n);
    for (size_t k = 0; k < n; ++k) {
      const int64_t cell = targets.boxes[task.boxes[k]].cell, at = cell % across, place = cell / across;
      for (auto plane = translated.lower_bound(place - a.reach);
           plane != translated.end() && plane->first <= place + a.reach; ++plane) {
        const std::vector<int64_t>& places = plane->second->place;
        const auto found = std::lower_bound(places.begin(), places.end(), at);
        if (found == places.end() || *found != at) continue;
        const int64_t slot = found - places.begin();
        from[k].add(place - plane->first, plane->second->tensors.get() + slot * size, plane->second->mass[slot]);
      }
      from[k].give(products[k]);
      products[k].row_stride = 1;
      products[k].depth_stride = static_cast<int64_t>(plan.axis[1].terms) * plan.axis[2].terms;
    }
    Buffer<double> series(static_cast<int64_t>(n) * size + kMatrixPadding);
    const int64_t all_rows = static_cast<int64_t>(plan.axis[1].terms) * plan.axis[2].terms;
    for (int column = 0; column < columns; ++column) {
      for (int64_t row = 0; row < all_rows; row += kRowsTogether) {
        for (size_t k = 0; k < n; ++k) {
          products[k].rows = std::min(kRowsTogether, all_rows - row);
          products[k].offset = column * plan.size() + row;
          products[k].to = series.get() + static_cast<int64_t>(k) * size + column * plan.size() + row * a.terms;
          table.product(products[k]);
        }
      }
    }
    if (plan.mesh) {
      const int terms[kAxes] = {plan.axis[2].terms, plan.axis[1].terms, a.terms};
      for (int64_t k = 0; k < static_cast<int64_t>(n) * columns; ++k) table.fold(series.get() + k * plan.size(), terms);
    }
    for (size_t k = 0; k < n; ++k) {
      if (kept_series) {
        std::copy_n(series.get() + static_cast<int64_t>(k) * size, size, kept_series + task.boxes[k] * size);
        kept_bound[task.boxes[k]] = from[k].bound;
        continue;
      }
      const Box& box = targets.boxes[task.boxes[k]];
      evaluate_box(box, task.end < 0 ? box.begin : task.begin, task.end < 0 ? box.end : task.end,
                   series.get() + static_cast<int64_t>(k) * size, from[k].bound);
    }
  });
}

template <typename R>
void Expansion<R>::evaluate_box(const Box& box, int64_t first, int64_t last, const double* series, double bound) const {
  const GridKernels<R>& table = grid_kernels<R>();
  GridEvaluate<R> rows;
  set_box(rows, plan, box.cell);
  // Series are (columns, c, b, a), the nodes of one mesh (columns, a, b, c).
  const auto reverse = [&](auto* of_axes) {
    if (plan.one_mesh) std::swap(of_axes[0], of_axes[2]);
  };
  reverse(rows.centre);
  reverse(rows.scale);
  reverse(rows.terms);
  rows.window = plan.window();
  rows.order = plan.mesh ? std::min(order, 1) : order;
  rows.pairs = pairs;
  rows.series = series;
  rows.columns = columns;
  rows.sums_pitch = kSeriesPoints;
  const int64_t slot = columns * kSeriesPoints;
  Buffer<double> sums(slots() * slot + (pairs ? kPairSlots * kSeriesPoints : 0));
  rows.sums = sums.get();
  for (int64_t begin = first; begin < last; begin += kSeriesPoints) {
    rows.n = std::min(kSeriesPoints, last - begin);
    set_points(rows, plan, targets, begin);
    reverse(rows.x);
    plan.mesh ? table.interpolate(rows) : table.evaluate(rows);
    if (plan.one_mesh && order > 0) {
      std::swap_ranges(sums.get() + slot, sums.get() + 2 * slot, sums.get() + 3 * slot);
    }
    if (plan.one_mesh && order == 2) evaluate_squares(rows);
    if (plan.one_mesh && pairs) {
      // aa and cc, ab and bc.
      double* const first = sums.get() + slots() * slot;
      std::swap_ranges(first, first + kSeriesPoints, first + 2 * kSeriesPoints);
      std::swap_ranges(first + 3 * kSeriesPoints, first + 4 * kSeriesPoints, first + 5 * kSeriesPoints);
    }
    finish(begin, rows.n, sums.get(), kSeriesPoints, bound);
  }
}

// Second derivatives by the meshes that come after that of values: see MeshSums.
template <typename R>
void Expansion<R>::evaluate_squares(GridEvaluate<R> rows) const {
  double* const values = rows.sums;
  rows.order = 0;
  for (int axis = 0; axis < kAxes; ++axis) {
    double* const second = rows.sums = values + (4 + axis) * columns * kSeriesPoints;
    rows.series += tensor();
    grid_kernels<R>().interpolate(rows);
    const double half = plan.axis[axis].half;
    for (int64_t i = 0; i < columns * kSeriesPoints; ++i) second[i] = (second[i] - values[i]) * (half * half);
  }
}

template <typename R>
void Expansion<R>::run(bool serial) {
  plan.one_mesh ? MeshSums<R>(*this).run(serial) : run_series(serial);
}

}  // namespace grid
}  // namespace nwfast
