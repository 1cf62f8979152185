// The rows that a tile of keys may matter to, gathered: what near_keys.h is, transposed.
//
// All sums are known, so that one bound serves: a row's charge is -log2 of its sum. Rows whose results have larger
// gradients than those around the tile count by as much more.

#pragma once

#include "../tiled_batch.h"
#include "boxes.h"
#include "plan.h"

namespace nwfast {

constexpr double kMostNearRows = 0.75;  // of all rows

template <typename T>
struct NearRowData {
  Near<T> near;
  Buffer<T> query, inverse_total, offset_grad, lse_grad, value_grad;
  Buffer<double> shift;
  Buffer<int64_t> excluded;
};

template <typename T>
class NearRows {
 public:
  // `rows`: all rows of the pass, finite; size (rows): log2 of the size of their gradients. charge: log2 of the weight
  // that keys of the tile at [begin, end) have at most, where it is no part of the scores.
  NearRows(const TiledKeyGrad<T>& rows, const TiledBatch<T>& batch, const double* size, double negligible, bool serial)
      : batch_(batch) {
    const int64_t n = rows.rows, features = batch.data.features, pitch = padded(n);
    negligible_ = negligible + std::log2(static_cast<double>(batch.data.n));
    point_.allocate(features * pitch);
    charge_.allocate(n);
    reach_.allocate(n);
    parallel_blocks((n + kGroupPoints - 1) / kGroupPoints, serial, [&](int64_t block) {
      for (int64_t i = block * kGroupPoints; i < std::min(n, (block + 1) * kGroupPoints); ++i) {
        for (int64_t f = 0; f < features; ++f) point_[f * pitch + i] = rows.query[i * features + f];
        const double charge = rows.shift[i] + std::log2(static_cast<double>(rows.inverse_total[i]));
        charge_[i] = static_cast<T>(charge);
        reach_[i] = static_cast<T>(charge + size[i]);
      }
    });
    largest_.assign((n + kBoxPoints - 1) / kBoxPoints, -INFINITY);
    for (int64_t i = 0; i < n; ++i) largest_[i / kBoxPoints] = std::fmax(largest_[i / kBoxPoints], size[i]);
    boxes_.build(point_.get(), pitch, n, features, batch.feature_scale(), charge_.get(), reach_.get(), serial);
  }

  // Gives a task (its keys) the rows that its keys may matter to.
  void choose(double charge, TiledKeyGrad<T>& task, NearRowData<T>& chosen) const {
    const bool always = skipping() == Skipping::kAlways;
    if (find(charge, task, always ? 2 : kMostNearRows, chosen) &&
        (always || static_cast<double>(chosen.near.count) <= kMostNearRows * static_cast<double>(boxes_.size()))) {
      gather(task, chosen);
    }
  }

  // Whether enough rows are left out, by a few tiles of keys. charge(begin, end): of the keys there.
  template <typename Charge>
  bool pays(const Charge& charge) const {
    if (skipping() == Skipping::kAlways) return true;
    const int64_t tiles = (batch_.data.n + kKeyTile - 1) / kKeyTile, count = std::min(tiles, kTrialTiles);
    NearRowData<T> chosen;
    double share = 0;
    for (int64_t i = 0; i < count; ++i) {
      TiledKeyGrad<T> task;
      task.key_begin = (count < tiles ? i * (tiles - 1) / (count - 1) : i) * kKeyTile;
      task.key_end = std::min(batch_.data.n, task.key_begin + kKeyTile);
      const bool found = find(charge(task.key_begin, task.key_end), task, kMostNearRows, chosen);
      share += found ? static_cast<double>(chosen.near.count) / static_cast<double>(boxes_.size()) : 1;
    }
    return share < kMostShare * static_cast<double>(count);
  }

 private:
  static constexpr int64_t kTrialTiles = 8;
  static constexpr double kMostShare = 0.6;

  bool find(double charge, const TiledKeyGrad<T>& task, double most, NearRowData<T>& chosen) const {
    Near<T>& near = chosen.near;
    const TiledData<T>& data = batch_.data;
    near.enclose(task.key_end - task.key_begin, data.features,
                 [&](int64_t j, int64_t f) { return data.key[f * data.pitch + task.key_begin + j]; });
    if (!near.finite) return false;
    const double limit = -(negligible_ + charge);
    // The rows nearest to the tile say what a gradient's size is there.
    boxes_.select_boxes(limit, kNoReach, near);
    double least = INFINITY, best = -INFINITY;
    for (int64_t i = 0; i < near.box_count; ++i) {
      const double bound = static_cast<double>(near.bounds[i]), size = largest_[near.boxes[i]];
      if (!(bound > best)) continue;
      best = bound;
      least = size;
    }
    if (least == INFINITY) least = *std::min_element(largest_.begin(), largest_.end());  // a tile far from all rows
    const int64_t points = boxes_.select_boxes(limit, least, near);
    if (static_cast<double>(points) > most * static_cast<double>(boxes_.size())) return false;
    boxes_.select_points(limit, least, near);
    return true;
  }

  void gather(TiledKeyGrad<T>& task, NearRowData<T>& to) const {
    const uint32_t* const places = to.near.points.get();
    const int64_t n = to.near.count, features = batch_.data.features, pitch = batch_.data.channel_pitch;
    // Short rows of channels are read one by one, long ones by vectors.
    const int64_t channels = batch_.data.channels <= kMaxColumns ? batch_.data.channels : pitch;
    const auto picked = [&](const auto* source, auto& buffer) {
      buffer.allocate(n);
      for (int64_t i = 0; i < n; ++i) buffer[i] = source[places[i]];
      return buffer.get();
    };
    const auto rows = [&](const T* source, int64_t columns, int64_t distance, Buffer<T>& buffer) {
      buffer.allocate(n * distance);
      for (int64_t i = 0; i < n; ++i) std::copy_n(source + places[i] * distance, columns, buffer.get() + i * distance);
      return buffer.get();
    };
    task.query = rows(task.query, features, features, to.query);
    task.value_grad = rows(task.value_grad, channels, pitch, to.value_grad);
    task.inverse_total = picked(task.inverse_total, to.inverse_total);
    task.offset_grad = picked(task.offset_grad, to.offset_grad);
    task.lse_grad = picked(task.lse_grad, to.lse_grad);
    task.shift = picked(task.shift, to.shift);
    if (task.excluded) task.excluded = picked(task.excluded, to.excluded);
    task.rows = n;
  }

  static constexpr double kNoReach = 1e6;  // as if no gradient were larger than others

  const TiledBatch<T>& batch_;
  double negligible_;
  Buffer<T> point_, charge_, reach_;
  std::vector<double> largest_;
  BoxedPoints<T> boxes_;
};

}  // namespace nwfast
