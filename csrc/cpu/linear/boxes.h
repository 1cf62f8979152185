// Compression: the moments of crowded boxes; and expansion: their field in another box as a power series. Where boxes
// lie and how wide they are is in plan.h, windows of single points are in nearest.h.

#pragma once

#include "plan.h"

namespace nwfast {
namespace linear {

// A crowded box: its number on the axis, and its points.
struct Box {
  int64_t number, begin, end;
  int64_t slot;  // of its moments
};

// The crowded boxes among sorted points, and their moments. A box belongs to the chunk of points in which it begins;
// moments are summed by chunk and then in order.
template <typename R>
class Boxes {
 public:
  // load(begin, n, charge, pitch) writes charges of points, (columns, pitch).
  template <typename Load>
  void compress(const Plan& plan, const R* x, int64_t n, int columns, bool unit, const Load& load, bool serial) {
    x_ = x;
    n_ = n;
    columns_ = columns;
    find(plan, serial);
    if (boxes_.empty()) return;
    int64_t slots = 0;
    for (Box& box : boxes_) {
      box.slot = slots;
      slots += (box.end - 1) / kChunk - box.begin / kChunk + 1;
    }
    size_ = static_cast<int64_t>(columns) * plan.terms;
    moments_.allocate(slots * size_);
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    parallel_blocks(chunks, serial, [&](int64_t chunk) { sum_chunk(plan, chunk, unit, load); });
    parallel_blocks((static_cast<int64_t>(boxes_.size()) + 255) / 256, serial, [&](int64_t block) {
      const int64_t end = std::min<int64_t>(boxes_.size(), (block + 1) * 256);
      for (int64_t i = block * 256; i < end; ++i) {
        double* const first = moments_.get() + boxes_[i].slot * size_;
        const int64_t more = (boxes_[i].end - 1) / kChunk - boxes_[i].begin / kChunk;
        for (int64_t k = 1; k <= more; ++k) {
          for (int64_t m = 0; m < size_; ++m) first[m] += first[k * size_ + m];
        }
      }
    });
  }

  // Takes over what compress() found: boxes of one slot each, and their moments.
  void adopt(std::vector<Box> boxes, const double* moments, int64_t size) {
    boxes_ = std::move(boxes);
    size_ = size;
    adopted_ = moments;
  }

  int64_t count() const { return static_cast<int64_t>(boxes_.size()); }
  const Box& operator[](int64_t i) const { return boxes_[i]; }
  const double* moments(int64_t i) const { return (adopted_ ? adopted_ : moments_.get()) + boxes_[i].slot * size_; }
  // The first of them from this number on.
  int64_t first_from(int64_t number) const {
    return std::lower_bound(boxes_.begin(), boxes_.end(), number,
                            [](const Box& c, int64_t b) { return c.number < b; }) -
           boxes_.begin();
  }

 private:
  void find(const Plan& plan, bool serial) {
    const int64_t chunks = (n_ + kChunk - 1) / kChunk;
    std::vector<std::vector<Box>> found(chunks);
    parallel_blocks(chunks, serial, [&](int64_t chunk) {
      const int64_t end = std::min(n_, (chunk + 1) * kChunk);
      int64_t p = chunk * kChunk;
      if (p > 0) p = gallop(x_, n_, p, plan.lower_edge(plan.box_of(x_[p - 1]) + 1));
      while ((p = next_crowd(plan, p, end)) < end) {
        const int64_t box = plan.box_of(x_[p]);
        if (!plan.has_edges(box)) {
          ++p;
          continue;
        }
        const double edge = plan.lower_edge(box + 1);
        // Points before p that were passed over may have begun the box: then it is no crowded one.
        if (x_[p + kCrowd - 1] < edge && (p == 0 || x_[p - 1] < plan.lower_edge(box))) {
          const int64_t stop = gallop(x_, n_, p + kCrowd - 1, edge);
          found[chunk].push_back({box, p, stop, 0});
          p = stop;
        } else {
          for (++p; p < end && x_[p] < edge;) ++p;
        }
      }
    });
    boxes_.clear();
    size_t total = 0;
    for (const auto& part : found) total += part.size();
    boxes_.reserve(total);
    for (const auto& part : found) boxes_.insert(boxes_.end(), part.begin(), part.end());
  }

  // The first point from p on with kCrowd points (itself the first of them) within the width of a box; `end` if none
  // is.
  int64_t next_crowd(const Plan& plan, int64_t p, int64_t end) const {
    constexpr int64_t kPart = 32;  // looked through without branches
    const R width = static_cast<R>(plan.box * (1 + 1e-6));
    const int64_t last = std::min(end, n_ - kCrowd + 1);
    for (; p + kPart <= last; p += kPart) {
      int crowded = 0;
      for (int64_t i = p; i < p + kPart; ++i) crowded |= x_[i + kCrowd - 1] - x_[i] <= width;
      if (crowded) break;
    }
    while (p < last && !(x_[p + kCrowd - 1] - x_[p] <= width)) ++p;
    return p < last ? p : end;
  }

