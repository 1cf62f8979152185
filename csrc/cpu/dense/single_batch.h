// One feature and one channel: a batch element read into packed arrays, scaled, centred and ordered for the windowed
// sums of single_rows.h.
//
// Coordinates are scaled by a power of two (exactly) so that neither their squares nor those of the scores overflow.
// Data beyond what that can do in float is computed in double, and beyond what it can do in double by kernels that
// bound their products ("wide"). Where it pays, keys and queries are sorted: then the nearest key is known by a merge,
// and blocks of queries visit only the keys of a window, outside which all weights together are below the rounding
// error.

#pragma once

#include <algorithm>
#include <cmath>

#include "../drivers.h"
#include "../order.h"
#include "mirrored.h"

namespace nwfast {

constexpr double kScaledReach = 3;     // float32 coordinates within (-3, 3) units of the score are scaled beforehand
constexpr int64_t kScaledQueries = 8;  // for fewer it does not pay
constexpr int64_t kWindowQueries = 8;  // from so many queries on, windows are worth a check whether keys are sorted
constexpr int64_t kSortQueries = 128;  // from so many queries on, sorting the keys pays

// What a batch element is read for. Gradients by coordinates are sums of offsets, which must be right even where they
// are small beside the extent of the data.
enum class Purpose { kValues, kQueryGradients, kKeyGradients };

template <typename T>
struct SingleLimits;
template <>
struct SingleLimits<float> {
  static constexpr double kLow = 0x1p-30, kHigh = 0x1p50;  // of the scale, where coordinates lie within (-2^9, 2^9)
  static constexpr double kNone = 0x1p-100;
  static constexpr double kNegligible = kNegligibleFloat;
  static constexpr double kWeightRange = 60;  // log2 of the ratio of key weights that fits beside scores
  static constexpr double kMostValue = 0x1p100;
  static constexpr double kLeastCharge = -60;  // log2 of the least product of the size of values and a weight
  static constexpr double kTieScore = 0x1p18;  // from here on, the scores of keys at one rounded distance differ
};
template <>
struct SingleLimits<double> {
  static constexpr double kLow = 0x1p-40, kHigh = 0x1p480, kNone = 0x1p-600;
  static constexpr double kNegligible = kNegligibleDouble;
  static constexpr double kWeightRange = 900;
  static constexpr double kMostValue = INFINITY;
  static constexpr double kLeastCharge = -INFINITY;
  static constexpr double kTieScore = 0x1p46;
};

// One batch element in packed form, in the order in which it is computed.
template <typename T>
class SingleBatch {
 public:
  // False where the data is beyond what T can hold, and is to be computed in double.
  bool prepare(const Problem& problem, int64_t b, Purpose purpose) {
    queries_ = problem.queries;
    keys_ = problem.keys;
    exclude_ = problem.exclude_self;
    weighted_ = problem.key_weight.data != nullptr;
    weight_span_ = 0;
    key_.allocate(keys_);
    query_.allocate(queries_);
    value_.allocate(keys_);
    read(problem.key, problem.key.offset(problem.batch, b), keys_, problem.key.row_stride, key_.get());
    read(problem.query, problem.query.offset(problem.batch, b), queries_, problem.query.row_stride, query_.get());
    read(problem.value, problem.value.offset(problem.batch, b), keys_, problem.value.row_stride, value_.get());
    read(problem.w, problem.w.offset(problem.batch, b), 1, 0, &w);
    if (!std::isfinite(w)) w = NAN;  // there is no limit: all results are NaN
    if (!scale_coordinates(purpose) || !centre_values()) return false;
    if (weighted_ || absent_) read_weights(problem, b);
    if (sizeof(T) == 4 && (weight_span_ > SingleLimits<T>::kWeightRange || !holds_charges())) return false;
    order();
    if (weighted_) {
      value_charge_.allocate(keys_);
      for (int64_t j = 0; j < keys_; ++j) value_charge_[j] = weight_[j] * value_[j];
    }
    if (sorted_ && weighted_) link_positive();
    windowed_ = sorted_ && finite_;
    if (windowed_) {
      negligible_ =
          SingleLimits<T>::kNegligible + std::log2(static_cast<double>(keys_)) + (weighted_ ? weight_span_ : 0);
    }
    return true;
  }

