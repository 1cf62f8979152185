// Sums over the points of boxes for all points of other boxes, by moments and series.
//
// One plane of cells across the first axis after the other: its boxes' moments, brought along the last axis and then
// along the middle one to all places of the plane from which a target can be reached; what a target needs then is a sum
// over the planes around it, made where its series is evaluated. Planes are kept as long as targets need them, and
// handled in groups that fit into the memory that is set aside. Beside each tensor goes a number: the charges that it
// is made of, each times exp(-gap^2 / 4), which bounds the error.

#pragma once

#include <functional>
#include <map>
#include <memory>

#include "points.h"

namespace nwfast {
namespace grid {

constexpr double kPlaneBytes = 600e6, kMomentBytes = 200e6;  // of tensors that are held at once
constexpr int64_t kSeriesPoints = 256;                       // whose sums are handed on together

// What to expand.
template <typename R>
struct Expansion {
  const Plan& plan;
  const Points<R>&sources, &targets;
  std::vector<int64_t> expanded;  // boxes of targets, ascending
  int columns, order;
  // charges (columns, pitch) of the sources [begin, begin + n); those of the bound of the error.
  std::function<void(int64_t begin, int64_t n, double* charge, int64_t pitch)> load;
  // Sums (slots, columns, pitch) of the targets [begin, begin + n); the sum of sources' sizes times exp(-z^2 / 4), at
  // most.
  std::function<void(int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound)> finish;

  void run(bool serial);

 private:
  struct Plane {
    int64_t a;            // along the first axis
    int64_t first, last;  // boxes of sources, or of targets in `expanded`
  };
  // What comes from a plane of sources, at each place that targets are around.
  struct Translated {
    std::vector<int64_t> place;  // b * cells_c + c, ascending
    Buffer<double> tensors;      // (places, columns, c, b, a)
    std::vector<double> mass;
  };
  struct Row {
    int64_t b;
    int64_t first, last;         // boxes of sources
    std::vector<int64_t> place;  // c, ascending
    int64_t offset;              // of its tensors
  };

  int64_t tensor() const { return columns * plan.size(); }
  std::vector<Plane> planes_of(const std::vector<Box>& boxes, const std::vector<int64_t>* some) const;
  void find_places(const Plane& plane, const std::vector<Plane>& target_planes, std::vector<int64_t>& place) const;
  std::vector<Row> rows_of(const Plane& plane, const std::vector<int64_t>& place) const;
  void translate(const std::vector<const Plane*>& planes, const std::vector<Translated*>& results, bool serial) const;
  void evaluate(const std::vector<Plane>& target_planes, size_t first, size_t last,
                const std::map<int64_t, std::unique_ptr<Translated>>& translated, bool serial) const;
};

// The boxes along one axis that a box takes its sums from.
class Sources {
 public:
  explicit Sources(const Axis& axis) : axis_(axis) {
    std::fill(lower_, lower_ + kMostPairs, nullptr);
    std::fill(higher_, higher_ + kMostPairs, nullptr);
  }
  // Of a box `apart` cells lower.
  void add(int64_t apart, const double* tensor, double mass) {
    (apart >= 0 ? lower_ : higher_)[std::abs(apart)] = tensor;
    last_ = std::max(last_, std::abs(apart));
    bound += mass * std::exp(-axis_.gap[std::abs(apart)] / 4);
  }
  void give(GridProduct& product) {
    product.terms = axis_.terms;
    product.centre = lower_[0];
    product.centre_matrix = axis_.matrix(0);
    product.pairs = 0;
    for (int64_t apart = 1; apart <= last_; ++apart) {
      if (!lower_[apart] && !higher_[apart]) continue;
      lower_[product.pairs] = lower_[apart];
      higher_[product.pairs] = higher_[apart];
      matrix_[product.pairs++] = axis_.matrix(apart);
    }
    product.lower = lower_;
    product.higher = higher_;
    product.matrix = matrix_;
    product.offset = 0;
  }
  double bound = 0;  // sizes of charges times exp(-gap^2 / 4)

