// Points in a spatial order with the bounding boxes of their tiles, and which of them may matter to a block of others.
//
// Three steps, each over what the one before left: groups of boxes, boxes, points. Scores are bounded in base 2, as the
// kernels compute them: -(squared distance) + charge.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "order.h"

namespace nwfast {

// Objects that blocks computed side by side work in, kept for those that follow.
template <typename S>
class Pool {
 public:
  class Lease {
   public:
    explicit Lease(Pool& pool) : pool_(pool) {
      const std::lock_guard<std::mutex> lock(pool_.guard_);
      if (pool_.free_.empty()) {
        object_ = std::make_unique<S>();
      } else {
        object_ = std::move(pool_.free_.back());
        pool_.free_.pop_back();
      }
    }
    ~Lease() {
      const std::lock_guard<std::mutex> lock(pool_.guard_);
      pool_.free_.push_back(std::move(object_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    S& operator*() const { return *object_; }
    S* operator->() const { return object_.get(); }

   private:
    Pool& pool_;
    std::unique_ptr<S> object_;
  };

 private:
  std::mutex guard_;
  std::vector<std::unique_ptr<S>> free_;
};

// A block of points to select by, and what was selected.
template <typename T>
struct Near {
  Buffer<T> low, high;  // (features) the block's box
  bool finite = true;   // whether it has one
  Buffer<uint32_t> groups, boxes, points;
  Buffer<T> bounds;  // of the scores of the boxes
  int64_t group_count = 0, box_count = 0, count = 0;

  // point(i, f): a coordinate of the i-th.
  template <typename Point>
  void enclose(int64_t points_of_block, int64_t features, const Point& point) {
    low.allocate(features);
    high.allocate(features);
    finite = true;
    for (int64_t f = 0; f < features; ++f) {
      T least = point(0, f), most = least;
      for (int64_t i = 0; i < points_of_block; ++i) {
        const T x = point(i, f);
        finite &= std::isfinite(x);
        least = std::min(least, x);
        most = std::max(most, x);
      }
      low[f] = least;
      high[f] = most;
    }
  }
};

template <typename T>
class BoxedPoints {
 public:
  // coordinate (features, pitch) of n points, finite; charge and reach (pitch), or null: see Selection.
  void build(const T* coordinate, int64_t pitch, int64_t n, int64_t features, const T* feature_scale, const T* charge,
             const T* reach, bool serial) {
    task_.features = features;
    task_.feature_scale = feature_scale;
    points_ = {coordinate, coordinate, charge, reach, pitch, n};
    summarise(points_, kBoxPoints, serial, box_buffers_, boxes_);
    summarise(boxes_, kGroupPoints / kBoxPoints, serial, group_buffers_, groups_);
  }
  int64_t size() const { return points_.n; }
  int64_t box_begin(int64_t box) const { return box * kBoxPoints; }
  int64_t box_end(int64_t box) const { return std::min(points_.n, (box + 1) * kBoxPoints); }

  // The boxes that may hold points of scores of at least `limit`; returns how many points they hold.
  int64_t select_boxes(double limit, double least, Near<T>& near) const {
    Selection<T> task = task_for(limit, least, near);
    near.groups.allocate(groups_.n + 1);
    near.boxes.allocate(boxes_.n + 1);
    near.bounds.allocate(boxes_.n + 1);
    near.group_count = select(groups_, 0, groups_.n, task, near.groups.get(), nullptr);
    near.box_count = 0;
    constexpr int64_t kBoxes = kGroupPoints / kBoxPoints;
    for (int64_t i = 0; i < near.group_count; ++i) {
      const int64_t begin = near.groups[i] * kBoxes, end = std::min(boxes_.n, begin + kBoxes);
      near.box_count +=
          select(boxes_, begin, end, task, near.boxes.get() + near.box_count, near.bounds.get() + near.box_count);
    }
    return near.box_count * kBoxPoints;
  }

  // Of the points in those boxes.
  void select_points(double limit, double least, Near<T>& near) const {
    Selection<T> task = task_for(limit, least, near);
    near.points.allocate(near.box_count * kBoxPoints + 1);
    near.count = 0;
    for (int64_t i = 0; i < near.box_count;) {
      const int64_t first = i;
      while (++i < near.box_count && near.boxes[i] == near.boxes[i - 1] + 1) {
      }
      near.count += select(points_, box_begin(near.boxes[first]), box_end(near.boxes[i - 1]), task,
                           near.points.get() + near.count, nullptr);
    }
  }

 private:
  struct Level {
    const T *low, *high, *charge, *reach;
    int64_t pitch, n;
  };
  struct Buffers {
    Buffer<T> low, high, charge, reach;
  };

  // Boxes of `size` of the level below each.
  void summarise(const Level& from, int64_t size, bool serial, Buffers& buffers, Level& to) const {
    const int64_t features = task_.features;
    to.n = (from.n + size - 1) / size;
    to.pitch = padded(to.n);
    buffers.low.allocate(features * to.pitch);
    buffers.high.allocate(features * to.pitch);
    if (from.charge) buffers.charge.allocate(to.n);
    if (from.reach) buffers.reach.allocate(to.n);
    parallel_blocks((to.n + 255) / 256, serial, [&](int64_t block) {
      for (int64_t box = block * 256; box < std::min(to.n, (block + 1) * 256); ++box) {
        const int64_t begin = box * size, end = std::min(from.n, begin + size);
        const auto most = [&](const T* x) { return *std::max_element(x + begin, x + end); };
        for (int64_t f = 0; f < features; ++f) {
          T low = from.low[f * from.pitch + begin], high = from.high[f * from.pitch + begin];
          for (int64_t j = begin + 1; j < end; ++j) {
            low = std::min(low, from.low[f * from.pitch + j]);
            high = std::max(high, from.high[f * from.pitch + j]);
          }
          buffers.low[f * to.pitch + box] = low;
          buffers.high[f * to.pitch + box] = high;
        }
        if (from.charge) buffers.charge[box] = most(from.charge);
        if (from.reach) buffers.reach[box] = most(from.reach);
      }
    });
    to.low = buffers.low.get();
    to.high = buffers.high.get();
    to.charge = from.charge ? buffers.charge.get() : nullptr;
    to.reach = from.reach ? buffers.reach.get() : nullptr;
  }

  Selection<T> task_for(double limit, double least, const Near<T>& near) const {
    Selection<T> task = task_;
    task.block_low = near.low.get();
    task.block_high = near.high.get();
    // Rounded to the side that selects more.
    task.limit = static_cast<T>(limit - 0x1p-4 - std::fabs(limit) * 0x1p-20);
    task.least = static_cast<T>(least);
    return task;
  }

  static int64_t select(const Level& level, int64_t begin, int64_t end, Selection<T>& task, uint32_t* places,
                        T* bounds) {
    task.low = level.low;
    task.high = level.high;
    task.charge = level.charge;
    task.reach = level.reach;
    task.pitch = level.pitch;
    task.begin = begin;
    task.end = end;
    task.places = places;
    task.bounds = bounds;
    return kernels<T>().select_near(task);
  }

  Selection<T> task_{};
  Level points_{}, boxes_{}, groups_{};
  Buffers box_buffers_, group_buffers_;
};

}  // namespace nwfast