  // The nearest keys and the window of the rows of a block; `rows` gets the block's part of each array. Where keys are
  // not sorted, the nearest keys cost a scan.
  void locate(const Kernels<T>& kernels, int64_t block, bool scan, SingleRows<T>& rows, T* nearest) const {
    const int64_t first = block * kRowBlock;
    rows.key = key_.get();
    rows.total_charge = weighted_ ? weight_.get() : nullptr;
    rows.value_charge = weighted_ ? value_charge_.get() : value_.get();
    rows.n = keys_;
    rows.window_begin = 0;
    rows.window_end = keys_;
    rows.scale = static_cast<T>(scale_);
    rows.wide = wide_;
    rows.rows = std::min(queries_ - first, kRowBlock);
    rows.query = query_.get() + first;
    rows.nearest = nearest;
    rows.excluded = exclude_ ? excluded_.get() + first : nullptr;
    if (scaled_) {
      std::copy(rows.query, rows.query + rows.rows, nearest);  // at no distance: scores are taken as they are
      return;
    }
    if (!sorted_) {
      if (scan) {
        kernels.single_nearest(rows, nearest);
        for (int64_t i = 0; i < rows.rows; ++i) settle_ties(rows, i, nearest[i]);
      }
      return;
    }
    double low = INFINITY, high = -INFINITY;
    bool regular = windowed_;
    int64_t place = 0;
    for (int64_t i = 0; i < rows.rows; ++i) {
      const T x = rows.query[i];
      place = upper_bound(x, i > 0 ? place : -1);
      nearest[i] = nearest_of(x, place, rows.excluded ? rows.excluded[i] : -2);
      const double distance = (static_cast<double>(x) - nearest[i]) * scale_;
      const double radius = std::sqrt(distance * distance + negligible_) / scale_ * (1 + 1e-6);
      regular &= std::isfinite(x);
      low = std::min(low, x - radius);
      high = std::max(high, x + radius);
    }
    if (!regular) return;
    const T* const begin = key_.get();
    const T* const end = begin + keys_;
    const auto below = [](T k, double x) { return k < x; };
    const auto above = [](double x, T k) { return x < k; };  // keys at `high` belong: it may be x itself, rounded
    rows.window_begin = (std::lower_bound(begin, end, low, below) - begin) / kPadding * kPadding;
    rows.window_end = std::min(keys_, padded(std::upper_bound(begin, end, high, above) - begin));
  }

  bool scaled() const { return scaled_; }
  bool wide() const { return wide_; }
  // Whether a product with 0 may be NaN.
  bool finite() const { return finite_ && queries_finite_; }
  // Queries at infinity, which have no nearest key, and keys there, which count for none: coordinates stand in for
  // them.
  bool lost(int64_t i) const { return lost_ && lost_rows_[original_row(i)]; }
  bool absent(int64_t j) const { return absent_ && absent_keys_[original_key(j)]; }

  int64_t original_row(int64_t i) const { return row_order_.get() && rows_moved_ ? row_order_[i] : i; }
  int64_t original_key(int64_t j) const { return keys_moved_ ? key_order_[j] : j; }
  // 1 for all keys where there are no weights; scaled by a power of two, weight_unit.
  double weight(int64_t j) const { return weighted_ ? static_cast<double>(weight_[j]) : 1; }

  const T* key() const { return key_.get(); }
  const T* query() const { return query_.get(); }
  const T* value() const { return value_.get(); }
  const int64_t* excluded() const { return exclude_ ? excluded_.get() : nullptr; }
  double scale() const { return scale_; }

  double w = 0;
  double unit = 1;         // coordinates are multiplied by it
  double weight_unit = 1;  // weights are divided by it
  double centre = 0;       // subtracted from values
  Range values;

