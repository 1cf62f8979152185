// Rows with more keys in their windows than they could visit one by one. Keys on each side of the gap that a row lies
// in are summed apart, relative to the key at the gap's edge.

#pragma once

#include "direct.h"

namespace nwfast {
namespace linear {

template <typename R>
class GapRows {
 public:
  explicit GapRows(const RowTask<R>& rows) : rows_(rows) {}

  void run(const std::vector<int64_t>& rows, bool serial) const {
    const int64_t count = static_cast<int64_t>(rows.size()), size = rows_.slots * rows_.columns;
    std::vector<Nearest> found(count);
    parallel_blocks((count + kChunk - 1) / kChunk, serial, [&](int64_t block) {
      const int64_t end = std::min(count, (block + 1) * kChunk);
      int64_t hint =
          lower_bound(rows_.data.key, rows_.data.keys, static_cast<double>(rows_.data.query[rows[block * kChunk]]));
      for (int64_t k = block * kChunk; k < end; ++k) {
        found[k] = nearest(rows_.data, rows_.plan, rows[k], hint);
        hint = found[k].place;
      }
    });
    Buffer<double> sums(2 * size * count);
    const auto distance = [&](int64_t k, int side) -> double {  // from the edge, in user units; < 0 if there is none
      const int64_t edge = side ? found[k].place : found[k].place - 1;
      if (edge < 0 || edge >= rows_.data.keys) return -1;
      return std::fabs(static_cast<double>(rows_.data.query[rows[k]]) - static_cast<double>(rows_.data.key[edge]));
    };
    // Runs of rows with the same edge and level.
    std::vector<FarGroup> groups;
    for (int side = 0; side < 2; ++side) {
      for (int64_t k = 0; k < count; ++k) {
        const double apart = distance(k, side), other = distance(k, 1 - side);
        const int64_t edge = side ? found[k].place : found[k].place - 1;
        if (apart < 0) continue;
        if (other >= 0 && apart > other) {  // may be negligible
          const double x = rows_.data.query[rows[k]], further = rows_.data.key[edge],
                       nearer = rows_.data.key[side ? edge - 1 : edge + 1];
          const double excess = score_of(x, nearer, further) * rows_.plan.scale * rows_.plan.scale / 2;
          if (excess > rows_.plan.log_span + rows_.data.weight_span + (rows_.data.exclude ? 8 : 0)) continue;
        }
        const int level = level_of(apart * rows_.plan.scale);
        if (groups.empty() || groups.back().side != side || groups.back().edge != edge ||
            groups.back().level != level || groups.back().end != k || groups.back().end - groups.back().begin >= 4096) {
          groups.push_back({edge, side, level, k, k, INFINITY});
        }
        groups.back().end = k + 1;
        groups.back().nearest = std::fmin(groups.back().nearest, apart);
      }
    }
    std::fill(sums.get(), sums.get() + 2 * size * count, 0.0);
    parallel_blocks(static_cast<int64_t>(groups.size()), serial,
                    [&](int64_t g) { sum_far(rows, groups[g], count, sums.get()); });
    parallel_blocks((count + kChunk - 1) / kChunk, serial, [&](int64_t block) {
      const int64_t end = std::min(count, (block + 1) * kChunk);
      std::vector<double> row(size);
      std::vector<int64_t> none;
      DirectRows<R> direct(rows_, none);
      for (int64_t k = block * kChunk; k < end; ++k) {
        if (!combine(rows[k], found[k], sums.get() + k, count, row.data())) direct.sum_all(rows[k], found[k], row);
        const double apart = found[k].level_zero ? 0 : rows_.data.query[rows[k]] - found[k].key;
        rows_.finish(rows[k], 1, row.data(), 1, &apart);
      }
    });
  }

 private:
  struct FarGroup {
    int64_t edge;  // place of the key at the gap's edge
    int side;      // 0: keys below the rows, 1: above
    int level;
    int64_t begin, end;  // of the far rows
    double nearest;      // least distance of a row from the edge
  };

  // Brings the sums of both sides to the row's own reference and takes out the excluded key. False if that would cost
  // digits.
  bool combine(int64_t i, const Nearest& found, const double* sums, int64_t count, double* row) const {
    const int64_t size = rows_.slots * rows_.columns;
    std::fill(row, row + size, 0.0);
    const double x = rows_.data.query[i], reference = found.level_zero ? x : found.key;
    for (int side = 0; side < 2; ++side) {
      const double* const from = sums + side * size * count;
      const int64_t edge = side ? found.place : found.place - 1;
      if (edge < 0 || edge >= rows_.data.keys || from[0] == 0) continue;
      const double u = rows_.data.key[edge], offset = reference - u, score = score_of(x, reference, u);
      const double exponent = -score * rows_.plan.scale * rows_.plan.scale / 2;
      if (exponent > 500) return false;
      const double factor = std::exp(exponent);
      for (int column = 0; column < rows_.columns; ++column) {
        const double total = factor * from[column * count];
        int slot = 0;
        row[slot++ * rows_.columns + column] += total;
        if (rows_.plan.offsets) {
          row[slot * rows_.columns + column] += factor * from[(slot * rows_.columns + column) * count] + offset * total;
          ++slot;
        }
        if (rows_.plan.scores) {
          row[slot * rows_.columns + column] += factor * from[(slot * rows_.columns + column) * count] + score * total;
        }
      }
    }
    if (!rows_.data.exclude) return true;
    const double own = rows_.subtract_own(i, x - reference, row, 1);
    return rows_.keeps_digits(i, own, row, 1);
  }

  void sum_far(const std::vector<int64_t>& rows, const FarGroup& group, int64_t count, double* sums) const {
    const Edge<R> edge = edge_of(rows_.data, rows_.plan, group.edge, group.side, group.level, group.nearest);
    const std::vector<double> charge = edge.compress(rows_.columns, rows_.loader());
    const int64_t n = group.end - group.begin, pitch = padded(n);
    std::vector<double> apart(n), reference(n, 0.0), block(rows_.slots * rows_.columns * pitch);
    for (int64_t k = 0; k < n; ++k) {
      apart[k] = std::fabs(static_cast<double>(rows_.data.query[rows[group.begin + k]]) -
                           static_cast<double>(rows_.data.key[group.edge]));
    }
    DirectTask<double> task;
    task.target = apart.data();
    task.reference = reference.data();
    task.excluded = nullptr;
    task.targets = n;
    task.source = edge.position();
    task.sources = edge.sources();
    task.charge = charge.data();
    task.pitch = edge.sources();
    task.columns = rows_.columns;
    task.scale = rows_.plan.scale;
    task.offsets = rows_.plan.offsets;
    task.scores = rows_.plan.scores;
    task.sums = block.data();
    task.sums_pitch = pitch;
    linear_kernels<double>().direct(task);
    double* const out = sums + group.side * rows_.slots * rows_.columns * count + group.begin;
    for (int slot = 0; slot < rows_.slots; ++slot) {
      // Distances behind the edge are against the direction of x on the side above.
      const double sign = slot == 1 && rows_.plan.offsets && group.side ? -1 : 1;
      for (int c = 0; c < rows_.columns; ++c) {
        const int64_t column = slot * rows_.columns + c;
        for (int64_t k = 0; k < n; ++k) out[column * count + k] = sign * block[column * pitch + k];
      }
    }
  }

  const RowTask<R>& rows_;
};

}  // namespace linear
}  // namespace nwfast
