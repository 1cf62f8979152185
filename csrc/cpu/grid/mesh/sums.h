// The sums of a mesh (mesh.h) at targets in three features: one mesh for all boxes, slab by slab across the first axis.
//
// Spread: the charges of a box go to the nodes around them, in an array of its own (rows of a mesh lie far apart),
// which is added to the mesh. Boxes whose nodes overlap have different colours, and one colour follows another, so that
// threads neither meet nor change the order of any sum. Convolution, one feature after another: each plane along the
// last axis and the middle one, then across planes, of which those are held that the next slab of targets needs.
// Interpolation: from a copy of a box's nodes. Segments of rows that no source reaches, or no target needs, are left
// out.
//
// Second derivatives by a feature are not those of the interpolant but sums of z^2 times the kernel, from a mesh that
// is convolved with that along this feature: d^2 K / dz^2 = z^2 K - K.

#pragma once

#include "../expansion.h"
#include "planes.h"

namespace nwfast {
namespace grid {

constexpr int64_t kSumPlanes = 64;  // of a task that convolves across planes
constexpr int64_t kParts = 256;     // of all sources, and as many more as there are boxes, at most
constexpr int64_t kRowsAhead = 8;   // of a mesh, that are fetched while others are added or copied

template <typename R>
class MeshSums {
 public:
  explicit MeshSums(const Expansion<R>& task) : task_(task), plan_(task.plan), kinds_(mesh_kinds(task.order)) {
    for (int x = 0; x < kAxes; ++x) {
      const Axis& axis = plan_.axis[x];
      terms_[x] = axis.terms;
      spacings_[x] = axis.spacings;
      reach_[x] = axis.node_reach;
      overlap_[x] = (terms_[x] + spacings_[x] - 1) / spacings_[x];
    }
    find_cells();
  }

  void run(bool serial) {
    segments_ = segments_of(nodes_[2]);
    mass_.assign(cells_[0] * cells_[1] * cells_[2], 0);
    const int64_t layers = cells_[0];
    const double plane = static_cast<double>(task_.columns) * nodes_[1] * padded(nodes_[2]) * sizeof(double);
    int64_t slab = layers;  // at a time
    while (slab > 1 && mesh_planes(kinds_, slab, spacings_[0], reach_[0]) * plane > kMeshBytes) slab = (slab + 1) / 2;
    const int64_t own = slab * spacings_[0] + halo(), columns = task_.columns;
    raw_.allocate(own, columns, nodes_[1], nodes_[2] + 2 * reach_[2] + 8);
    across_.allocate(std::min(nodes_[0], 2 * (own + reach_[0])), columns * kinds_.across, nodes_[1], nodes_[2] + 8);
    sums_.allocate(own, columns * kinds_.sums, nodes_[1], nodes_[2] + 8);
    find_needed();
    int64_t spread = 0, summed = 0;  // layers; planes
    for (int64_t first = 0; first < layers; first += slab) {
      const int64_t last = std::min(layers, first + slab);
      const auto [begin, end] = targets_between(first, last);
      if (begin == end) continue;
      const int64_t until = std::min(nodes_[0], last * spacings_[0] + halo() + reach_[0]);
      for (; spread < layers && spread * spacings_[0] < until; spread = std::min(layers, spread + slab)) {
        add_layers(spread, std::min(layers, spread + slab), serial);
      }
      const int64_t from = std::max(summed, first * spacings_[0]);
      summed = last * spacings_[0] + halo();
      sum_planes(from, summed, spread == layers ? nodes_[0] : spread * spacings_[0], serial);
      interpolate(begin, end, serial);
    }
  }

 private:
  // Meshes by the axis along which a charge at a distance z counts z^2 times as much, if any: after the convolution of
  // the last two axes, and after that of all, made of which of those.
  struct Across {
    bool by_b, by_c;
  };
  struct Sum {
    int across;
    bool by_a;
  };
  static constexpr Across kAcross[] = {{false, false}, {true, false}, {false, true}};
  static constexpr Sum kSums[] = {{0, false}, {0, true}, {1, false}, {2, false}};

