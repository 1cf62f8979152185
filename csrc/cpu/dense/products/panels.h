// A batch element of many features as the products of kernels.h read it, and which of its rows they serve (trust.h).

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../tiled_batch.h"
#include "tasks.h"
#include "trust.h"

namespace nwfast {

constexpr int64_t kLeastProductFeatures = 16;  // from which on products are faster
constexpr int64_t kProductChunk = 192;         // rows of a backward pass at a time
constexpr int64_t kLeastProductRows = 96;      // that pay for the panels
constexpr int64_t kLeastProductColumns = 24;   // features and channels: the same of a forward pass alone

class ProductPanels {
 public:
  ProductData data{};

  // Null where products serve no row.
  static std::unique_ptr<ProductPanels> of(const TiledBatch<float>& batch, Values layout) {
    const int64_t features = batch.data.features;
    if (features < kLeastProductFeatures || !batch.usable || !batch.finite()) return nullptr;
    // Scales far below those of others (where a power of two was added), or of 0, are left to the differences.
    for (int64_t f = 0; f < features; ++f) {
      if (!(batch.feature_scale()[f] >= 0x1p-10f)) return nullptr;
    }
    std::unique_ptr<ProductPanels> panels(new ProductPanels(batch));
    panels->pack_keys(layout);
    panels->pack_values(layout);
    return panels;
  }

  double key(int64_t j, int64_t f) const {
    return static_cast<double>(key_lanes_[(j / kPanel * data.features + f) * kPanel + j % kPanel]);
  }
  double scale(int64_t f) const { return static_cast<double>(batch_.feature_scale()[f]); }

  // The coordinates of a row, to its place among those packed.
  void pack_row(const float* from, float* to) const {
    for (int64_t f = 0; f < data.features; ++f) to[f] = coordinate(from[f], f);
  }
  // What is subtracted from the scores of a packed row.
  double constant(const RowTrust& row) const { return row.square - charge_centre_; }
  RowTrust trust_of(const float* packed) const { return trust_.of_row(packed); }
  bool serves(const RowTrust& row, double shift) const { return trust_.serves(row, shift + lowest_weight_); }

