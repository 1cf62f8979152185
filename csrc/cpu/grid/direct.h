// Rows of a cell and the keys around it, one by one, in the kernels of the dense method: what of keys lies in the
// window is copied into arrays of its own, with all that the kernels read of a key.

#pragma once

#include "element.h"

namespace nwfast {
namespace grid {

constexpr int64_t kItemTask = 32;  // runs of rows of one task, which find their windows from one another's
constexpr int64_t kItemRows = 64;  // of a run, at most

// Rows of one cell, by their places in a list.
struct Run {
  int64_t cell, begin, end;
};

// Some points (places of sorted ones, ascending) by cell, in runs of at most kItemRows.
template <typename R>
std::vector<Run> runs_of(const Points<R>& points, const std::vector<int64_t>& some, int64_t most = kItemRows) {
  std::vector<Run> runs;
  size_t box = 0;
  for (size_t i = 0; i < some.size(); ++i) {
    while (some[i] >= points.boxes[box].end) ++box;
    const int64_t place = static_cast<int64_t>(i), cell = points.boxes[box].cell;
    if (runs.empty() || runs.back().cell != cell || place - runs.back().begin >= most) {
      runs.push_back({cell, place, place});
    }
    runs.back().end = place + 1;
  }
  return runs;
}

// The keys of a window, packed.
template <typename R>
class KeyWindow {
 public:
  TiledData<R> data;

  void gather(const TiledData<R>& from, const std::vector<WindowFinder::Range>& ranges, int64_t n) {
    data = from;
    data.n = n;
    data.pitch = padded(n);
    key_.allocate(data.features * data.pitch);
    for (int64_t f = 0; f < data.features; ++f) copy(from.key + f * from.pitch, ranges, key_.get() + f * data.pitch);
    data.key = key_.get();
    if (from.log_weight) {
      log_weight_.allocate(data.pitch);
      copy(from.log_weight, ranges, log_weight_.get());
      data.log_weight = log_weight_.get();
    }
    if (from.value_columns) {
      columns_.allocate(data.channels * data.pitch);
      for (int64_t c = 0; c < data.channels; ++c) {
        copy(from.value_columns + c * from.pitch, ranges, columns_.get() + c * data.pitch);
      }
      data.value_columns = columns_.get();
    }
    if (from.value_rows) {
      rows_.allocate(n * data.channel_pitch);
      R* to = rows_.get();
      for (const auto& range : ranges) {
        to = std::copy(from.value_rows + range.begin * data.channel_pitch,
                       from.value_rows + range.end * data.channel_pitch, to);
      }
      data.value_rows = rows_.get();
    }
  }

 private:
  void copy(const R* from, const std::vector<WindowFinder::Range>& ranges, R* to) const {
    R* const end = to + data.pitch;
    for (const auto& range : ranges) to = std::copy(from + range.begin, from + range.end, to);
    std::fill(to, end, R(0));
  }

  Buffer<R> key_, log_weight_, columns_, rows_;
};

// Where a key is in a window, or -1.
inline int64_t place_in(const std::vector<WindowFinder::Range>& ranges, int64_t key) {
  int64_t before = 0;
  for (const auto& range : ranges) {
    if (key >= range.begin && key < range.end) return before + key - range.begin;
    before += range.end - range.begin;
  }
  return -1;
}

// The radii of direct sums of a level.
inline double radius_of(const Plan& plan, int level) {
  return level == 0 ? plan.near : plan.radius_at(kLevelDistance[level]);
}

// body(run, window, ranges, least) for all runs with any key within the radius of a level, where rows with a total (its
// log2) below `least` need the next level.
template <typename R, typename Body>
void over_windows(const Element<R>& element, const std::vector<Run>& runs, int level, bool serial, const Body& body) {
  const Plan& plan = element.plan;
  const double radius = radius_of(plan, level);
  const int64_t count = static_cast<int64_t>(runs.size());
  parallel_blocks((count + kItemTask - 1) / kItemTask, serial, [&](int64_t block) {
    WindowFinder finder(plan, element.keys.boxes, radius), wide(plan, element.keys.boxes, plan.radius);
    KeyWindow<R> window;
    std::vector<WindowFinder::Range> ranges;
    int64_t cell = -1, keys = 0;
    double least = element.least_total(radius);
    for (int64_t i = block * kItemTask; i < std::min(count, (block + 1) * kItemTask); ++i) {
      if (runs[i].cell != cell) {
        cell = runs[i].cell;
        if (level == 0) {
          double charge = 0;
          wide.find(cell, ranges);
          for (const auto& range : ranges) charge += element.weight_of(range.begin, range.end);
          least = element.least_total(radius, charge, plan.radius);
        }
        keys = finder.find(cell, ranges);
        if (keys > 0) window.gather(element.batch.data, ranges, keys);
      }
      if (keys > 0) body(runs[i], window.data, ranges, least);
    }
  });
}

}  // namespace grid
}  // namespace nwfast
