// Points sorted by the cell of the grid that they lie in, and the boxes that hold those within some distance.

#pragma once

#include <atomic>

#include "../order.h"
#include "plan.h"

namespace nwfast {
namespace grid {

struct Box {
  int64_t cell;        // (a * cells_b + b) * cells_c + c
  int64_t begin, end;  // its points
};

// Of a cell along the three axes.
struct Place {
  int64_t at[kAxes];
};

inline int64_t cell_number(const Plan& plan, const int64_t* at) {
  return (at[0] * plan.axis[1].cells + at[1]) * plan.axis[2].cells + at[2];
}
inline Place place_of(const Plan& plan, int64_t cell) {
  const int64_t c = plan.axis[2].cells, b = plan.axis[1].cells;
  return {{cell / c / b, cell / c % b, cell % c}};
}

// Sorts the numbers of cells, below 2^bits, and with them the order of their points.
inline void sort_cells(Buffer<int64_t>& cell, Buffer<uint32_t>& order, int64_t n, int bits, bool serial) {
  Buffer<SortItem<uint64_t>> items(n);
  over_parts(n, serial, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) items[i] = {static_cast<uint64_t>(cell[i]), order[i]};
  });
  sort_items(items, n, bits, serial);
  over_parts(n, serial, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      cell[i] = static_cast<int64_t>(items[i].bits);
      order[i] = items[i].index;
    }
  });
}

// Some points of a batch element, sorted.
template <typename R>
struct Points {
  int64_t n = 0;
  Buffer<uint32_t> order;  // their numbers among the caller's
  Buffer<R> columns;       // (features, pitch) in the order of the caller's features
  int64_t pitch = 0;
  std::vector<Box> boxes;

  const R* axis(const Plan& plan, int a) const {
    return plan.axis[a].feature < 0 ? nullptr : columns.get() + plan.axis[a].feature * pitch;
  }

  // Boxes of meshes in three features are larger than the first cache: their points lie in the order of parts of them.
  static int part_bits(const Plan& plan, double cells) {
    return plan.mesh && plan.features == 3 && cells < 0x1p50 ? 6 : 0;
  }
  static int64_t part_of(const Plan& plan, const int64_t* at, const R* x, int64_t pitch) {
    int64_t part = 0;
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = plan.axis[a];
      const double place = (static_cast<double>(x[axis.feature * pitch]) - axis.centre(at[a])) * axis.to_local();
      part = part * 4 + std::min(3, std::max(0, static_cast<int>(2 * place + 2)));
    }
    return part;
  }

  // Those of n points, (features, n), that lie in cells; the numbers of the others. `margin`: whether cells at the rim
  // of the grid, too far from all keys for windows to reach one, count as none.
  void sort(const Plan& plan, const R* x, int64_t all, bool margin, bool serial, std::vector<int64_t>& outside) {
    Buffer<int64_t> cell(all);
    order.allocate(all);
    const int64_t parts = (all + 16383) / 16384;
    std::vector<char> any(parts);
    double cells = 1;
    for (const Axis& axis : plan.axis) cells *= static_cast<double>(axis.cells);
    const int shift = part_bits(plan, cells);
    int64_t rim[kAxes];
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = plan.axis[a];
      rim[a] = axis.single || !margin ? 0 : axis.cells_within(plan.radius_at(kLevelDistance[kLevels - 1])) + 1;
    }
    parallel_blocks(parts, serial, [&](int64_t part) {
      for (int64_t i = part * 16384; i < std::min(all, (part + 1) * 16384); ++i) {
        int64_t at[kAxes];
        bool inside = true;
        for (int a = 0; a < kAxes; ++a) {
          const Axis& axis = plan.axis[a];
          at[a] = 0;
          if (axis.feature < 0) continue;
          const double place = static_cast<double>(x[axis.feature * all + i]);
          inside &= place >= axis.from && place <= axis.to;
          if (!inside) break;
          at[a] = axis.cell_of(place);
          inside &= at[a] >= rim[a] && at[a] < axis.cells - rim[a];
        }
        cell[i] = inside ? cell_number(plan, at) : -1;
        if (inside && shift > 0) cell[i] = cell[i] << shift | part_of(plan, at, x + i, all);
        order[i] = static_cast<uint32_t>(i);
        any[part] |= !inside;
      }
    });
    n = all;
    if (std::find(any.begin(), any.end(), 1) != any.end()) {
      n = 0;
      for (int64_t i = 0; i < all; ++i) {
        if (cell[i] < 0) {
          outside.push_back(i);
        } else {
          cell[n] = cell[i];
          order[n++] = static_cast<uint32_t>(i);
        }
      }
    }
    sort_cells(cell, order, n, std::max(1, std::ilogb(cells) + 1 + shift), serial);
    pitch = padded(n);
    columns.allocate(plan.features * pitch);
    parallel_blocks((n + 16383) / 16384, serial, [&](int64_t part) {
      const int64_t end = std::min(n, (part + 1) * 16384);
      for (int f = 0; f < plan.features; ++f) {
        for (int64_t i = part * 16384; i < end; ++i) columns[f * pitch + i] = x[f * all + order[i]];
      }
    });
    boxes.clear();
    for (int64_t i = 0; i < n;) {
      int64_t end = i + 1;
      while (end < n && cell[end] >> shift == cell[i] >> shift) ++end;
      boxes.push_back({cell[i] >> shift, i, end});
      i = end;
    }
  }
};

