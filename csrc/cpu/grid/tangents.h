// Derivatives of a row's averages by its query, of all channels together: with the covariance under the row's weights,
//   d E[v] / d q_f = w_f^2 Cov(k_f, v)
// Of a box's series they are its derivatives; where keys are met one by one, further columns of value give them: places
// of keys, and those times the values, all from their means in the window, so that little cancels in
// E[k v] - E[k] E[v].

#pragma once

#include "direct.h"

namespace nwfast {
namespace grid {

// The keys of a window with such columns: values, then for each feature the places and their products with the values.
template <typename R>
class WindowProducts {
 public:
  TiledData<R> data;

  explicit WindowProducts(const TiledData<R>& window) : data(window), channels_(window.channels) {
    data.channels = channels_ + data.features * (1 + channels_);
    columns_.allocate(data.channels * data.pitch);
    mean_.resize(channels_);
    for (int64_t c = 0; c < channels_; ++c) mean_[c] = centre(window.value_columns + c * data.pitch, column(c));
    for (int64_t f = 0; f < data.features; ++f) {
      R* const place = column(first_of(f));
      centre(window.key + f * data.pitch, place);
      for (int64_t c = 0; c < channels_; ++c) {
        const R* const value = column(c);
        R* const product = column(first_of(f) + 1 + c);
        for (int64_t j = 0; j < data.pitch; ++j) product[j] = place[j] * value[j];
      }
    }
    data.value_columns = columns_.get();
  }

  // From the sums of a row over its columns: those of values, as they are without products, in their place; and
  // covariances (features, channels) of packed keys and values.
  void separate(double total, double* sums, double* covariance) const {
    for (int64_t f = 0; f < data.features; ++f) {
      const double* const products = sums + first_of(f);
      for (int64_t c = 0; c < channels_; ++c) {
        covariance[f * channels_ + c] = (products[1 + c] - products[0] * (sums[c] / total)) / total;
      }
    }
    for (int64_t c = 0; c < channels_; ++c) sums[c] += mean_[c] * total;
  }

 private:
  R* column(int64_t c) const { return columns_.get() + c * data.pitch; }
  int64_t first_of(int64_t f) const { return channels_ + f * (1 + channels_); }

  // Numbers less their mean, which is returned; 0 behind the last.
  double centre(const R* from, R* to) const {
    double sum = 0;
    for (int64_t j = 0; j < data.n; ++j) sum += static_cast<double>(from[j]);
    const R mean = static_cast<R>(sum / static_cast<double>(data.n));
    for (int64_t j = 0; j < data.n; ++j) to[j] = from[j] - mean;
    std::fill(to + data.n, to + data.pitch, R(0));
    return static_cast<double>(mean);
  }

  const int64_t channels_;
  Buffer<R> columns_;
  std::vector<double> mean_;  // of values
};

}  // namespace grid
}  // namespace nwfast