 private:
  const Axis& axis_;
  int64_t last_ = 0;
  const double *lower_[kMostPairs], *higher_[kMostPairs], *matrix_[kMostPairs];
};

// Numbers within `reach` of any of an ascending list.
inline bool has_between(const std::vector<int64_t>& numbers, int64_t low, int64_t high) {
  const auto found = std::lower_bound(numbers.begin(), numbers.end(), low);
  return found != numbers.end() && *found <= high;
}

template <typename R>
std::vector<typename Expansion<R>::Plane> Expansion<R>::planes_of(const std::vector<Box>& boxes,
                                                                  const std::vector<int64_t>* some) const {
  const int64_t across = plan.axis[1].cells * plan.axis[2].cells;
  const int64_t count = static_cast<int64_t>(some ? some->size() : boxes.size());
  std::vector<Plane> planes;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t a = boxes[some ? (*some)[i] : i].cell / across;
    if (planes.empty() || planes.back().a != a) planes.push_back({a, i, i});
    planes.back().last = i + 1;
  }
  return planes;
}

// The places of a plane of sources, within reach of some, at which targets of planes within reach lie.
template <typename R>
void Expansion<R>::find_places(const Plane& plane, const std::vector<Plane>& target_planes,
                               std::vector<int64_t>& place) const {
  const Axis &a = plan.axis[0], &b = plan.axis[1], &c = plan.axis[2];
  const int64_t across = b.cells * c.cells, base = plane.a * across;
  place.clear();
  auto target = std::lower_bound(target_planes.begin(), target_planes.end(), plane.a - a.reach,
                                 [](const Plane& p, int64_t at) { return p.a < at; });
  for (; target != target_planes.end() && target->a <= plane.a + a.reach; ++target) {
    for (int64_t i = target->first; i < target->last; ++i) {
      place.push_back(targets.boxes[expanded[i]].cell - target->a * across);
    }
  }
  std::sort(place.begin(), place.end());
  place.erase(std::unique(place.begin(), place.end()), place.end());
  const auto begin = sources.boxes.begin() + plane.first, end = sources.boxes.begin() + plane.last;
  const auto before = [](const Box& box, int64_t cell) { return box.cell < cell; };
  const auto alone = [&](int64_t at) {
    const int64_t row = at / c.cells, column = at % c.cells;
    for (int64_t other = std::max<int64_t>(0, row - b.reach); other <= row + b.reach; ++other) {
      const auto found =
          std::lower_bound(begin, end, base + other * c.cells + std::max<int64_t>(0, column - c.reach), before);
      if (found != end && found->cell <= base + other * c.cells + std::min(c.cells - 1, column + c.reach)) return false;
    }
    return true;
  };
  place.erase(std::remove_if(place.begin(), place.end(), alone), place.end());
}

template <typename R>
std::vector<typename Expansion<R>::Row> Expansion<R>::rows_of(const Plane& plane,
                                                              const std::vector<int64_t>& place) const {
  const Axis &b = plan.axis[1], &c = plan.axis[2];
  const int64_t base = plane.a * b.cells * c.cells;
  std::vector<Row> rows;
  int64_t offset = 0;
  for (int64_t i = plane.first; i < plane.last;) {
    Row row;
    row.b = (sources.boxes[i].cell - base) / c.cells;
    row.first = i;
    std::vector<int64_t> own;
    for (; i < plane.last && (sources.boxes[i].cell - base) / c.cells == row.b; ++i) {
      own.push_back((sources.boxes[i].cell - base) % c.cells);
    }
    row.last = i;
    for (int64_t other = std::max<int64_t>(0, row.b - b.reach); other <= row.b + b.reach; ++other) {
      auto at = std::lower_bound(place.begin(), place.end(), other * c.cells);
      for (; at != place.end() && *at < (other + 1) * c.cells; ++at) row.place.push_back(*at % c.cells);
    }
    std::sort(row.place.begin(), row.place.end());
    row.place.erase(std::unique(row.place.begin(), row.place.end()), row.place.end());
    row.place.erase(std::remove_if(row.place.begin(), row.place.end(),
                                   [&](int64_t at) { return !has_between(own, at - c.reach, at + c.reach); }),
                    row.place.end());
    row.offset = offset;
    offset += static_cast<int64_t>(row.place.size());
    rows.push_back(std::move(row));
  }
  return rows;
}

// Moments of the boxes of some planes, and their translation within each plane.
template <typename R>
void Expansion<R>::translate(const std::vector<const Plane*>& planes, const std::vector<Translated*>& results,
                             bool serial) const {
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
  Buffer<double> moments(slots * size);
  std::vector<double> mass(slots);
  parallel_blocks(static_cast<int64_t>(parts.size()), serial, [&](int64_t i) {
    const Part& part = parts[i];
    const Place place = place_of(plan, sources.boxes[part.box].cell);
    double* const to = moments.get() + part.slot * size;
    std::fill(to, to + size, 0.0);
    constexpr int64_t kBlock = 512;
    Buffer<double> charge(columns * kBlock);
    GridMoments<R> task;
    for (int axis = 0; axis < kAxes; ++axis) {
      task.centre[axis] = plan.axis[axis].centre(place.at[axis]);
      task.scale[axis] = plan.axis[axis].to_local();
      task.terms[axis] = plan.axis[axis].terms;
    }
    task.charge = charge.get();
    task.pitch = kBlock;
    task.columns = columns;
    task.moments = to;
    double size_sum = 0;
    for (int64_t begin = part.begin; begin < part.end; begin += kBlock) {
      task.n = std::min(kBlock, part.end - begin);
      load(begin, task.n, charge.get(), kBlock);
      for (int axis = 0; axis < kAxes; ++axis) {
        const R* const x = sources.axis(plan, axis);
        task.x[axis] = x ? x + begin : nullptr;
      }
      table.moments(task);
      for (int64_t k = 0; k < task.n; ++k) size_sum += std::fabs(charge[k]);
    }
    mass[part.slot] = size_sum;
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
  struct Task {
    int64_t plane, row, at, slot;
  };
  std::vector<Task> tasks;
  for (int64_t p = 0; p < count; ++p) {
    row_offset[p] = static_cast<int64_t>(tasks.size());
    for (size_t r = 0; r < rows[p].size(); ++r) {
      for (size_t at = 0; at < rows[p][r].place.size(); ++at) {
        tasks.push_back({p, static_cast<int64_t>(r), static_cast<int64_t>(at), static_cast<int64_t>(tasks.size())});
      }
    }
  }
  // Without a middle axis this is all, and its results are those of the plane.
  Buffer<double> along(flat ? 0 : static_cast<int64_t>(tasks.size()) * size + kMatrixPadding);
  std::vector<double> along_mass(tasks.size());
  for (int64_t p = 0; p < count; ++p) {
    results[p]->tensors.allocate(static_cast<int64_t>(results[p]->place.size()) * size + kMatrixPadding);
    results[p]->mass.assign(results[p]->place.size(), 0);
  }
  parallel_blocks(static_cast<int64_t>(tasks.size()), serial, [&](int64_t i) {
    const Task& task = tasks[i];
    const Row& row = rows[task.plane][task.row];
    const Plane& plane = *planes[task.plane];
    const int64_t target = row.place[task.at], base = plane.a * b.cells * c.cells + row.b * c.cells;
    Sources from(c);
    GridProduct product;
    product.to = flat ? results[task.plane]->tensors.get() + task.at * size : along.get() + task.slot * size;
    product.rows = static_cast<int64_t>(columns) * a.terms * b.terms;
    product.row_stride = c.terms;
    product.depth_stride = 1;
    int64_t box = first_box(sources.boxes, base + std::max<int64_t>(0, target - c.reach));
    for (; box < row.last && sources.boxes[box].cell <= base + target + c.reach; ++box) {
      const int64_t apart = target - (sources.boxes[box].cell - base);
      const int64_t slot = first_slot[task.plane] + box - plane.first;
      from.add(apart, moments.get() + slot * size, mass[slot]);
    }
    from.give(product);
    table.product(product);
    (flat ? results[task.plane]->mass[task.at] : along_mass[i]) = from.bound;
  });
  if (flat) return;
  // Along the middle axis: (column, a, c, b).
  std::vector<std::pair<int64_t, int64_t>> places;
  for (int64_t p = 0; p < count; ++p) {
    for (size_t at = 0; at < results[p]->place.size(); ++at) places.push_back({p, static_cast<int64_t>(at)});
  }
  parallel_blocks(static_cast<int64_t>(places.size()), serial, [&](int64_t i) {
    const int64_t p = places[i].first, at = places[i].second;
    const int64_t target_b = results[p]->place[at] / c.cells, target_c = results[p]->place[at] % c.cells;
    Sources from(b);
    GridProduct product;
    product.rows = c.terms;
    product.row_stride = 1;
    product.depth_stride = c.terms;
    auto row = std::lower_bound(rows[p].begin(), rows[p].end(), target_b - b.reach,
                                [](const Row& r, int64_t number) { return r.b < number; });
    for (; row != rows[p].end() && row->b <= target_b + b.reach; ++row) {
      const auto found = std::lower_bound(row->place.begin(), row->place.end(), target_c);
      if (found == row->place.end() || *found != target_c) continue;
      const int64_t slot = row_offset[p] + row->offset + (found - row->place.begin());
      from.add(target_b - row->b, along.get() + slot * size, along_mass[slot]);
    }
    from.give(product);
    const int64_t block = static_cast<int64_t>(b.terms) * c.terms;
    for (int64_t k = 0; k < static_cast<int64_t>(columns) * a.terms; ++k) {
      product.offset = k * block;
      product.to = results[p]->tensors.get() + at * size + k * block;
      table.product(product);
    }
    results[p]->mass[at] = from.bound;
  });
}

// The targets of some planes.
template <typename R>
void Expansion<R>::evaluate(const std::vector<Plane>& target_planes, size_t first, size_t last,
                            const std::map<int64_t, std::unique_ptr<Translated>>& translated, bool serial) const {
  const GridKernels<R>& table = grid_kernels<R>();
  const Axis& a = plan.axis[0];
  const int64_t size = tensor(), across = plan.axis[1].cells * plan.axis[2].cells;
  struct Task {
    int64_t box, begin, end;
  };
  std::vector<Task> tasks;
  for (size_t p = first; p < last; ++p) {
    for (int64_t i = target_planes[p].first; i < target_planes[p].last; ++i) {
      const Box& box = targets.boxes[expanded[i]];
      for (int64_t begin = box.begin; begin < box.end; begin += kPointTask) {
        tasks.push_back({expanded[i], begin, std::min(box.end, begin + kPointTask)});
      }
    }
  }
  parallel_blocks(static_cast<int64_t>(tasks.size()), serial, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t cell = targets.boxes[task.box].cell, at = cell % across;
    const Place place = place_of(plan, cell);
    Sources from(a);
    GridProduct product;
    product.rows = static_cast<int64_t>(plan.axis[1].terms) * plan.axis[2].terms;
    product.row_stride = 1;
    product.depth_stride = product.rows;
    for (auto plane = translated.lower_bound(place.at[0] - a.reach);
         plane != translated.end() && plane->first <= place.at[0] + a.reach; ++plane) {
      const std::vector<int64_t>& places = plane->second->place;
      const auto found = std::lower_bound(places.begin(), places.end(), at);
      if (found == places.end() || *found != at) continue;
      const int64_t slot = found - places.begin();
      from.add(place.at[0] - plane->first, plane->second->tensors.get() + slot * size, plane->second->mass[slot]);
    }
    from.give(product);
    Buffer<double> series(size + kMatrixPadding);
    for (int column = 0; column < columns; ++column) {
      product.offset = column * plan.size();
      product.to = series.get() + column * plan.size();
      table.product(product);
    }
    GridEvaluate<R> rows;
    for (int axis = 0; axis < kAxes; ++axis) {
      rows.centre[axis] = plan.axis[axis].centre(place.at[axis]);
      rows.scale[axis] = plan.axis[axis].to_local();
      rows.terms[axis] = plan.axis[axis].terms;
    }
    rows.order = order;
    rows.series = series.get();
    rows.columns = columns;
    rows.sums_pitch = kSeriesPoints;
    const int slots = order == 0 ? 1 : order == 1 ? 4 : 7;
    Buffer<double> sums(slots * columns * kSeriesPoints);
    rows.sums = sums.get();
    for (int64_t begin = task.begin; begin < task.end; begin += kSeriesPoints) {
      rows.n = std::min(kSeriesPoints, task.end - begin);
      for (int axis = 0; axis < kAxes; ++axis) {
        const R* const x = targets.axis(plan, axis);
        rows.x[axis] = x ? x + begin : nullptr;
      }
      table.evaluate(rows);
      finish(begin, rows.n, sums.get(), kSeriesPoints, from.bound);
    }
  });
}

template <typename R>
void Expansion<R>::run(bool serial) {
  const std::vector<Plane> source_planes = planes_of(sources.boxes, nullptr);
  const std::vector<Plane> target_planes = planes_of(targets.boxes, &expanded);
  const int64_t reach = plan.axis[0].reach;
  const double bytes = static_cast<double>(tensor()) * sizeof(double);
  std::map<int64_t, std::unique_ptr<Translated>> translated;  // by the place along the first axis
  size_t next_source = 0;
  for (size_t first = 0; first < target_planes.size();) {
    // Sources that this target needs, and those of more targets as long as there is room.
    translated.erase(translated.begin(), translated.lower_bound(target_planes[first].a - reach));
    while (next_source < source_planes.size() && source_planes[next_source].a < target_planes[first].a - reach) {
      ++next_source;
    }
    double held = 0;
    for (const auto& plane : translated) held += static_cast<double>(plane.second->place.size()) * bytes;
    std::vector<const Plane*> planes;
    std::vector<Translated*> results;
    size_t last = first;
    double moments = 0;
    for (; last < target_planes.size() && (last == first || held < kPlaneBytes); ++last) {
      while (next_source < source_planes.size() && source_planes[next_source].a <= target_planes[last].a + reach) {
        const size_t from = next_source;
        const size_t end = std::min(source_planes.size(), from + 16);
        std::vector<std::unique_ptr<Translated>> found;
        for (size_t p = from; p < end && source_planes[p].a <= target_planes[last].a + reach; ++p) {
          found.push_back(std::make_unique<Translated>());
        }
        parallel_blocks(static_cast<int64_t>(found.size()), serial,
                        [&](int64_t p) { find_places(source_planes[from + p], target_planes, found[p]->place); });
        next_source += found.size();
        for (size_t p = 0; p < found.size(); ++p) {
          const Plane& plane = source_planes[from + p];
          if (found[p]->place.empty()) continue;
          held += static_cast<double>(found[p]->place.size()) * bytes;
          moments += static_cast<double>(plane.last - plane.first) * bytes * 2;
          planes.push_back(&plane);
          results.push_back(found[p].get());
          translated.emplace(plane.a, std::move(found[p]));
          if (moments < kMomentBytes) continue;
          translate(planes, results, serial);
          planes.clear();
          results.clear();
          moments = 0;
        }
      }
    }
    if (!planes.empty()) translate(planes, results, serial);
    evaluate(target_planes, first, last, translated, serial);
    first = last;
  }
}

}  // namespace grid
}  // namespace nwfast
