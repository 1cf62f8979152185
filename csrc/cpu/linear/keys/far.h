// The key side's far rows, which are relative to their nearest key: those with few keys in their window are gathered by
// each key, the rest are summed at the compressed keys behind the edges of their gap, and handed on from there.

#pragma once

#include "steep.h"

namespace nwfast {
namespace linear {

constexpr int64_t kTargets = 16;  // keys that gather from the same rows

// Keys to be served: those with a weight, or those without.
template <typename R>
struct Targets {
  const R* x;
  int64_t n;
  bool weighted;
  const int64_t* place;      // of keys without a weight, by the caller's numbers; -1 for others
  const int64_t* excluding;  // the row that leaves out a key without a weight
};

// Sums over rows for a chunk of keys. The pitch leaves room for what kernels write beyond the last key.
struct KeySums {
  int64_t begin, pitch;
  Buffer<double> near;   // (slots, columns, pitch): A and E, and with factors (k_j - x_i)
  Buffer<double> far;    // (channels + slots, pitch): A, <v, A> - E and <v, A'> - E' of the other rows
  Buffer<double> value;  // (channels, pitch), centred
};

// Rows whose parts each key gathers one by one.
struct Gathered {
  std::vector<int64_t> row;
  std::vector<double> x, reference, low, high;  // windows: of all rows up to one (high), from one on (low)
  std::vector<double> grad, mean;               // (channels, rows); the gradient is divided by the row's total
  std::vector<double> lse_grad;
};

template <typename R>
class FarRows {
 public:
  FarRows(const RowGradients<R>& gradients, const Data<R>& data, const Plan& plan)
      : gradients_(gradients), data_(data), plan_(plan) {}

  bool empty() const { return far_.empty(); }
  std::vector<Referred> referred() const {
    std::vector<Referred> rows;
    for (size_t k = 0; k < far_.size(); ++k) {
      rows.push_back({far_[k], found_[k].level_zero ? static_cast<double>(data_.query[far_[k]]) : found_[k].key});
    }
    return rows;
  }

  // Takes rows in ascending order. They are gathered one by one, or summed in groups at compressed keys.
  void sort(std::vector<int64_t> rows, bool serial) {
    far_ = std::move(rows);
    serial_ = serial;
    channels_ = data_.channels;
    columns_ = channels_ + 1;
    slots_ = plan_.orders;
    const int64_t count = static_cast<int64_t>(far_.size()), blocks = (count + kChunk - 1) / kChunk;
    found_.resize(count);
    std::vector<char> single(count);
    std::vector<double> lows(count), highs(count);
    std::vector<int64_t> start(blocks + 1, 0);  // of each block among the gathered rows
    parallel_blocks(blocks, serial_, [&](int64_t block) {
      const int64_t first = block * kChunk;
      int64_t hint = lower_bound(data_.key, data_.keys, static_cast<double>(data_.query[far_[first]]));
      for (int64_t k = first; k < std::min(count, first + kChunk); ++k) {
        found_[k] = nearest(data_, plan_, far_[k], hint);
        found_[k].level_zero = !gradients_.shifted(far_[k]);  // what the forward pass took it for
        hint = found_[k].place;
        single[k] = far_window(k, &lows[k], &highs[k]);
        start[block + 1] += single[k];
      }
    });
    for (int64_t block = 0; block < blocks; ++block) start[block + 1] += start[block];
    const int64_t n = start[blocks];
    gathered_.row.resize(n);
    for (auto* numbers : {&gathered_.x, &gathered_.reference, &gathered_.low, &gathered_.high, &gathered_.lse_grad}) {
      numbers->resize(n);
    }
    gathered_.grad.resize(channels_ * n);
    gathered_.mean.resize(channels_ * n);
    parallel_blocks(blocks, serial_, [&](int64_t block) {
      int64_t i = start[block];
      for (int64_t k = block * kChunk; k < std::min(count, (block + 1) * kChunk); ++k) {
        if (single[k]) put_gathered(i++, k, lows[k], highs[k]);
      }
    });
    for (int64_t i = 1; i < n; ++i) gathered_.high[i] = std::fmax(gathered_.high[i], gathered_.high[i - 1]);
    for (int64_t i = n - 2; i >= 0; --i) gathered_.low[i] = std::fmin(gathered_.low[i], gathered_.low[i + 1]);
    make_groups(single);
  }