 private:
  // By a power of two, which may itself be beyond what T holds.
  static void multiply(T* x, int64_t n, double factor) {
    if (factor == 1) return;
    if (factor > 0x1p-100 && factor < 0x1p100) {
      const T narrow = static_cast<T>(factor);
      for (int64_t i = 0; i < n; ++i) x[i] *= narrow;
    } else {
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(x[i] * factor);
    }
  }

  bool scale_coordinates(Purpose purpose) {
    Range range;
    range.include(key_.get(), keys_);
    finite_ = range.finite;
    absent_ = lost_ = wide_ = scaled_ = false;
    if (!finite_ && std::isfinite(w)) replace_infinite_keys();
    finite_ &= std::isfinite(w);
    Range rows;
    rows.include(query_.get(), queries_);
    queries_finite_ = rows.finite;
    if (!queries_finite_ && std::isfinite(w)) replace_infinite_queries();
    range.low = std::fmin(range.low, rows.low);
    range.high = std::fmax(range.high, rows.high);
    const double magnitude = range.magnitude();
    // Within these bounds no product overflows, and the usual case saves a pass.
    unit = magnitude > 0 && (magnitude < 0x1p-8 || magnitude > 0x1p8)
               ? std::ldexp(1.0, std::min(1000, -std::ilogb(magnitude)))
               : 1;
    scale_ = std::fabs(w) * std::sqrt(kHalfLog2E) / unit;
    if (scale_ > SingleLimits<T>::kHigh) {
      if (sizeof(T) == 4) return false;
      wide_ = true;  // as they are: what is small beside the largest coordinate may still be large beside 1 / w
      unit = magnitude > 0x1p1019 ? 0x1p-4 : 1;
      scale_ = std::fmin(std::fabs(w) * std::sqrt(kHalfLog2E) / unit, std::numeric_limits<double>::max());
    }
    multiply(key_.get(), keys_, unit);
    multiply(query_.get(), queries_, unit);
    if (wide_) return true;
    // Below, all weights are 1 to rounding and tangents would underflow. Average pooling has scores that underflow to
    // 0.
    if (scale_ < SingleLimits<T>::kLow) scale_ = w == 0 ? SingleLimits<T>::kNone : SingleLimits<T>::kLow;
    const double half = (range.high - range.low) / 2 * scale_ * unit;
    if (sizeof(T) == 4 && queries_ >= kScaledQueries && finite() && half > 0x1p-3 && half < kScaledReach &&
        (purpose == Purpose::kValues || spread(key_.get(), keys_, range)) &&
        (purpose != Purpose::kKeyGradients || spread(query_.get(), queries_, range))) {
      scale_fully(range);
    }
    return true;
  }

  // Whether points have most others well away from them, in units of the whole range: by a sample.
  bool spread(const T* x, int64_t n, const Range& range) const {
    constexpr int kSample = 64, kBins = 16;
    if (n < kSample) return false;
    int counts[kBins] = {};
    const double low = range.low * unit, bins = kBins / ((range.high - range.low) * unit);
    for (int i = 0; i < kSample; ++i) {
      const int bin = static_cast<int>((x[i * (n - 1) / (kSample - 1)] - low) * bins);
      ++counts[std::min(std::max(bin, 0), kBins - 1)];
    }
    bool crowded = false;
    for (int bin = 1; bin < kBins; ++bin) crowded |= counts[bin - 1] + counts[bin] > kSample / 2;
    return !crowded;
  }

  // Keys at infinity count for nothing where w is not 0 (and are NaN in units of the score where it is).
  void replace_infinite_keys() {
    absent_keys_.allocate(keys_);
    T place = 0;
    for (int64_t j = 0; j < keys_; ++j) place = std::isfinite(key_[j]) ? key_[j] : place;
    finite_ = true;
    for (int64_t j = 0; j < keys_; ++j) {
      absent_keys_[j] = std::isinf(key_[j]) && w != 0;
      absent_ |= absent_keys_[j];
      if (std::isinf(key_[j])) key_[j] = absent_keys_[j] ? place : std::numeric_limits<T>::quiet_NaN();
      finite_ &= std::isfinite(key_[j]);
    }
  }