  template <typename Load>
  void sum_chunk(const Plan& plan, int64_t chunk, bool unit, const Load& load) {
    const LinearKernels<R>& table = linear_kernels<R>();
    const int64_t begin = chunk * kChunk, end = std::min(n_, begin + kChunk);
    int64_t i = std::upper_bound(boxes_.begin(), boxes_.end(), begin,
                                 [](int64_t place, const Box& box) { return place < box.end; }) -
                boxes_.begin();
    std::vector<double> charge(columns_ * kHeldPoints);
    int64_t loaded = -1;
    for (; i < count() && boxes_[i].begin < end; ++i) {
      const Box& box = boxes_[i];
      double* const moments = moments_.get() + (box.slot + chunk - box.begin / kChunk) * size_;
      std::fill(moments, moments + size_, 0.0);
      const int64_t stop = std::min(box.end, end);
      for (int64_t p = std::max(box.begin, begin); p < stop;) {
        const int64_t block = p / kHeldPoints * kHeldPoints, next = std::min(stop, block + kHeldPoints);
        if (block != loaded) {
          load(block, std::min(n_, block + kHeldPoints) - block, charge.data(), kHeldPoints);
          loaded = block;
        }
        MomentsTask<R> task;
        task.x = x_ + p;
        task.n = next - p;
        task.centre = plan.centre(box.number);
        task.scale = plan.to_local();
        task.charge = charge.data() + (p - block);
        task.pitch = kHeldPoints;
        task.columns = columns_;
        task.unit = unit;
        task.terms = plan.terms;
        task.moments = moments;
        table.moments(task);
        p = next;
      }
    }
  }

  const R* x_ = nullptr;
  int64_t n_ = 0, size_ = 0;
  int columns_ = 0;
  std::vector<Box> boxes_;
  Buffer<double> moments_;
  const double* adopted_ = nullptr;
};

// The field of all points within reach of a box, for boxes in ascending order.
template <typename R, typename Load>
class Expansion {
 public:
  Expansion(const Plan& plan, const Boxes<R>& boxes, const R* x, int64_t n, int columns, bool unit, const Load& load)
      : plan_(plan), boxes_(boxes), x_(x), n_(n), columns_(columns), unit_(unit), load_(load) {
    matrix_.resize(plan.reach + 1);
    for (auto* side : {&below_, &above_, &lower_, &higher_}) side->resize(plan.reach + 1);
    nothing_.assign(columns * plan.terms, 0.0);
    local_.resize(plan.orders * columns * plan.pitch);
    charge_.resize(columns * kCrowd);
  }

  // Finds the points within reach of the box. Boxes must not descend from call to call.
  void move_to(int64_t box) {
    target_ = box;
    if (!started_) {
      begin_ = lower_bound(x_, n_, plan_.lower_edge(box - plan_.reach));
      first_ = boxes_.first_from(box - plan_.reach);
      started_ = true;
    }
    while (first_ < boxes_.count() && boxes_[first_].number < box - plan_.reach) ++first_;
    crowded_ = 0;
    last_ = first_;
    for (; last_ < boxes_.count() && boxes_[last_].number <= box + plan_.reach; ++last_) {
      crowded_ += boxes_[last_].end - boxes_[last_].begin;
    }
    // Boxes at the ends of the reach save the search.
    const bool starts = last_ > first_ && boxes_[first_].number == box - plan_.reach;
    const bool ends = last_ > first_ && boxes_[last_ - 1].number == box + plan_.reach;
    begin_ = starts ? boxes_[first_].begin : gallop(x_, n_, begin_, plan_.lower_edge(box - plan_.reach));
    end_ =
        ends ? boxes_[last_ - 1].end : gallop(x_, n_, std::max(begin_, end_), plan_.lower_edge(box + plan_.reach + 1));
  }
  int64_t points() const { return end_ - begin_; }
  int64_t first_point() const { return begin_; }
  // Work of computing the series, in multiplications of a matrix and the moments of a column.
  int64_t translations() const {
    return last_ - first_ + 2 * std::min(points() - crowded_, 2 * plan_.reach + 1 - (last_ - first_));
  }