  // (rows, count) of some distance, as panels of columns.
  static void pack_columns(const float* from, int64_t distance, int64_t rows, int64_t count, float* to) {
    std::fill_n(to, (count + kPanel - 1) / kPanel * rows * kPanel, 0.0f);
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t some = std::min(kPanel, count - c);
      for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * distance + c, some, to + (c * rows + i * kPanel));
    }
  }
  static int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

 private:
  explicit ProductPanels(const TiledBatch<float>& batch) : batch_(batch) {
    const TiledData<float>& d = batch.data;
    data.n = d.n;
    data.features = d.features;
    data.channels = d.channels;
    data.pitch = d.pitch;
  }

  // Of keys, the last of which may be empty.
  static int64_t key_panels(int64_t n) {
    return (panels_of(n) + kPanelsTogether - 1) / kPanelsTogether * kPanelsTogether;
  }
  static int64_t keys_of(int64_t panel, int64_t n) {
    return std::max<int64_t>(0, std::min(kPanel, n - panel * kPanel));
  }

  float coordinate(float x, int64_t f) const {
    return static_cast<float>((static_cast<double>(x) - centre_[f]) * scale(f));
  }

  void pack_keys(Values layout) {
    const int64_t n = data.n, features = data.features, panels = key_panels(n);
    centre_.allocate(features);
    key_lanes_.allocate(panels * features * kPanel);
    Buffer<double> square(n);
    for (int64_t f = 0; f < features; ++f) {
      const float* const key = batch_.data.key + f * batch_.data.pitch;
      double sums[4] = {};
      for (int64_t j = 0; j < n; ++j) sums[j % 4] += static_cast<double>(key[j]);
      centre_[f] = (sums[0] + sums[1] + sums[2] + sums[3]) / static_cast<double>(n);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t some = keys_of(p, n);
      double squares[kPanel] = {};
      for (int64_t f = 0; f < features; ++f) {
        const float* const key = batch_.data.key + f * batch_.data.pitch + p * kPanel;
        float* const lane = key_lanes_.get() + (p * features + f) * kPanel;
        const double centre = centre_[f], scale = this->scale(f);
        for (int64_t i = 0; i < some; ++i) lane[i] = static_cast<float>((static_cast<double>(key[i]) - centre) * scale);
        std::fill(lane + some, lane + kPanel, 0.0f);
        for (int64_t i = 0; i < kPanel; ++i) {
          squares[i] += static_cast<double>(lane[i]) * static_cast<double>(lane[i]);
        }
      }
      std::copy_n(squares, some, square.get() + p * kPanel);
    }
    data.key_lanes = key_lanes_.get();
    pack_charges(square.get());
    if (layout == Values::kForward) return;
    key_columns_.allocate(panels_of(features) * n * kPanel);
    columns_of(key_lanes_.get(), features, key_columns_.get());
    data.key_columns = key_columns_.get();
  }

  // Charges are kept about the median of |u|^2: that of most keys is close to it in high dimensions.
  void pack_charges(const double* square) {
    const int64_t n = data.n;
    std::vector<double> sorted(square, square + n);
    std::nth_element(sorted.begin(), sorted.begin() + n / 2, sorted.end());
    const double median = sorted[n / 2];
    charge_centre_ = -median;
    charge_.allocate(key_panels(n) * kPanel);
    for (int64_t j = 0; j < n; ++j) {
      const double weight = batch_.data.log_weight ? static_cast<double>(batch_.data.log_weight[j]) : 0;
      charge_[j] = static_cast<float>(median - square[j] + weight);
    }
    std::fill(charge_.get() + n, charge_.get() + key_panels(n) * kPanel, -INFINITY);
    data.key_charge = charge_.get();
    // Whether or not they are part of the scores: shifts know of weights.
    for (int64_t j = 0; batch_.weight.get() && j < n; ++j) {
      if (batch_.weight[j] > 0) lowest_weight_ = std::fmin(lowest_weight_, std::log2(batch_.weight[j]));
    }
    trust_.prepare(data, square, median);
  }

  // From panels of keys to panels of what there are `count` of for each key.
  void columns_of(const float* lanes, int64_t count, float* to) const {
    const int64_t n = data.n;
    if (count % kPanel) std::fill_n(to + count / kPanel * n * kPanel, n * kPanel, 0.0f);
    for (int64_t p = 0; p < panels_of(n); ++p) {
      const int64_t some = keys_of(p, n);
      for (int64_t c = 0; c < count; ++c) {
        const float* const lane = lanes + (p * count + c) * kPanel;
        float* const column = to + (c / kPanel * n + p * kPanel) * kPanel + c % kPanel;
        for (int64_t i = 0; i < some; ++i) column[i * kPanel] = lane[i];
      }
    }
  }

  void pack_values(Values layout) {
    const TiledData<float>& d = batch_.data;
    const int64_t n = data.n, channels = data.channels, panels = key_panels(n);
    if (layout == Values::kForward) {
      data.value_columns = d.value_columns;
      if (d.value_columns) return;
      values_.allocate(panels_of(channels) * n * kPanel);
      pack_columns(d.value_rows, d.channel_pitch, n, channels, values_.get());
      data.value_panels = values_.get();
      return;
    }
    values_.allocate(panels * channels * kPanel);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t some = keys_of(p, n);
      for (int64_t c = 0; c < channels; ++c) {
        float* const lane = values_.get() + (p * channels + c) * kPanel;
        std::copy_n(d.value_columns + c * d.pitch + p * kPanel, some, lane);
        std::fill(lane + some, lane + kPanel, 0.0f);
      }
    }
    data.value_lanes = values_.get();
  }

  const TiledBatch<float>& batch_;
  Buffer<double> centre_;
  Buffer<float> key_lanes_, charge_, key_columns_, values_;
  double charge_centre_ = 0, lowest_weight_ = 0;
  Trust trust_;
};

}  // namespace nwfast