  void replace_infinite_queries() {
    lost_rows_.allocate(queries_);
    queries_finite_ = true;
    for (int64_t i = 0; i < queries_; ++i) {
      lost_rows_[i] = std::isinf(query_[i]);
      lost_ |= lost_rows_[i];
      if (lost_rows_[i]) query_[i] = std::isfinite(key_[0]) ? key_[0] : T(0);
      queries_finite_ &= std::isfinite(query_[i]);
    }
  }

  // Wide bandwidths: coordinates in units of the score, about the middle of the data. Rounding them costs as much as
  // rounding the product of w and a difference does, and saves each pair that product. Nor is an order of the keys or
  // the nearest key of use: no window is narrower than the data, and no score is below -(2 kScaledReach)^2.
  void scale_fully(const Range& range) {
    const double factor = scale_, middle = (range.low / 2 + range.high / 2) * unit;
    for (int64_t j = 0; j < keys_; ++j) key_[j] = static_cast<T>((key_[j] - middle) * factor);
    for (int64_t i = 0; i < queries_; ++i) query_[i] = static_cast<T>((query_[i] - middle) * factor);
    unit *= factor;
    scale_ = 1;
    scaled_ = true;
  }

  bool centre_values() {
    values = Range();
    values.include(value_.get(), keys_);
    finite_ &= values.finite;
    if (values.magnitude() > SingleLimits<T>::kMostValue) return false;
    const T middle = static_cast<T>(values.centre());
    centre = static_cast<double>(middle);
    for (int64_t j = 0; j < keys_; ++j) value_[j] -= middle;
    return true;
  }

  // Whether what is left of the range below values times weights is enough for their products with small scores.
  bool holds_charges() const {
    const double size = values.magnitude();
    return size == 0 || std::log2(size) - weight_span_ > SingleLimits<T>::kLeastCharge;
  }

  void read_weights(const Problem& problem, int64_t b) {
    weight_.allocate(keys_);
    if (weighted_) {
      read(problem.key_weight, problem.key_weight.offset(problem.batch, b), keys_, problem.key_weight.row_stride,
           weight_.get());
    } else {
      std::fill(weight_.get(), weight_.get() + keys_, T(1));
      weighted_ = true;
    }
    for (int64_t j = 0; absent_ && j < keys_; ++j) {
      if (absent_keys_[j] && weight_[j] >= 0) weight_[j] = 0;
    }
    double low = INFINITY, high = 0;
    for (int64_t j = 0; j < keys_; ++j) {
      if (weight_[j] < 0) weight_[j] = std::numeric_limits<T>::quiet_NaN();
      finite_ &= std::isfinite(weight_[j]);
      if (!(weight_[j] > 0) || !std::isfinite(weight_[j])) continue;
      low = std::fmin(low, weight_[j]);
      high = std::fmax(high, weight_[j]);
    }
    int exponent = 0;
    if (high > 0) std::frexp(high, &exponent);
    weight_unit = std::ldexp(1.0, exponent);
    weight_span_ = high > 0 ? std::log2(high) - std::log2(low) : 0;
    for (int64_t j = 0; j < keys_; ++j) weight_[j] = static_cast<T>(weight_[j] / weight_unit);
  }

  template <typename V>
  static void permute(V* x, const uint32_t* order, int64_t n, Buffer<V>& scratch) {
    scratch.allocate(n);
    for (int64_t i = 0; i < n; ++i) scratch[i] = x[order[i]];
    std::memcpy(x, scratch.get(), static_cast<size_t>(n) * sizeof(V));
  }