  // The series (orders, columns, pitch). Where charges are weights, *error grows by a bound of what it lacks: the
  // masses of boxes times the plan's error for them, or times their largest kernel where they are too far away to
  // matter.
  const double* expand(double* error) {
    gather_moments();
    int64_t reach = plan_.reach;
    if (error) {
      double least = 0, left_out = 0;  // the least total that a row of the box can have
      for (int64_t o = 0; o <= reach; ++o) least += mass(o) * plan_.least_kernel[o];
      for (; reach > 0; --reach) {
        const double more = mass(reach) * plan_.largest_kernel[reach];
        if (!(left_out + more <= kNegligibleShare * Accuracy<R>::kAccept * least)) break;
        left_out += more;
      }
      *error += left_out;
      for (int64_t o = 0; o <= reach; ++o) *error += mass(o) * plan_.error[o];
    }
    std::fill(local_.begin(), local_.end(), 0.0);
    const LinearKernels<R>& table = linear_kernels<R>();
    for (int order = 0; order < plan_.orders; ++order) {
      int64_t pairs = 0;
      for (int64_t o = 0; o <= reach; ++o) {
        if (lower_[o] == nothing_.data() && higher_[o] == nothing_.data()) continue;
        matrix_[pairs] = plan_.matrix(order, o);
        below_[pairs] = lower_[o];
        above_[pairs++] = higher_[o];
      }
      TranslateTask task;
      task.terms = plan_.terms;
      task.pitch = plan_.pitch;
      task.columns = columns_;
      task.sign = plan_.sign(order);
      task.pairs = pairs;
      task.matrix = matrix_.data();
      task.below = below_.data();
      task.above = above_.data();
      task.local = local_.data() + order * columns_ * plan_.pitch;
      table.translate(task);
    }
    return local_.data();
  }

 private:
  static constexpr double kNegligibleShare = 0.1;  // share of the accepted error for boxes that are left out

  double mass(int64_t o) const { return lower_[o][0] + higher_[o][0]; }

  // Finds the moments of all boxes within reach by their distance, and sums those of boxes that are not crowded.
  void gather_moments() {
    std::fill(lower_.begin(), lower_.end(), nothing_.data());
    std::fill(higher_.begin(), higher_.end(), nothing_.data());
    const auto put = [this](int64_t box, const double* moments) {
      (box <= target_ ? lower_ : higher_)[std::abs(target_ - box)] = moments;
    };
    int64_t p = begin_;
    for (int64_t i = first_; i <= last_; ++i) {
      const int64_t stop = i < last_ ? boxes_[i].begin : end_;
      while (p < stop) {
        const int64_t box = plan_.box_of(x_[p]);
        const int64_t next = std::min(stop, std::max(p + 1, gallop(x_, n_, p, plan_.lower_edge(box + 1))));
        put(box, raw_moments(box, p, next));
        p = next;
      }
      if (i < last_) {
        put(boxes_[i].number, boxes_.moments(i));
        p = boxes_[i].end;
      }
    }
  }

  // Moments of a box that is not crowded, kept as long as it stays within reach.
  const double* raw_moments(int64_t box, int64_t begin, int64_t end) {
    const int64_t size = static_cast<int64_t>(columns_) * plan_.terms, most = 2 * plan_.reach + 1;
    if (raw_.empty()) {
      raw_.resize(most * size);
      raw_box_.assign(most, std::numeric_limits<int64_t>::min());
    }
    const int64_t slot = (box % most + most) % most;
    double* const moments = raw_.data() + slot * size;
    if (raw_box_[slot] == box) return moments;
    raw_box_[slot] = box;
    std::fill(moments, moments + size, 0.0);
    for (int64_t p = begin; p < end; p += kCrowd) {
      const int64_t n = std::min(kCrowd, end - p);
      load_(p, n, charge_.data(), kCrowd);
      MomentsTask<R> task;
      task.x = x_ + p;
      task.n = n;
      task.centre = plan_.centre(box);
      task.scale = plan_.to_local();
      task.charge = charge_.data();
      task.pitch = kCrowd;
      task.columns = columns_;
      task.unit = unit_;
      task.terms = plan_.terms;
      task.moments = moments;
      linear_kernels<R>().moments(task);
    }
    return moments;
  }

  const Plan& plan_;
  const Boxes<R>& boxes_;
  const R* x_;
  int64_t n_;
  int columns_;
  bool unit_;
  const Load& load_;
  bool started_ = false;
  int64_t target_ = 0, begin_ = 0, end_ = 0, first_ = 0, last_ = 0, crowded_ = 0;
  std::vector<const double*> matrix_, below_, above_;  // of the pairs of boxes that have keys
  std::vector<const double*> lower_, higher_;          // moments by the distance of the box
  std::vector<double> local_, nothing_, raw_, charge_;
  std::vector<int64_t> raw_box_;
};

}  // namespace linear
}  // namespace nwfast
