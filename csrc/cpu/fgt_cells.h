// Compression: the moments of crowded boxes; and expansion: their field in another box as a power series.

#pragma once

#include "fgt.h"

namespace nwfast {
namespace fgt {

struct Cell {
  int64_t box, begin, end;
  int64_t slot;  // of its moments
};

// The crowded boxes among sorted points, and their moments. A box belongs to the chunk of points in which it begins;
// moments are summed by chunk and then in order.
template <typename R>
class Cells {
 public:
  // load(begin, n, charge, pitch) writes charges of points, (columns, pitch).
  template <typename Load>
  void compress(const Plan& plan, const R* x, int64_t n, int columns, bool unit, const Load& load, bool serial) {
    x_ = x;
    n_ = n;
    columns_ = columns;
    find(plan, serial);
    if (cells_.empty()) return;
    int64_t slots = 0;
    for (Cell& cell : cells_) {
      cell.slot = slots;
      slots += (cell.end - 1) / kChunk - cell.begin / kChunk + 1;
    }
    size_ = static_cast<int64_t>(columns) * plan.terms;
    moments_.allocate(slots * size_);
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    parallel_blocks(chunks, serial, [&](int64_t chunk) { sum_chunk(plan, chunk, unit, load); });
    parallel_blocks((static_cast<int64_t>(cells_.size()) + 255) / 256, serial, [&](int64_t block) {
      const int64_t end = std::min<int64_t>(cells_.size(), (block + 1) * 256);
      for (int64_t i = block * 256; i < end; ++i) {
        double* const first = moments_.get() + cells_[i].slot * size_;
        const int64_t more = (cells_[i].end - 1) / kChunk - cells_[i].begin / kChunk;
        for (int64_t k = 1; k <= more; ++k) {
          for (int64_t m = 0; m < size_; ++m) first[m] += first[k * size_ + m];
        }
      }
    });
  }

  // Takes over what compress() found: cells of one slot each, and their moments.
  void adopt(std::vector<Cell> cells, const double* moments, int64_t size) {
    cells_ = std::move(cells);
    size_ = size;
    adopted_ = moments;
  }

  int64_t count() const { return static_cast<int64_t>(cells_.size()); }
  const Cell& operator[](int64_t i) const { return cells_[i]; }
  const double* moments(int64_t i) const { return (adopted_ ? adopted_ : moments_.get()) + cells_[i].slot * size_; }
  // The first cell whose box is `box` or higher.
  int64_t first_from(int64_t box) const {
    return std::lower_bound(cells_.begin(), cells_.end(), box, [](const Cell& c, int64_t b) { return c.box < b; }) -
           cells_.begin();
  }

 private:
  void find(const Plan& plan, bool serial) {
    const int64_t chunks = (n_ + kChunk - 1) / kChunk;
    std::vector<std::vector<Cell>> found(chunks);
    parallel_blocks(chunks, serial, [&](int64_t chunk) {
      const int64_t end = std::min(n_, (chunk + 1) * kChunk);
      int64_t p = chunk * kChunk;
      if (sparse(plan, p, end)) return;
      if (p > 0) p = gallop(x_, n_, p, plan.lower_edge(plan.box_of(x_[p - 1]) + 1));
      while (p < end) {
        const int64_t box = plan.box_of(x_[p]);
        const double edge = plan.lower_edge(box + 1);
        if (p + kCrowd <= n_ && x_[p + kCrowd - 1] < edge) {
          const int64_t stop = gallop(x_, n_, p + kCrowd - 1, edge);
          found[chunk].push_back({box, p, stop, 0});
          p = stop;
        } else {
          for (++p; p < end && x_[p] < edge;) ++p;
        }
      }
    });
    cells_.clear();
    size_t total = 0;
    for (const auto& part : found) total += part.size();
    cells_.reserve(total);
    for (const auto& part : found) cells_.insert(cells_.end(), part.begin(), part.end());
  }

  // Whether no box that begins in [begin, end) can hold kCrowd points.
  bool sparse(const Plan& plan, int64_t begin, int64_t end) const {
    const R width = static_cast<R>(plan.box * (1 + 1e-6));
    const int64_t last = std::min(end, n_ - kCrowd + 1);
    int crowded = 0;
    for (int64_t p = begin; p < last;) {
      const int64_t stop = std::min(last, p + 256);
      for (; p < stop; ++p) crowded |= x_[p + kCrowd - 1] - x_[p] <= width;
      if (crowded) return false;
    }
    return true;
  }

