// The keys, values and queries of one batch element as the tiles read them.
//
// Packed by feature and scaled by powers of two (exactly), so that the squares of what matters neither overflow nor
// underflow. Where a row cannot be computed so, it is marked.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../problem.h"

namespace nwfast {

template <typename T>
struct TiledLimits;
template <>
struct TiledLimits<float> {
  static constexpr int kLeast = -50, kLow = -10, kHigh = 45, kMostRaise = 40;  // exponents of scaled coordinates
  static constexpr double kLeastValue = 0x1p-30, kMostValue = 0x1p40;
  static constexpr double kWeightRange = 60;  // log2 of the ratio of key weights
};
template <>
struct TiledLimits<double> {
  static constexpr int kLeast = -480, kLow = -300, kHigh = 450, kMostRaise = 400;
  static constexpr double kLeastValue = 0x1p-600, kMostValue = 0x1p500;
  static constexpr double kWeightRange = 500;
};

constexpr double kReach = 64;  // coordinates this far from the origin, in units of the score, are not scaled up

// Which parts of the value a pass reads.
enum class Values { kForward, kBackward };

template <typename T>
class TiledBatch {
 public:
  // key_order: the keys by their places, or null where they stay as they are.
  void prepare(const Problem& problem, int64_t b, Values layout, bool weigh, const uint32_t* key_order) {
    const Batch& batch = problem.batch;
    order_ = key_order;
    own_ = problem.own;
    place_.clear();
    if (key_order && problem.exclude_self) {
      place_.resize(problem.keys);
      for (int64_t j = 0; j < problem.keys; ++j) place_[key_order[j]] = static_cast<uint32_t>(j);
    }
    TiledData<T>& d = data;
    d.n = problem.keys;
    d.features = problem.features;
    d.channels = problem.channels;
    d.pitch = padded(d.n);
    d.channel_pitch = d.channels <= kMaxColumns ? d.channels : (d.channels + 63) / 64 * 64;
    odd.assign(problem.queries, false);
    pack_coordinates(problem, batch, b);
    pack_values(problem, problem.value.offset(batch, b), layout);
    if (problem.exclude_self && !(finite_keys_ && finite_values_)) find_odd_own(problem);
    d.log_weight = nullptr;
    weight_unit = 1;
    if (problem.key_weight.data) {
      pack_weights(problem, problem.key_weight.offset(batch, b));
      if (weigh) d.log_weight = log_weight_.get();
    }
  }

  int64_t original_key(int64_t place) const { return order_ ? order_[place] : place; }
  // Of a row's own key.
  int64_t own_place(int64_t row) const {
    const int64_t key = own_ ? own_[row] : row;
    return place_.empty() ? key : place_[key];
  }
  // What differences of packed coordinates are multiplied by for the score.
  const T* feature_scale() const { return feature_scale_.get(); }
  // Whether all keys count by finite numbers.
  bool finite() const { return finite_keys_ && finite_values_ && finite_weights_; }

  TiledData<T> data;
  Buffer<T> query;         // (queries, features), scaled
  Buffer<double> w, unit;  // (features)
  Buffer<T> centre;        // (channels)
  Buffer<Range> values;    // (channels)
  Buffer<double> weight;   // (keys), divided by weight_unit; empty where there are none
  double weight_unit = 1;
  bool usable = true;     // whether T has the range for this data
  std::vector<char> odd;  // (queries) rows that the packed data does not serve

