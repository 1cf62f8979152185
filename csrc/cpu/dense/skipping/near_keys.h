// The keys that may matter to a block of rows, gathered: the kernels run on them as they would on all keys.
//
// Forward, a row's sum is not known beforehand. The block's rows are summed over the keys around one of them, and where
// boxes lie nearer than what that gave, over those: each sum bounds the row's own from below. The backward pass has the
// sums in the state.
//
// Values may be of very different sizes. A key whose value is larger than those around the block counts by as much
// more.

#pragma once

#include "../tiled_batch.h"
#include "boxes.h"
#include "plan.h"

namespace nwfast {

constexpr double kMostNearKeys = 0.75;  // of all keys: gathering more would cost what it saves
constexpr double kMostNearShare = 0.6;  // of all pairs, where skipping pays
constexpr int64_t kTrialBlocks = 8;     // that this is judged by
constexpr int64_t kAround = 128;        // keys that give the first bound, a node of the order
constexpr int64_t kMostProbes = 4;      // boxes that are looked at to better it
constexpr double kWorthProbing = 6;     // where a row's bound may rise by that much, in base 2
constexpr double kNoSum = -0x1p1000;    // of a row for which no key counts

// Keys by themselves, and the places of rows' own keys among them.
template <typename T>
struct NearData {
  Near<T> near;
  TiledData<T> data;
  Buffer<T> key, value_columns, value_rows, log_weight;
  Buffer<int64_t> excluded;
  std::vector<double> query;
};

template <typename T>
class NearKeys {
 public:
  NearKeys(const Problem& problem, const TiledBatch<T>& batch, const SpatialPlan& plan, double negligible, bool serial)
      : batch_(batch), plan_(plan) {
    const int64_t n = problem.keys;
    negligible_ = negligible + std::log2(static_cast<double>(n));
    measure_values(serial);
    boxes_.build(batch.data.key, batch.data.pitch, n, batch.data.features, batch.feature_scale(), batch.data.log_weight,
                 reach_.get(), serial);
  }

  // Gives a task (its rows, their own keys' places) the keys that may matter to its rows alone. floor: log2 of each
  // row's sum of weights, or null where it is to be found.
  template <typename Task>
  void choose(const double* floor, Task& task, NearData<T>& chosen) const {
    const bool always = skipping() == Skipping::kAlways;
    if (!find(floor, task, always ? 2 : kMostNearKeys, chosen)) return;
    if (!always && static_cast<double>(chosen.near.count) > kMostNearKeys * static_cast<double>(boxes_.size())) return;
    gather(task, chosen);
  }

  // How many of some rows share their keys.
  int64_t block_of(int64_t rows) const {
    return rows < static_cast<int64_t>(plan_.rows().size()) / 8 ? near_block(0) : near_block(rows);
  }

  // Whether enough keys are left out, by a few blocks of rows of a forward pass. task(first): with the rows from there.
  template <typename MakeTask>
  bool pays(int64_t rows, const MakeTask& make) const {
    if (skipping() == Skipping::kAlways) return true;
    const int64_t size = block_of(rows), blocks = (rows + size - 1) / size, count = std::min(blocks, kTrialBlocks);
    NearData<T> chosen;
    double share = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = count < blocks ? i * (blocks - 1) / (count - 1) : i;
      share += make(block * size, [&](const double* floor, auto& task) {
        if (!find(floor, task, kMostNearKeys, chosen)) return 1.0;
        return static_cast<double>(chosen.near.count) / static_cast<double>(boxes_.size());
      });
    }
    return share < kMostNearShare * static_cast<double>(count);
  }