  int64_t halo() const { return terms_[0] - spacings_[0]; }
  int64_t size() const { return static_cast<int64_t>(terms_[0]) * terms_[1] * terms_[2]; }
  // Of a box, by the cells that there are.
  Place place(const Box& box) const {
    Place place = place_of(plan_, box.cell);
    for (int x = 0; x < kAxes; ++x) place.at[x] -= low_[x];
    return place;
  }
  int64_t cell_of(const Place& at) const { return (at.at[0] * cells_[1] + at.at[1]) * cells_[2] + at.at[2]; }

  // The cells of sources and targets, and their nodes.
  void find_cells() {
    int64_t high[kAxes];
    std::fill(low_, low_ + kAxes, std::numeric_limits<int64_t>::max());
    std::fill(high, high + kAxes, std::numeric_limits<int64_t>::min());
    const auto include = [&](const Box& box) {
      const Place at = place_of(plan_, box.cell);
      for (int x = 0; x < kAxes; ++x) {
        low_[x] = std::min(low_[x], at.at[x]);
        high[x] = std::max(high[x], at.at[x]);
      }
    };
    for (const Box& box : task_.sources.boxes) include(box);
    for (const int64_t i : task_.expanded) include(task_.targets.boxes[i]);
    for (int x = 0; x < kAxes; ++x) {
      cells_[x] = high[x] - low_[x] + 1;
      nodes_[x] = cells_[x] * spacings_[x] + terms_[x] - spacings_[x];
    }
  }

  // The charges around a cell, each times Axis::decay.
  double bound_at(const Place& at) const {
    int64_t low[kAxes], high[kAxes];
    for (int x = 0; x < kAxes; ++x) {
      low[x] = std::max<int64_t>(0, at.at[x] - plan_.axis[x].reach);
      high[x] = std::min(cells_[x] - 1, at.at[x] + plan_.axis[x].reach);
    }
    double sum = 0;
    for (int64_t a = low[0]; a <= high[0]; ++a) {
      for (int64_t b = low[1]; b <= high[1]; ++b) {
        const double decay = decay_at(0, a - at.at[0]) * decay_at(1, b - at.at[1]);
        for (int64_t c = low[2]; c <= high[2]; ++c) {
          sum += mass_[cell_of({{a, b, c}})] * decay * decay_at(2, c - at.at[2]);
        }
      }
    }
    return sum;
  }
  double decay_at(int x, int64_t apart) const { return plan_.axis[x].decay[std::abs(apart)]; }

  // Calls body for the segments of all rows of a box in one plane: (b, segment).
  template <typename Body>
  void over_segments(const Place& at, const Body& body) const {
    const int64_t first = at.at[2] * spacings_[2] / kSegment,
                  last = (at.at[2] * spacings_[2] + terms_[2] - 1) / kSegment;
    for (int64_t b = at.at[1] * spacings_[1]; b < at.at[1] * spacings_[1] + terms_[1]; ++b) {
      for (int64_t segment = first; segment <= last; ++segment) body(b, segment);
    }
  }

  // What targets of each layer are interpolated from.
  void find_needed() {
    needed_.assign(cells_[0] * nodes_[1] * segments_, 0);
    for (const int64_t i : task_.expanded) {
      const Place at = place(task_.targets.boxes[i]);
      char* const needed = needed_.data() + at.at[0] * nodes_[1] * segments_;
      over_segments(at, [&](int64_t b, int64_t segment) { needed[b * segments_ + segment] = 1; });
    }
  }
  // (b, segments) those that sums within `reach` planes of one take part in.
  std::vector<char> needed_near(int64_t plane, int64_t reach) const {
    const int64_t all = nodes_[1] * segments_;
    std::vector<char> needed(all, 0);
    const int64_t low = plane - reach - terms_[0] + 1, high = std::min(cells_[0] - 1, (plane + reach) / spacings_[0]);
    for (int64_t layer = std::max<int64_t>(0, low) / spacings_[0]; layer <= high; ++layer) {
      if (layer * spacings_[0] < low) continue;
      for (int64_t i = 0; i < all; ++i) needed[i] |= needed_[layer * all + i];
    }
    return needed;
  }

  std::pair<int64_t, int64_t> targets_between(int64_t first, int64_t last) const {
    const int64_t across = plan_.axis[1].cells * plan_.axis[2].cells;
    const auto from = [&](int64_t layer) {
      return std::lower_bound(task_.expanded.begin(), task_.expanded.end(), (low_[0] + layer) * across,
                              [&](int64_t i, int64_t cell) { return task_.targets.boxes[i].cell < cell; }) -
             task_.expanded.begin();
    };
    return {from(first), from(last)};
  }