 private:
  void pack_coordinates(const Problem& problem, const Batch& batch, int64_t b) {
    const int64_t features = problem.features, n = problem.keys, m = problem.queries;
    const int64_t key_offset = problem.key.offset(batch, b), query_offset = problem.query.offset(batch, b);
    w.allocate(features);
    unit.allocate(features);
    read(problem.w, problem.w.offset(batch, b), features, problem.w.column_stride, w.get());
    // Vectors may begin at any key, and end as far beyond the last.
    key_.allocate(features * data.pitch + kPadding);
    query.allocate(m * features);
    bool uniform = true;
    for (int64_t f = 1; f < features; ++f) uniform &= std::fabs(w[f]) == std::fabs(w[0]);
    // Rows in blocks that stay in the cache while one feature of them after the other is read.
    constexpr int64_t kBlock = 256;
    T column[kBlock];
    std::vector<Range> ranges(features);
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t count = std::min(kBlock, n - begin);
      for (int64_t f = 0; f < features; ++f) {
        T* const key = key_.get() + f * data.pitch + begin;
        read_keys(problem.key, key_offset + f * problem.key.column_stride, begin, count, key);
        ranges[f].include(key, count);
      }
    }
    for (const Range& range : ranges) finite_keys_ &= range.finite;
    const auto read_queries = [&](int64_t begin, int64_t f) {
      const int64_t count = std::min(kBlock, m - begin);
      const View& view = problem.query;
      read(view, query_offset + f * view.column_stride + begin * view.row_stride, count, view.row_stride, column);
      return count;
    };
    for (int64_t begin = 0; begin < m; begin += kBlock) {
      for (int64_t f = 0; f < features; ++f) {
        const int64_t count = read_queries(begin, f);
        for (int64_t i = 0; i < count; ++i) query[(begin + i) * features + f] = column[i];
        ranges[f].include(column, count);
      }
    }
    Buffer<double> largest(features), near(features);  // of the coordinates; of those within reach of the origin
    for (int64_t f = 0; f < features; ++f) {
      T* const key = key_.get() + f * data.pitch;
      for (int64_t j = n; j < data.pitch; ++j) key[j] = 0;
      largest[f] = near[f] = ranges[f].magnitude();
      const double scale = std::fabs(w[f]) * kRoot;
      if (largest[f] * scale > kReach) {
        near[f] = near_of(key, n, scale);
        for (int64_t begin = 0; begin < m; begin += kBlock) {
          near[f] = std::fmax(near[f], near_of(column, read_queries(begin, f), scale));
        }
      }
      if (!ranges[f].finite) infinite_ = true;
    }
    double near_all = 0, largest_all = 0;
    for (int64_t f = 0; uniform && f < features; ++f) {
      near_all = std::fmax(near_all, near[f]);
      largest_all = std::fmax(largest_all, largest[f]);
    }
    feature_scale_.allocate(features);
    for (int64_t f = 0; f < features; ++f) {
      scale_feature(f, uniform ? near_all : near[f], uniform ? largest_all : largest[f], m, features);
      // The gradient of its w is by squares of one feature alone, however small beside others.
      usable &= near[f] == 0 || near[f] * unit[f] >= std::ldexp(1.0, TiledLimits<T>::kLeast);
    }
    data.key = key_.get();
    data.feature_scale = uniform ? nullptr : feature_scale_.get();
    data.score_scale = uniform ? feature_scale_[0] * feature_scale_[0] : T(1);
  }

  template <typename V>
  void read_keys(const View& view, int64_t offset, int64_t begin, int64_t n, V* out) const {
    order_ ? gather(view, offset, order_ + begin, n, view.row_stride, out)
           : read(view, offset + begin * view.row_stride, n, view.row_stride, out);
  }