  // Adds the sums of keys [begin, end).
  void add(const Targets<R>& targets, int64_t begin, int64_t end, KeySums& sums) const {
    GatheredRange range;
    for (int64_t first = begin; first < end; first += kTargets) {
      gather(targets, first, std::min(kTargets, end - first), range, sums);
    }
    for (size_t g = 0; g < groups_.size(); ++g) add_group(targets, groups_[g], fields_[g], begin, end, sums);
  }

 private:
  // The window of a far row; whether its keys are few enough to be visited one by one.
  bool far_window(int64_t k, double* low, double* high) const {
    const double x = data_.query[far_[k]];
    window_of(data_, plan_, x, found_[k].key, low, high);
    // A total below 1 lets keys of less weight count.
    const double total = gradients_.total_of(far_[k]);
    if (total < 1 && plan_.scale > 0) {
      const double more = std::sqrt(-2 * std::log(total)) / plan_.scale;
      *low -= more;
      *high += more;
    }
    const int64_t begin = search_down(data_, found_[k].place, *low);
    if (gallop(data_.key, data_.keys, found_[k].place, *high) - begin <= kDirectKeys) return true;
    const int64_t own = data_.excluded(far_[k]);
    return own >= 0 && score_of(x, found_[k].level_zero ? x : found_[k].key, data_.key[own]) <= 0;
  }

  // Far row k becomes the i-th of those that keys gather.
  void put_gathered(int64_t i, int64_t k, double low, double high) {
    const int64_t row = far_[k], n = static_cast<int64_t>(gathered_.row.size());
    const double total = gradients_.total_of(row);
    gathered_.row[i] = k;
    gathered_.x[i] = data_.query[row];
    gathered_.reference[i] = found_[k].level_zero ? gathered_.x[i] : found_[k].key;
    gathered_.low[i] = low;
    gathered_.high[i] = high;
    for (int c = 0; c < channels_; ++c) {
      gathered_.grad[c * n + i] = gradients_.grad_of(row, c) / total;
      gathered_.mean[c * n + i] = gradients_.mean_of(row, c);
    }
    gathered_.lse_grad[i] = gradients_.lse_grad_of(row) / total;
  }

  struct Group {
    int64_t place;  // of the key at the edge
    int side, level;
    std::vector<int64_t> rows;  // among the far ones
    double apart;               // least distance of a row from the edge
  };
  struct Field {
    std::unique_ptr<Edge<R>> edge;
    std::vector<double> base;  // the values of the edge's key, which others are taken relative to
    std::vector<double> sums;  // (slots, columns, pitch), at the edge's sources
    int64_t pitch;
  };

  void make_groups(const std::vector<char>& single) {
    in_left_group_.assign(far_.size(), 0);
    for (int side = 0; side < 2; ++side) {
      for (int64_t k = 0; k < static_cast<int64_t>(far_.size()); ++k) {
        if (single[k]) continue;
        const int64_t left = found_[k].place - 1, right = found_[k].place, edge = side ? right : left;
        if (edge < 0 || edge >= data_.keys) continue;
        const double x = data_.query[far_[k]], apart = std::fabs(x - data_.key[edge]);
        const double reference = found_[k].level_zero ? x : found_[k].key;
        const double excess = score_of(x, reference, data_.key[edge]) * plan_.scale * plan_.scale / 2;
        if (excess > plan_.log_span + data_.weight_span + 8 - std::fmin(0.0, std::log(gradients_.total_of(far_[k]))))
          continue;
        const int level = level_of(apart * plan_.scale);
        if (groups_.empty() || groups_.back().side != side || groups_.back().place != edge ||
            groups_.back().level != level) {
          groups_.push_back({edge, side, level, {}, INFINITY});
        }
        groups_.back().rows.push_back(k);
        in_left_group_[k] |= side == 0;
        groups_.back().apart = std::fmin(groups_.back().apart, apart);
      }
    }
    fields_.resize(groups_.size());
    parallel_blocks(static_cast<int64_t>(groups_.size()), serial_,
                    [&](int64_t g) { sum_group(groups_[g], fields_[g]); });
  }