 private:
  // False where nearly all of the boxes are chosen, or where there is no telling.
  template <typename Task>
  bool find(const double* floor, const Task& task, double most, NearData<T>& chosen) const {
    Near<T>& near = chosen.near;
    const int64_t features = task.data.features;
    near.enclose(task.rows, features, [&](int64_t i, int64_t f) { return task.query[i * features + f]; });
    if (!near.finite) return false;
    const int64_t around = home(task, chosen) / kAround * kAround;
    const double least = least_.empty() ? 0 : least_[around / kAround];
    const double most_points = most * static_cast<double>(boxes_.size());
    double lowest = INFINITY, known[kNearRowBlock];
    if (floor) {
      for (int64_t i = 0; i < task.rows; ++i) lowest = std::fmin(lowest, floor[i]);
      if (static_cast<double>(boxes_.select_boxes(lowest - negligible_, least, near)) > most_points) return false;
    } else {
      std::fill_n(known, task.rows, kNoSum);
      lowest = probe(task, around, std::min(boxes_.size(), around + kAround), known);
      std::vector<int64_t> seen;
      for (int64_t probes = 0;; ++probes) {
        const int64_t points = boxes_.select_boxes(lowest - negligible_, least, near);
        const int64_t best = best_box(near, seen, around);
        if (best < 0 || probes == kMostProbes || near.bounds[best] < lowest + kWorthProbing) {
          if (static_cast<double>(points) > most_points) return false;
          break;
        }
        const int64_t box = near.boxes[best];
        seen.push_back(box);
        lowest = probe(task, boxes_.box_begin(box), boxes_.box_end(box), known);
      }
    }
    boxes_.select_points(lowest - negligible_, least, near);
    return true;
  }

  // The one that may hold the nearest keys, of those that no probe has seen; -1 for none.
  int64_t best_box(const Near<T>& near, const std::vector<int64_t>& seen, int64_t around) const {
    int64_t best = -1;
    for (int64_t i = 0; i < near.box_count; ++i) {
      const int64_t box = near.boxes[i], begin = boxes_.box_begin(box);
      if (begin >= around && begin < around + kAround) continue;
      if (std::find(seen.begin(), seen.end(), box) != seen.end()) continue;
      if (best < 0 || near.bounds[i] > near.bounds[best]) best = i;
    }
    return best;
  }

  // Betters what is known of the rows' sums by those over some keys; returns the least of them.
  template <typename Task>
  double probe(const Task& task, int64_t begin, int64_t end, double* known) const {
    double total[kNearRowBlock], shift[kNearRowBlock], values[1];
    int64_t excluded[kNearRowBlock];
    TiledRows<T> rows;
    rows.data = batch_.data;
    rows.data.n = end - begin;
    rows.data.channels = 0;
    rows.data.key += begin;
    rows.data.value_columns = rows.data.key;  // none is read
    if (rows.data.log_weight) rows.data.log_weight += begin;
    rows.rows = task.rows;
    rows.query = task.query;
    rows.excluded = task.excluded ? excluded : nullptr;
    for (int64_t i = 0; task.excluded && i < task.rows; ++i) excluded[i] = task.excluded[i] - begin;
    rows.total = total;
    rows.shift = shift;
    rows.values = values;
    kernels<T>().tiled_rows(rows);
    double lowest = INFINITY;
    for (int64_t i = 0; i < task.rows; ++i) {
      const double sum = std::log2(total[i]) - shift[i];
      known[i] = std::fmax(known[i], std::isfinite(sum) ? sum : kNoSum);
      lowest = std::fmin(lowest, known[i]);
    }
    return lowest;
  }

  // A place among keys that lie near the middle row of a block.
  template <typename Task>
  int64_t home(const Task& task, NearData<T>& chosen) const {
    const int64_t features = task.data.features;
    const T* const row = task.query + task.rows / 2 * features;
    chosen.query.resize(features);
    for (int64_t f = 0; f < features; ++f) chosen.query[f] = static_cast<double>(row[f]) / batch_.unit[f];
    const int64_t place = plan_.home(chosen.query.data());
    if (place >= 0) return place;
    Near<T>& near = chosen.near;  // keys as they come: the box nearest to the block
    boxes_.select_boxes(-INFINITY, 0, near);
    const int64_t best = best_box(near, {}, -kAround);
    return best < 0 ? 0 : boxes_.box_begin(near.boxes[best]);
  }