  // Spreads the sources of some layers, and convolves the planes that are complete with them.
  void add_layers(int64_t first, int64_t last, bool serial) {
    const int64_t begin = first * spacings_[0], end = last == cells_[0] ? nodes_[0] : last * spacings_[0];
    const int64_t filled = first == 0 ? 0 : begin + halo(), all = last * spacings_[0] + halo();
    parallel_blocks(all - filled, serial, [&](int64_t i) {
      for (int64_t b = 0; b < nodes_[1]; ++b) {
        char* const is_filled = raw_.filled(filled + i, b);
        if (std::find(is_filled, is_filled + segments_, 1) == is_filled + segments_) continue;
        for (int64_t column = 0; column < task_.columns; ++column) {
          std::fill_n(raw_.row(filled + i, column, b), raw_.pitch, 0.0);
        }
        std::fill_n(is_filled, raw_.segments, 0);
      }
    });
    spread(first, last, serial);
    // What any source reaches and any target needs, the same for all columns and kinds.
    parallel_blocks(end - begin, serial, [&](int64_t i) {
      const int64_t plane = begin + i;
      const std::vector<char> needed = needed_near(plane, reach_[0]);
      for (int64_t segment = 0; segment < segments_; ++segment) {
        int64_t from = -1;  // the last row with a source
        for (int64_t b = 0, ahead = 0; b < nodes_[1]; ++b) {
          for (; ahead < nodes_[1] && ahead <= b + reach_[1]; ++ahead) {
            if (reached(plane, ahead, segment)) from = ahead;
          }
          across_.filled(plane, b)[segment] = needed[b * segments_ + segment] && from >= 0 && from >= b - reach_[1];
        }
      }
    });
    parallel_blocks((end - begin) * task_.columns, serial,
                    [&](int64_t i) { convolve_plane(begin + i / task_.columns, i % task_.columns); });
  }

  void spread(int64_t first, int64_t last, bool serial) {
    const std::vector<Box>& boxes = task_.sources.boxes;
    const int64_t across = plan_.axis[1].cells * plan_.axis[2].cells;
    const int64_t begin = first_box(boxes, (low_[0] + first) * across);
    const int64_t end = first_box(boxes, (low_[0] + last) * across), all = task_.columns * size();
    // Boxes of many points in parts, which are added in order.
    struct Part {
      int64_t box, begin, end;
      double mass;
    };
    const int64_t most = std::max(kPointTask, task_.sources.n / kParts);
    std::vector<Part> parts;
    std::vector<int64_t> first_part(end - begin + 1);
    std::vector<std::vector<int64_t>> colours(overlap_[0] * overlap_[1] * overlap_[2]);
    for (int64_t i = begin; i < end; ++i) {
      first_part[i - begin] = static_cast<int64_t>(parts.size());
      const Box& box = boxes[i];
      for (int64_t part = box.begin; part < box.end && box.end - box.begin > most; part += most) {
        parts.push_back({i, part, std::min(box.end, part + most), 0});
      }
      const Place at = place(box);
      const int64_t colour = (at.at[0] % overlap_[0] * overlap_[1] + at.at[1] % overlap_[1]) * overlap_[2];
      colours[colour + at.at[2] % overlap_[2]].push_back(i);
      for (int64_t a = 0; a < terms_[0]; ++a) {
        const int64_t plane = at.at[0] * spacings_[0] + a;
        over_segments(at, [&](int64_t b, int64_t segment) { raw_.filled(plane, b)[segment] = 1; });
      }
    }
    first_part[end - begin] = static_cast<int64_t>(parts.size());
    Buffer<double> part_sums(static_cast<int64_t>(parts.size()) * all);
    parallel_blocks(static_cast<int64_t>(parts.size()), serial, [&](int64_t i) {
      Part& part = parts[i];
      part.mass = task_.sum_points(boxes[part.box], part.begin, part.end, part_sums.get() + i * all);
    });
    for (const std::vector<int64_t>& colour : colours) {
      parallel_blocks(static_cast<int64_t>(colour.size()), serial, [&](int64_t i) {
        const Box& box = boxes[colour[i]];
        const Place at = place(box);
        double& mass = mass_[cell_of(at)];
        const int64_t from = first_part[colour[i] - begin], to = first_part[colour[i] - begin + 1];
        for (int64_t part = from; part < to; ++part) {
          add_box(at, part_sums.get() + part * all);
          mass += parts[part].mass;
        }
        if (from < to) return;
        Buffer<double> nodes(all);
        mass = task_.sum_points(box, box.begin, box.end, nodes.get());
        add_box(at, nodes.get());
      });
    }
  }