  static double near_of(const T* x, int64_t n, double scale) {
    double near = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double size = std::fabs(static_cast<double>(x[i]));
      if (size * scale <= kReach) near = std::fmax(near, size);
    }
    return near;
  }

  // Scaled by the power of two next below |w| (in units of base-2 scores), or a greater one where squares would
  // underflow. What lies beyond the range then is cut off: no scale is set for all by the extremes of some.
  void scale_feature(int64_t f, double near, double largest, int64_t m, int64_t features) {
    const double scale = std::fabs(w[f]) * kRoot;
    int exponent = scale > 0 ? std::ilogb(scale) : largest > 0 ? -std::ilogb(largest) : 0, raise = 0;
    if (scale > 0 && near > 0) raise = std::max(0, TiledLimits<T>::kLow - (exponent + std::ilogb(near)));
    usable &= raise <= TiledLimits<T>::kMostRaise;
    exponent = std::min(std::max(exponent + raise, -1000), 1000);
    unit[f] = std::ldexp(1.0, exponent);
    feature_scale_[f] = static_cast<T>(scale / unit[f]);
    const double factor = unit[f];
    T* const key = key_.get() + f * data.pitch;
    const double most =
        std::ldexp(1.0, std::max(TiledLimits<T>::kHigh, 20 + std::min(raise, TiledLimits<T>::kMostRaise)));
    if (!infinite_ && largest * factor <= most / 2) {
      for (int64_t j = 0; j < data.n; ++j) key[j] = static_cast<T>(key[j] * factor);
      for (int64_t i = 0; i < m; ++i) query[i * features + f] = static_cast<T>(query[i * features + f] * factor);
      return;
    }
    for (int64_t j = 0; j < data.n; ++j) {
      const double scaled = key[j] * factor;
      // A key at infinity is far from every query, unless its distance is multiplied by 0.
      const bool beyond = std::fabs(scaled) > most && (std::isfinite(key[j]) || scale > 0);
      key[j] = static_cast<T>(beyond ? std::copysign(most, scaled) : scaled);
    }
    for (int64_t i = 0; i < m; ++i) {
      T& x = query[i * features + f];
      const double scaled = x * factor;
      if (std::fabs(scaled) > most / 2) {  // at infinity too, where a product with a w of 0 is NaN
        odd[i] = true;
        x = static_cast<T>(std::copysign(most, scaled));
      } else {
        x = static_cast<T>(scaled);
      }
    }
  }

  void pack_values(const Problem& problem, int64_t offset, Values layout) {
    const int64_t n = problem.keys, channels = problem.channels;
    const bool columns = layout == Values::kBackward || channels <= kMaxColumns;
    values.allocate(channels);
    centre.allocate(channels);
    Buffer<T> column(data.pitch);
    if (columns) {
      value_columns_.allocate(channels * data.pitch + kPadding);
    } else {
      value_rows_.allocate(n * data.channel_pitch);
      std::fill(value_rows_.get(), value_rows_.get() + n * data.channel_pitch, T(0));
    }
    for (int64_t c = 0; c < channels; ++c) {
      T* const packed = columns ? value_columns_.get() + c * data.pitch : column.get();
      read_keys(problem.value, offset + c * problem.value.column_stride, 0, n, packed);
      values[c] = Range();
      values[c].include(packed, n);
      centre[c] = static_cast<T>(values[c].centre());
      finite_values_ &= values[c].finite;
      const double size = values[c].magnitude();
      usable &= size == 0 || (size > TiledLimits<T>::kLeastValue && size < TiledLimits<T>::kMostValue);
      for (int64_t j = 0; j < n; ++j) packed[j] -= centre[c];
      for (int64_t j = n; j < data.pitch; ++j) packed[j] = 0;
      if (!columns) {
        for (int64_t j = 0; j < n; ++j) value_rows_[j * data.channel_pitch + c] = packed[j];
      }
    }
    data.value_columns = columns ? value_columns_.get() : nullptr;
    data.value_rows = columns ? nullptr : value_rows_.get();
  }

  void pack_weights(const Problem& problem, int64_t offset) {
    const int64_t n = problem.keys;
    weight.allocate(n);
    log_weight_.allocate(data.pitch + kPadding);
    read_keys(problem.key_weight, offset, 0, n, weight.get());
    double low = INFINITY, high = 0;
    for (int64_t j = 0; j < n; ++j) {
      finite_weights_ &= weight[j] >= 0 && weight[j] < INFINITY;
      if (!(weight[j] > 0 && weight[j] < INFINITY)) continue;
      low = std::fmin(low, weight[j]);
      high = std::fmax(high, weight[j]);
    }
    if (high > 0) {
      weight_unit = std::ldexp(1.0, std::ilogb(high));
      usable &= std::log2(high) - std::log2(low) <= TiledLimits<T>::kWeightRange;
    }
    std::fill(log_weight_.get() + n, log_weight_.get() + data.pitch + kPadding, T(0));
    for (int64_t j = 0; j < n; ++j) {
      weight[j] /= weight_unit;
      log_weight_[j] = static_cast<T>(std::log2(weight[j]));  // NaN for a negative weight
    }
  }

  // Rows whose own key, which is left out, holds something that no product with 0 removes.
  void find_odd_own(const Problem& problem) {
    for (int64_t i = 0; i < problem.queries; ++i) {
      const int64_t own = own_place(i);
      bool finite = true;
      for (int64_t f = 0; f < data.features; ++f) finite &= std::isfinite(key_[f * data.pitch + own]);
      for (int64_t c = 0; c < data.channels; ++c) {
        finite &= std::isfinite(data.value_columns ? value_columns_[c * data.pitch + own]
                                                   : value_rows_[own * data.channel_pitch + c]);
      }
      if (!finite) odd[i] = true;
    }
  }

  bool finite_keys_ = true, finite_values_ = true, finite_weights_ = true, infinite_ = false;
  Buffer<T> key_, value_columns_, value_rows_, log_weight_, feature_scale_;
  const uint32_t* order_ = nullptr;
  const int64_t* own_ = nullptr;  // of the problem
  std::vector<uint32_t> place_;
};

}  // namespace nwfast