  void order() {
    sorted_ = !scaled_ && queries_ >= kWindowQueries && ascending(key_.get(), keys_);
    keys_moved_ = rows_moved_ = false;
    constexpr int64_t kMost = int64_t{1} << 32;
    Buffer<T> scratch;
    if (!sorted_ && !scaled_ && finite_ && queries_ >= kSortQueries && keys_ > kPadding && keys_ < kMost) {
      key_order_.allocate(keys_);
      sort_order(key_.get(), keys_, key_order_.get());
      permute(key_.get(), key_order_.get(), keys_, scratch);
      permute(value_.get(), key_order_.get(), keys_, scratch);
      if (weighted_) permute(weight_.get(), key_order_.get(), keys_, scratch);
      sorted_ = keys_moved_ = true;
    }
    if (sorted_ && queries_ >= kSortQueries && queries_ < kMost && !ascending(query_.get(), queries_)) {
      bool ordered = true;
      for (int64_t i = 0; i < queries_; ++i) ordered &= query_[i] == query_[i];
      if (ordered) {
        row_order_.allocate(queries_);
        sort_order(query_.get(), queries_, row_order_.get());
        permute(query_.get(), row_order_.get(), queries_, scratch);
        rows_moved_ = true;
      }
    }
    if (!exclude_) return;
    excluded_.allocate(queries_);
    Buffer<int64_t> place(keys_);
    for (int64_t j = 0; j < keys_; ++j) place[original_key(j)] = j;
    for (int64_t i = 0; i < queries_; ++i) excluded_[i] = place[original_row(i)];
  }

  // For each key the nearest places, up to and from it, of keys with a weight.
  void link_positive() {
    before_.allocate(keys_);
    after_.allocate(keys_);
    int64_t last = -1;
    for (int64_t j = 0; j < keys_; ++j) before_[j] = last = weight_[j] == 0 ? last : j;
    last = keys_;
    for (int64_t j = keys_ - 1; j >= 0; --j) after_[j] = last = weight_[j] == 0 ? last : j;
  }

  // Among keys at one rounded distance from a far row, the nearest: the scan may have taken another.
  void settle_ties(const SingleRows<T>& rows, int64_t i, T& nearest) const {
    const T x = rows.query[i], distance = std::fabs(x - nearest);
    const double offset = static_cast<double>(distance) * scale_;
    if (!(offset * offset > SingleLimits<T>::kTieScore)) return;
    for (int64_t j = 0; j < keys_; ++j) {
      if (std::fabs(x - key_[j]) != distance || (weighted_ && weight_[j] == 0)) continue;
      if ((!rows.excluded || rows.excluded[i] != j) && nearer(x, key_[j], nearest)) nearest = key_[j];
    }
  }

  // The first place whose key is greater than x; hint is the answer for a smaller x, or -1.
  int64_t upper_bound(T x, int64_t hint) const {
    const T* const begin = key_.get();
    if (hint >= 0 && (hint == 0 || begin[hint - 1] <= x)) {
      int64_t place = hint;
      for (int step = 0; step < 16; ++step, ++place) {
        if (place == keys_ || begin[place] > x) return place;
      }
    }
    return std::upper_bound(begin, begin + keys_, x) - begin;
  }

  T nearest_of(T x, int64_t place, int64_t excluded) const {
    const auto before = [&](int64_t j) { return weighted_ && j >= 0 ? before_[j] : j; };
    const auto after = [&](int64_t j) { return weighted_ && j < keys_ ? after_[j] : j; };
    int64_t left = before(place - 1), right = after(place);
    if (left == excluded) left = before(left - 1);
    if (right == excluded) right = after(right + 1);
    if (left < 0 && right >= keys_) return key_[0];  // no key is left: all sums will be 0
    if (left < 0) return key_[right];
    if (right >= keys_) return key_[left];
    return nearer(x, key_[right], key_[left]) ? key_[right] : key_[left];
  }

  int64_t queries_ = 0, keys_ = 0;
  bool exclude_ = false, weighted_ = false, finite_ = true, sorted_ = false, windowed_ = false;
  bool keys_moved_ = false, rows_moved_ = false, scaled_ = false, wide_ = false;
  bool queries_finite_ = true, absent_ = false, lost_ = false;
  double scale_ = 1, weight_span_ = 0, negligible_ = 0;
  Buffer<T> key_, query_, value_, value_charge_, weight_;
  Buffer<uint32_t> key_order_, row_order_;
  Buffer<int64_t> excluded_, before_, after_;
  Buffer<uint8_t> absent_keys_, lost_rows_;
};

}  // namespace nwfast