  // The group's sums at the sources of its edge.
  void sum_group(const Group& group, Field& field) const {
    field.edge.reset(new Edge<R>(edge_of(data_, plan_, group.place, group.side, group.level, group.apart)));
    const int64_t n = static_cast<int64_t>(group.rows.size()), targets = field.edge->sources();
    for (int c = 0; c < channels_; ++c) field.base.push_back(data_.value_of(group.place, c));
    std::vector<double> apart(n), reference(n, 0.0), charge(columns_ * n), one(columns_);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = group.rows[i], row = far_[k];
      const double x = data_.query[row], edge = data_.key[group.place];
      const double r = found_[k].level_zero ? x : found_[k].key;
      apart[i] = std::fabs(x - edge);
      // From the edge to the row's own reference.
      const double score = score_of(x, r, edge);
      const double factor = std::exp(-score * plan_.scale * plan_.scale / 2) / gradients_.total_of(row);
      gradients_.charge_of(row, field.base.data(), one.data());
      for (int c = 0; c < columns_; ++c) charge[c * n + i] = one[c] * factor;
    }
    field.pitch = padded(targets);
    field.sums.assign(slots_ * columns_ * field.pitch, 0.0);
    GatherTask<double> task;
    task.target = field.edge->position();
    task.targets = targets;
    task.source = apart.data();
    task.reference = reference.data();
    task.sources = n;
    task.charge = charge.data();
    task.pitch = n;
    task.columns = columns_;
    task.scale = plan_.scale;
    task.offsets = plan_.offsets;
    task.sums = field.sums.data();
    task.sums_pitch = field.pitch;
    linear_kernels<double>().gather(task);
    if (plan_.offsets && group.side) {  // x lies below the keys
      for (int64_t i = columns_ * field.pitch; i < 2 * columns_ * field.pitch; ++i) field.sums[i] = -field.sums[i];
    }
  }

  // The place among the targets of the key that a row leaves out.
  int64_t excluded(const Targets<R>& targets, int64_t row) const {
    return targets.weighted ? data_.excluded(row) : data_.exclude ? targets.place[data_.original_row(row)] : -1;
  }

  // Rows whose windows reach some keys; ascends with the keys.
  struct GatheredRange {
    int64_t begin = -1, end = 0;
  };

  void gather(const Targets<R>& targets, int64_t first, int64_t n, GatheredRange& range, KeySums& sums) const {
    const R* const u = targets.x + first;
    const double lowest = u[0], highest = std::nextafter(static_cast<double>(u[n - 1]), INFINITY);
    const int64_t rows = static_cast<int64_t>(gathered_.row.size());
    const double *const low = gathered_.low.data(), *const high = gathered_.high.data();
    const bool found = range.begin >= 0;
    range.begin = found ? gallop(high, rows, range.begin, lowest) : lower_bound(high, rows, lowest);
    range.end = found ? gallop(low, rows, range.end, highest) : lower_bound(low, rows, highest);
    const int64_t begin = range.begin, end = range.end;
    if (begin >= end) return;
    std::vector<int64_t> left_out(data_.exclude ? end - begin : 0);
    for (size_t i = 0; i < left_out.size(); ++i) {
      left_out[i] = excluded(targets, far_[gathered_.row[begin + i]]) - first;
    }
    PullTask<R> task;
    task.target = u;
    task.targets = n;
    task.value = sums.value.get() + (first - sums.begin);
    task.value_pitch = sums.pitch;
    task.source = gathered_.x.data() + begin;
    task.reference = gathered_.reference.data() + begin;
    task.excluded = left_out.empty() ? nullptr : left_out.data();
    task.sources = end - begin;
    task.grad = gathered_.grad.data() + begin;
    task.mean = gathered_.mean.data() + begin;
    task.lse_grad = gathered_.lse_grad.data() + begin;
    task.pitch = static_cast<int64_t>(gathered_.row.size());
    task.channels = channels_;
    task.scale = plan_.scale;
    task.offsets = plan_.offsets;
    task.sums = sums.far.get() + (first - sums.begin);
    task.sums_pitch = sums.pitch;
    linear_kernels<R>().pull(task);
  }