  template <typename Load>
  void sum_chunk(const Plan& plan, int64_t chunk, bool unit, const Load& load) {
    const FgtKernels<R>& table = fgt_kernels<R>();
    const int64_t begin = chunk * kChunk, end = std::min(n_, begin + kChunk);
    int64_t i = std::upper_bound(cells_.begin(), cells_.end(), begin,
                                 [](int64_t place, const Cell& cell) { return place < cell.end; }) -
                cells_.begin();
    std::vector<double> charge(columns_ * kBlock);
    int64_t loaded = -1;
    for (; i < count() && cells_[i].begin < end; ++i) {
      const Cell& cell = cells_[i];
      double* const moments = moments_.get() + (cell.slot + chunk - cell.begin / kChunk) * size_;
      std::fill(moments, moments + size_, 0.0);
      const int64_t stop = std::min(cell.end, end);
      for (int64_t p = std::max(cell.begin, begin); p < stop;) {
        const int64_t block = p / kBlock * kBlock, next = std::min(stop, block + kBlock);
        if (block != loaded) {
          load(block, std::min(n_, block + kBlock) - block, charge.data(), kBlock);
          loaded = block;
        }
        FgtMoments<R> task;
        task.x = x_ + p;
        task.n = next - p;
        task.centre = plan.centre(cell.box);
        task.scale = plan.to_local();
        task.charge = charge.data() + (p - block);
        task.pitch = kBlock;
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
  std::vector<Cell> cells_;
  Buffer<double> moments_;
  const double* adopted_ = nullptr;
};

// The field of all points within reach of a box, for boxes in ascending order.
template <typename R, typename Load>
class Expansion {
 public:
  Expansion(const Plan& plan, const Cells<R>& cells, const R* x, int64_t n, int columns, bool unit, const Load& load)
      : plan_(plan), cells_(cells), x_(x), n_(n), columns_(columns), unit_(unit), load_(load) {
    const int64_t most = 2 * plan.reach + 1;
    matrix_.resize(most);
    moments_.resize(most);
    box_.resize(most);
    local_.resize(plan.orders * columns * plan.pitch);
    charge_.resize(columns * kCrowd);
  }

  // Finds the points within reach of the box. Boxes must not descend from call to call.
  void move_to(int64_t box) {
    target_ = box;
    if (!started_) {
      begin_ = lower_bound(x_, n_, plan_.lower_edge(box - plan_.reach));
      first_ = cells_.first_from(box - plan_.reach);
      started_ = true;
    }
    begin_ = gallop(x_, n_, begin_, plan_.lower_edge(box - plan_.reach));
    end_ = gallop(x_, n_, std::max(begin_, end_), plan_.lower_edge(box + plan_.reach + 1));
    while (first_ < cells_.count() && cells_[first_].box < box - plan_.reach) ++first_;
    crowded_ = 0;
    last_ = first_;
    for (; last_ < cells_.count() && cells_[last_].box <= box + plan_.reach; ++last_) {
      crowded_ += cells_[last_].end - cells_[last_].begin;
    }
  }
  int64_t points() const { return end_ - begin_; }
  int64_t first_point() const { return begin_; }
  // Work of computing the series, in multiplications of a matrix and the moments of a column.
  int64_t translations() const {
    return last_ - first_ + 2 * std::min(points() - crowded_, 2 * plan_.reach + 1 - (last_ - first_));
  }

  // The series (orders, columns, pitch); adds up the masses of boxes times the plan's error for them.
  const double* expand(double* error) {
    const FgtKernels<R>& table = fgt_kernels<R>();
    int64_t sources = 0, raw = 0;
    const int64_t size = static_cast<int64_t>(columns_) * plan_.terms;
    int64_t p = begin_;
    for (int64_t i = first_; i <= last_; ++i) {
      const int64_t stop = i < last_ ? std::max(p, cells_[i].begin) : std::max(p, end_);
      for (; p < stop;) {
        const int64_t box = plan_.box_of(x_[p]);
        const int64_t next = std::min(stop, gallop(x_, n_, p, plan_.lower_edge(box + 1)));
        if (static_cast<int64_t>(raw_.size()) < (raw + 1) * size) {
          raw_.resize((2 * plan_.reach + 1) * size);
        }
        double* const moments = raw_.data() + raw++ * size;
        std::fill(moments, moments + size, 0.0);
        for (; p < next;) {
          const int64_t n = std::min(kCrowd, next - p);
          load_(p, n, charge_.data(), kCrowd);
          FgtMoments<R> task;
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
          table.moments(task);
          p += n;
        }
        box_[sources] = box;
        moments_[sources++] = moments;
      }
      if (i < last_) {
        box_[sources] = cells_[i].box;
        moments_[sources++] = cells_.moments(i);
        p = cells_[i].end;
      }
    }
    std::fill(local_.begin(), local_.end(), 0.0);
    for (int order = 0; order < plan_.orders; ++order) {
      for (int64_t i = 0; i < sources; ++i) matrix_[i] = plan_.matrix(order, target_ - box_[i]);
      FgtTranslate task;
      task.terms = plan_.terms;
      task.pitch = plan_.pitch;
      task.columns = columns_;
      task.sources = sources;
      task.matrix = matrix_.data();
      task.moments = moments_.data();
      task.local = local_.data() + order * columns_ * plan_.pitch;
      table.translate(task);
    }
    if (error) {
      for (int64_t i = 0; i < sources; ++i) *error += moments_[i][0] * plan_.error[std::abs(target_ - box_[i])];
    }
    return local_.data();
  }

 private:
  const Plan& plan_;
  const Cells<R>& cells_;
  const R* x_;
  int64_t n_;
  int columns_;
  bool unit_;
  const Load& load_;
  bool started_ = false;
  int64_t target_ = 0, begin_ = 0, end_ = 0, first_ = 0, last_ = 0, crowded_ = 0;
  std::vector<const double*> matrix_, moments_;
  std::vector<int64_t> box_;
  std::vector<double> local_, raw_, charge_;
};

}  // namespace fgt
}  // namespace nwfast
