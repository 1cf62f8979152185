// Planes of nodes of a mesh, as many as are held, and which parts of their rows are not zero.

#pragma once

#include <vector>

#include "../../problem.h"

namespace nwfast {
namespace grid {

constexpr int64_t kSegment = 48;  // nodes of a row: a multiple of what kernels take at once; no node reaches further

constexpr int64_t segments_of(int64_t nodes) { return (nodes + kSegment - 1) / kSegment; }

// The planes that are held of a mesh, by their number modulo how many there are: (planes, columns, rows, nodes of a
// row).
class Planes {
 public:
  int64_t pitch = 0, segments = 0;

  void allocate(int64_t planes, int64_t columns, int64_t rows, int64_t nodes) {
    // An odd number of cache lines apart, many rows or planes at one place fall into different sets of a cache.
    constexpr int64_t kLine = 8;
    const int64_t lines = (nodes + kLine - 1) / kLine | 1;
    planes_ = planes;
    rows_ = rows;
    pitch = lines * kLine;
    column_pitch_ = rows * pitch;
    plane_pitch_ = (columns * rows * lines | 1) * kLine;
    data_.allocate(planes * plane_pitch_);
    segments = segments_of(nodes);
    filled_.assign(planes * rows * segments, 1);
  }
  double* row(int64_t plane, int64_t column, int64_t row) const {
    return data_.get() + plane % planes_ * plane_pitch_ + column * column_pitch_ + row * pitch;
  }
  // (segments) whether a part of a row is not zero throughout, the same for all columns. All are at first.
  char* filled(int64_t plane, int64_t row) { return filled_.data() + (plane % planes_ * rows_ + row) * segments; }

 private:
  int64_t planes_ = 0, rows_ = 0, plane_pitch_ = 0, column_pitch_ = 0;
  Buffer<double> data_;
  std::vector<char> filled_;
};

}  // namespace grid
}  // namespace nwfast