inline int64_t first_box(const std::vector<Box>& boxes, int64_t cell) {
  return std::lower_bound(boxes.begin(), boxes.end(), cell, [](const Box& box, int64_t c) { return box.cell < c; }) -
         boxes.begin();
}

// The ranges of points that may lie within a radius of a cell: one for each row of cells along the last axis.
class WindowFinder {
 public:
  struct Range {
    int64_t begin, end;
  };

  WindowFinder(const Plan& plan, const std::vector<Box>& boxes, double radius) : plan_(plan), boxes_(boxes) {
    const Axis &a = plan.axis[0], &b = plan.axis[1], &c = plan.axis[2];
    const int64_t far_a = a.cells_within(radius), far_b = b.cells_within(radius);
    for (int64_t i = -far_a; i <= far_a; ++i) {
      for (int64_t j = -far_b; j <= far_b; ++j) {
        const double gap_a = a.gap_of(std::abs(i)), gap_b = b.gap_of(std::abs(j));
        const double left = radius * radius - gap_a * gap_a - gap_b * gap_b;
        if (!(left >= 0)) continue;
        rows_.push_back({i, j, c.cells_within(std::sqrt(left)), 0});
      }
    }
  }

  // Cells in ascending order are found fastest. Returns how many points there are.
  int64_t find(int64_t cell, std::vector<Range>& ranges) {
    const Place place = place_of(plan_, cell);
    const int64_t count = static_cast<int64_t>(boxes_.size());
    int64_t points = 0;
    ranges.clear();
    for (Row& row : rows_) {
      const int64_t a = place.at[0] + row.a, b = place.at[1] + row.b;
      if (a < 0 || a >= plan_.axis[0].cells || b < 0 || b >= plan_.axis[1].cells) continue;
      const int64_t low_c = std::max<int64_t>(0, place.at[2] - row.reach);
      const int64_t high_c = std::min(plan_.axis[2].cells - 1, place.at[2] + row.reach);
      const int64_t base = (a * plan_.axis[1].cells + b) * plan_.axis[2].cells;
      const int64_t low = move(row.hint, base + low_c);
      row.hint = low;
      if (low >= count || boxes_[low].cell > base + high_c) continue;
      const int64_t high = move(low, base + high_c + 1);
      if (!ranges.empty() && ranges.back().end == boxes_[low].begin) {
        ranges.back().end = boxes_[high - 1].end;
      } else {
        ranges.push_back({boxes_[low].begin, boxes_[high - 1].end});
      }
      points += boxes_[high - 1].end - boxes_[low].begin;
    }
    return points;
  }

 private:
  struct Row {
    int64_t a, b, reach, hint;
  };

  // The first box from `cell` on, sought from a box that is not far before it.
  int64_t move(int64_t hint, int64_t cell) const {
    const int64_t count = static_cast<int64_t>(boxes_.size());
    if (hint > 0 && (hint >= count || boxes_[hint - 1].cell >= cell)) return first_box(boxes_, cell);
    int64_t step = 1, low = hint;
    if (low >= count || boxes_[low].cell >= cell) return low;
    while (low + step < count && boxes_[low + step].cell < cell) {
      low += step;
      step *= 2;
    }
    const auto end = boxes_.begin() + std::min(count, low + step);
    return std::lower_bound(boxes_.begin() + low, end, cell, [](const Box& box, int64_t c) { return box.cell < c; }) -
           boxes_.begin();
  }

  const Plan& plan_;
  const std::vector<Box>& boxes_;
  std::vector<Row> rows_;
};

}  // namespace grid
}  // namespace nwfast