  void add_group(const Targets<R>& targets, const Group& group, const Field& field, int64_t begin, int64_t end,
                 KeySums& sums) const {
    if (!targets.weighted) return add_pairs(targets, group, begin, end, sums);
    const int64_t first = std::max(begin, field.edge->keys_begin()), last = std::min(end, field.edge->keys_end());
    if (first >= last) return;
    const int64_t n = last - first;
    std::vector<double> block(slots_ * columns_ * n, 0.0), one(columns_);
    field.edge->distribute(first, last, slots_ * columns_, field.sums.data(), field.pitch, block.data(), n);
    for (size_t i = 0; data_.exclude && i < group.rows.size(); ++i) {
      const int64_t row = far_[group.rows[i]], j = data_.excluded(row);
      if (j < first || j >= last) continue;
      double offset;
      const double weight = weight_between(group.rows[i], data_.key[j], &offset);
      gradients_.charge_of(row, field.base.data(), one.data());
      for (int c = 0; c < columns_; ++c) {
        block[c * n + j - first] -= weight * one[c];
        if (plan_.offsets) block[(columns_ + c) * n + j - first] -= weight * one[c] * offset;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      double* const out = sums.far.get() + (first - begin) + i;
      for (int slot = 0; slot < slots_; ++slot) {
        const double* const from = block.data() + slot * columns_ * n + i;
        double pulled = -from[channels_ * n];
        for (int c = 0; c < channels_; ++c) {
          pulled += from[c * n] * (sums.value[c * sums.pitch + (first - begin) + i] - field.base[c]);
          if (slot == 0) out[c * sums.pitch] += from[c * n];
        }
        out[(channels_ + slot) * sums.pitch] += pulled;
      }
    }
  }

  // exp of the score relative to the far row's reference, divided by the row's total; and x - u.
  double weight_between(int64_t k, double u, double* offset) const {
    const double x = data_.query[far_[k]], r = found_[k].level_zero ? x : found_[k].key;
    const double exponent = -score_of(x, r, u) * plan_.scale * plan_.scale / 2;
    *offset = x - u;
    return std::exp(std::fmin(exponent, 690.0)) / gradients_.total_of(far_[k]);
  }

  // Keys without a weight may lie anywhere, also in the gap, nearer to a row than its reference: pair by pair. A row
  // may be in a group on each side, and is taken with the first.
  void add_pairs(const Targets<R>& targets, const Group& group, int64_t begin, int64_t end, KeySums& sums) const {
    for (const int64_t k : group.rows) {
      if (group.side == 1 && in_left_group_[k]) continue;
      const int64_t row = far_[k], left_out = excluded(targets, row);
      for (int64_t j = begin; j < end; ++j) {
        double offset;
        const double weight = weight_between(k, targets.x[j], &offset);
        if (weight == 0 || j == left_out) continue;
        double pulled = gradients_.lse_grad_of(row);
        double* const out = sums.far.get() + (j - begin);
        for (int c = 0; c < channels_; ++c) {
          const double g = gradients_.grad_of(row, c);
          pulled += g * (sums.value[c * sums.pitch + j - begin] - gradients_.mean_of(row, c));
          out[c * sums.pitch] += weight * g;
        }
        out[channels_ * sums.pitch] += weight * pulled;
        if (plan_.offsets) out[(channels_ + 1) * sums.pitch] += weight * pulled * offset;
      }
    }
  }

  const RowGradients<R>& gradients_;
  const Data<R>& data_;
  const Plan& plan_;
  bool serial_ = false;
  int channels_ = 1, columns_ = 2, slots_ = 1;
  std::vector<int64_t> far_;
  std::vector<Nearest> found_;
  Gathered gathered_;
  std::vector<Group> groups_;
  std::vector<char> in_left_group_;
  std::vector<Field> fields_;
};

}  // namespace linear
}  // namespace nwfast