  void add_box(const Place& at, const double* nodes) {
    for (int64_t column = 0; column < task_.columns; ++column) {
      for (int64_t a = 0; a < terms_[0]; ++a) {
        for (int64_t b = 0; b < terms_[1]; ++b, nodes += terms_[2]) {
          double* const to = raw_.row(at.at[0] * spacings_[0] + a, column, at.at[1] * spacings_[1] + b) + reach_[2] +
                             at.at[2] * spacings_[2];
          for (int64_t c = 0; c < terms_[2]; c += 8) __builtin_prefetch(to + kRowsAhead * raw_.pitch + c, 1);
          for (int64_t c = 0; c < terms_[2]; ++c) to[c] += nodes[c];
        }
      }
    }
  }

  // Whether sums along the last axis are not all zero.
  bool reached(int64_t plane, int64_t b, int64_t segment) {
    const char* const filled = raw_.filled(plane, b);
    return filled[segment] || (segment > 0 && filled[segment - 1]) || (segment + 1 < segments_ && filled[segment + 1]);
  }
  int64_t nodes_in(int64_t segment) const { return std::min(kSegment, nodes_[2] - segment * kSegment); }

  // Along the last axis, and along the middle one.
  void convolve_plane(int64_t plane, int64_t column) {
    const GridKernels<R>& table = grid_kernels<R>();
    std::vector<char> any(segments_, 0);
    for (int64_t b = 0; b < nodes_[1]; ++b) {
      for (int64_t segment = 0; segment < segments_; ++segment) any[segment] |= across_.filled(plane, b)[segment];
    }
    if (std::find(any.begin(), any.end(), 1) == any.end()) return;
    const int64_t pitch = across_.pitch;
    Buffer<double> along(nodes_[1] * pitch);
    std::vector<const double*> from(nodes_[1] + 2 * reach_[1]);
    std::vector<double*> to(nodes_[1]);
    for (const bool by_c : {false, true}) {
      if (by_c && kinds_.across == 1) break;
      for (int64_t b = 0; b < nodes_[1]; ++b) convolve_row(plane, column, b, by_c, along.get() + b * pitch);
      for (int kind = 0; kind < kinds_.across; ++kind) {
        if (kAcross[kind].by_c != by_c) continue;
        for (int64_t segment = 0; segment < segments_; ++segment) {
          if (!any[segment]) continue;
          const int64_t place = segment * kSegment;
          for (int64_t b = 0; b < nodes_[1]; ++b) {
            from[reach_[1] + b] = reached(plane, b, segment) ? along.get() + b * pitch + place : nullptr;
            to[b] = across_.filled(plane, b)[segment] ? across_.row(plane, kind * task_.columns + column, b) + place
                                                      : nullptr;
          }
          table.convolve_rows(
              {from.data(), to.data(), nodes_[1], nodes_in(segment), taps(1, kAcross[kind].by_b), reach_[1]});
        }
      }
    }
  }

  // The segments of a row that are reached, side by side at once.
  void convolve_row(int64_t plane, int64_t column, int64_t b, bool by_c, double* to) {
    for (int64_t segment = 0; segment < segments_;) {
      int64_t end = segment;
      while (end < segments_ && reached(plane, b, end)) ++end;
      const int64_t place = segment * kSegment;
      if (end > segment) {
        grid_kernels<R>().convolve({raw_.row(plane, column, b) + place, to + place,
                                    std::min(nodes_[2], end * kSegment) - place, taps(2, by_c), reach_[2]});
      }
      segment = end + 1;
    }
  }