  // For each key the log2 of its largest value, relative to the channel's range, with its weight; for each kAround keys
  // the same of what is usual there, in the channel and the box where that is least: others may have come in with them.
  void measure_values(bool serial) {
    const TiledData<T>& data = batch_.data;
    const int64_t n = data.n, channels = data.channels;
    std::vector<double> inverse(channels, 0);
    bool any = false;
    for (int64_t c = 0; c < channels; ++c) {
      double size = 0;
      for (const double end : {batch_.values[c].low, batch_.values[c].high}) {
        size = std::fmax(size, std::fabs(end - static_cast<double>(batch_.centre[c])));
      }
      if (size > 0) inverse[c] = 1 / size;
      any |= size > 0;
    }
    if (!any) return;
    reach_.allocate(n);
    least_.assign((n + kAround - 1) / kAround, 0);
    parallel_blocks((n + kAround - 1) / kAround, serial, [&](int64_t part) {
      for (int64_t begin = part * kAround; begin < std::min(n, (part + 1) * kAround); begin += kBoxPoints) {
        const int64_t count = std::min(kBoxPoints, n - begin);
        double largest[kBoxPoints] = {};
        for (int64_t c = 0; c < channels; ++c) {
          double sizes[kBoxPoints];
          int64_t some = 0;
          for (int64_t i = 0; i < count; ++i) {
            const T value = data.value_columns ? data.value_columns[c * data.pitch + begin + i]
                                               : data.value_rows[(begin + i) * data.channel_pitch + c];
            const double size = std::fabs(static_cast<double>(value)) * inverse[c];
            largest[i] = std::fmax(largest[i], size);
            if (size > 0) sizes[some++] = size;
          }
          if (some == 0) continue;
          std::nth_element(sizes, sizes + (some - 1) / 2, sizes + some);
          least_[part] = std::fmin(least_[part], std::log2(sizes[(some - 1) / 2]));
        }
        for (int64_t i = 0; i < count; ++i) {
          const double weight = data.log_weight ? static_cast<double>(data.log_weight[begin + i]) : 0;
          reach_[begin + i] = static_cast<T>(std::log2(largest[i]) + weight);
        }
      }
    });
  }

  template <typename Task>
  void gather(Task& task, NearData<T>& to) const {
    const TiledData<T>& from = batch_.data;
    const uint32_t* const places = to.near.points.get();
    const int64_t n = to.near.count, pitch = padded(n);
    const auto columns = [&](const T* source, int64_t count, Buffer<T>& buffer) {
      buffer.allocate(count * pitch);
      for (int64_t f = 0; f < count; ++f) {
        T* const column = buffer.get() + f * pitch;
        for (int64_t j = 0; j < n; ++j) column[j] = source[f * from.pitch + places[j]];
        std::fill(column + n, column + pitch, T(0));
      }
      return buffer.get();
    };
    to.data = from;
    to.data.n = n;
    to.data.pitch = pitch;
    to.data.key = columns(from.key, from.features, to.key);
    if (from.value_columns) to.data.value_columns = columns(from.value_columns, from.channels, to.value_columns);
    if (from.log_weight) to.data.log_weight = columns(from.log_weight, 1, to.log_weight);
    if (from.value_rows) {
      to.value_rows.allocate(n * from.channel_pitch);
      for (int64_t j = 0; j < n; ++j) {
        std::copy_n(from.value_rows + places[j] * from.channel_pitch, from.channel_pitch,
                    to.value_rows.get() + j * from.channel_pitch);
      }
      to.data.value_rows = to.value_rows.get();
    }
    task.data = to.data;
    if (!task.excluded) return;
    to.excluded.allocate(task.rows);
    for (int64_t i = 0; i < task.rows; ++i) {
      const uint32_t own = static_cast<uint32_t>(task.excluded[i]);
      const uint32_t* const place = std::lower_bound(places, places + n, own);
      to.excluded[i] = place < places + n && *place == own ? place - places : -1;
    }
    task.excluded = to.excluded.get();
  }

  const TiledBatch<T>& batch_;
  const SpatialPlan& plan_;
  double negligible_;
  Buffer<T> reach_;
  std::vector<double> least_;
  BoxedPoints<T> boxes_;
};

}  // namespace nwfast
