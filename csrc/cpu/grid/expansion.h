// Sums over the points of boxes for all points of other boxes, by moments and series.
//
// One plane of cells across the first axis after the other: its boxes' moments, brought along the last axis and then
// along the middle one to all places of the plane from which a target can be reached; what a target needs then is a sum
// over the planes around it, made where its series is evaluated. Planes are kept as long as targets need them, and
// handled in groups that fit into the memory that is set aside. Beside each tensor goes a number: the charges that it
// is made of, each times exp(-gap^2 / 4), which bounds the error. Where the
// meshes of boxes are one, nothing of this is needed (mesh/sums.h).

#pragma once

#include <functional>
#include <map>
#include <memory>

#include "points.h"

namespace nwfast {
namespace grid {

constexpr double kPlaneBytes = 150e6, kMomentBytes = 64e6;  // of tensors that are held at once
constexpr int64_t kBoxGroup = 32, kRowsTogether = 24;       // boxes of a task, and rows of their tensors, at once
constexpr size_t kSeriesTogether = 4;
constexpr int64_t kSeriesPoints = 256;  // whose sums are handed on together

// Of the task of a kernel: the box and its points from `begin` on.
template <typename Task>
void set_box(Task& task, const Plan& plan, int64_t cell) {
  const Place place = place_of(plan, cell);
  for (int axis = 0; axis < kAxes; ++axis) {
    task.centre[axis] = plan.axis[axis].centre(place.at[axis]);
    task.scale[axis] = plan.axis[axis].to_local();
    task.terms[axis] = plan.axis[axis].terms;
  }
}
template <typename Task, typename R>
void set_points(Task& task, const Plan& plan, const Points<R>& points, int64_t begin) {
  for (int axis = 0; axis < kAxes; ++axis) {
    const R* const x = points.axis(plan, axis);
    task.x[axis] = x ? x + begin : nullptr;
  }
}

// What to expand.
template <typename R>
struct Expansion {
  const Plan& plan;
  const Points<R>&sources, &targets;
  std::vector<int64_t> expanded;  // boxes of targets, ascending
  int columns, order;
  // charges (columns, pitch) of the sources [begin, begin + n); those of the bound of the error.
  std::function<void(int64_t begin, int64_t n, double* charge, int64_t pitch)> load;
  // Sums (slots, columns, pitch) of the targets [begin, begin + n); the sum of sources' sizes times Axis::decay, at
  // most.
  std::function<void(int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound)> finish;

  // What comes from a plane of sources, at each place that targets are around.
  struct Translated {
    std::vector<int64_t> place;  // b * cells_c + c, ascending
    Buffer<double> tensors;      // (places, columns, c, b, a)
    std::vector<double> mass;
  };

  // Memory that was written to once is kept: the first touch costs as much as all that is done with it.
  Buffer<double> moments, along;
  std::vector<std::unique_ptr<Translated>> spare;
  // (all boxes of targets) where they are not null: series and bounds are put here, and not evaluated.
  double *kept_series = nullptr, *kept_bound = nullptr;
  // With order 1: sums have the second derivatives of the first column behind them, see GridEvaluate.
  bool pairs = false;

  void run(bool serial);
  int slots() const { return order == 0 ? 1 : order == 1 ? 4 : 7; }
  // The sources [begin, end) of a box, as moments or among its nodes, (columns, a, b, c). Returns the sum of their
  // sizes.
  double sum_points(const Box& box, int64_t begin, int64_t end, double* to) const;
  // The points [first, last) of a box of targets, by its series.
  void evaluate_box(const Box& box, int64_t first, int64_t last, const double* series, double bound) const;

 private:
  struct Plane {
    int64_t a;            // along the first axis
    int64_t first, last;  // boxes of sources, or of targets in `expanded`
  };
  struct Row {
    int64_t b;
    int64_t first, last;         // boxes of sources
    std::vector<int64_t> place;  // c, ascending
    int64_t offset;              // of its tensors
  };

  void run_series(bool serial);
  void evaluate_squares(GridEvaluate<R> rows) const;
  int64_t tensor() const { return columns * plan.size(); }
  std::vector<Plane> planes_of(const std::vector<Box>& boxes, const std::vector<int64_t>* some) const;
  void find_places(const Plane& plane, const std::vector<Plane>& target_planes, std::vector<int64_t>& place) const;
  std::vector<Row> rows_of(const Plane& plane, const std::vector<int64_t>& place) const;
  void translate(const std::vector<const Plane*>& planes, const std::vector<Translated*>& results, bool serial);
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
    bound += mass * axis_.decay[std::abs(apart)];
  }
  // Valid as long as this is.
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
  double bound = 0;  // sizes of charges, each times its Axis::decay

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

template <typename R>
void Expansion<R>::run_series(bool serial) {
  const std::vector<Plane> source_planes = planes_of(sources.boxes, nullptr);
  const std::vector<Plane> target_planes = planes_of(targets.boxes, &expanded);
  const int64_t reach = plan.axis[0].reach;
  const double bytes = static_cast<double>(tensor()) * sizeof(double);
  std::map<int64_t, std::unique_ptr<Translated>> translated;  // by the place along the first axis
  size_t next_source = 0;
  for (size_t first = 0; first < target_planes.size();) {
    // Sources that this target needs, and those of more targets as long as there is room.
    while (!translated.empty() && translated.begin()->first < target_planes[first].a - reach) {
      spare.push_back(std::move(translated.begin()->second));
      translated.erase(translated.begin());
    }
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
          if (spare.empty()) spare.push_back(std::make_unique<Translated>());
          found.push_back(std::move(spare.back()));
          spare.pop_back();
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