  // Sums of the planes [begin, end), where those below `complete` are.
  void sum_planes(int64_t begin, int64_t end, int64_t complete, bool serial) {
    std::vector<std::vector<char>> needed(end - begin);
    for (int64_t i = 0; i < end - begin; ++i) needed[i] = needed_near(begin + i, 0);
    const int64_t parts = (end - begin + kSumPlanes - 1) / kSumPlanes;
    const int64_t kinds = kinds_.sums, reach = reach_[0];
    parallel_blocks(parts * kinds * task_.columns * nodes_[1], serial, [&](int64_t i) {
      const int64_t b = i % nodes_[1], column = i / nodes_[1] % task_.columns;
      const int64_t kind = i / nodes_[1] / task_.columns % kinds, part = i / nodes_[1] / task_.columns / kinds;
      const int64_t first = begin + part * kSumPlanes, last = std::min(end, first + kSumPlanes);
      std::vector<const double*> from(last - first + 2 * reach);
      std::vector<double*> to(last - first);
      for (int64_t segment = 0; segment < segments_; ++segment) {
        const int64_t place = segment * kSegment;
        bool any = false;
        for (int64_t plane = first; plane < last; ++plane) {
          const bool needs = needed[plane - begin][b * segments_ + segment] != 0;
          to[plane - first] = needs ? sums_.row(plane, kind * task_.columns + column, b) + place : nullptr;
          any |= needs;
        }
        if (!any) continue;
        std::fill(from.begin(), from.end(), nullptr);
        for (int64_t plane = std::max<int64_t>(0, first - reach); plane < std::min(complete, last + reach); ++plane) {
          if (!across_.filled(plane, b)[segment]) continue;
          from[plane - first + reach] = across_.row(plane, kSums[kind].across * task_.columns + column, b) + place;
        }
        grid_kernels<R>().convolve_rows({from.data(), to.data(), last - first, nodes_in(segment),
                                         taps(0, kSums[kind].by_a), static_cast<int>(reach)});
      }
    });
  }

  const double* taps(int x, bool squares) const { return plan_.axis[x].taps(squares); }

  void interpolate(int64_t begin, int64_t end, bool serial) {
    struct Part {
      int64_t target, begin, end;
    };
    std::vector<Part> parts;
    for (int64_t i = begin; i < end; ++i) {
      const Box& box = task_.targets.boxes[task_.expanded[i]];
      const int64_t step = task_.kept_series ? box.end - box.begin : kPointTask;
      for (int64_t first = box.begin; first < box.end; first += step) {
        parts.push_back({task_.expanded[i], first, std::min(box.end, first + step)});
      }
    }
    parallel_blocks(static_cast<int64_t>(parts.size()), serial, [&](int64_t i) {
      const Part& part = parts[i];
      const Box& box = task_.targets.boxes[part.target];
      const Place at = place(box);
      const double bound = bound_at(at);
      const int64_t all = task_.columns * size();
      if (task_.kept_series) {
        task_.kept_bound[part.target] = bound;
        copy_box(at, 1, task_.kept_series + part.target * all);
        return;
      }
      Buffer<double> nodes(kinds_.sums * all);
      copy_box(at, kinds_.sums, nodes.get());
      task_.evaluate_box(box, part.begin, part.end, nodes.get(), bound);
    });
  }

  // The nodes of a box, (kinds, columns, a, b, c).
  void copy_box(const Place& at, int64_t kinds, double* to) const {
    for (int64_t column = 0; column < kinds * task_.columns; ++column) {
      for (int64_t a = 0; a < terms_[0]; ++a) {
        for (int64_t b = 0; b < terms_[1]; ++b, to += terms_[2]) {
          const double* const row =
              sums_.row(at.at[0] * spacings_[0] + a, column, at.at[1] * spacings_[1] + b) + at.at[2] * spacings_[2];
          for (int64_t c = 0; c < terms_[2]; c += 8) __builtin_prefetch(row + kRowsAhead * sums_.pitch + c, 0);
          std::copy_n(row, terms_[2], to);
        }
      }
    }
  }

  const Expansion<R>& task_;
  const Plan& plan_;
  const MeshKinds kinds_;
  int terms_[kAxes], spacings_[kAxes], reach_[kAxes];  // of a box in nodes, and how far nodes reach
  int64_t overlap_[kAxes];                             // cells so far apart have no node in common
  int64_t low_[kAxes], cells_[kAxes], nodes_[kAxes], segments_ = 0;
  Planes raw_, across_, sums_;  // of charges; along the last two axes, of kinds and columns; along all
  std::vector<char> needed_;    // (layers, b, segments)
  std::vector<double> mass_;    // (cells) the sizes of charges
};

}  // namespace grid
}  // namespace nwfast
