// One batch element of the linear method: sorted coordinates, charges, and the way back to the caller's order.
// Sorted contiguous input is used where it lies; all else is packed.

#pragma once

#include "../order.h"
#include "plan.h"

namespace nwfast {
namespace linear {

template <typename R>
bool native(const View& view) {
  return view.dtype == (sizeof(R) == 4 ? Dtype::kFloat : Dtype::kDouble);
}

template <typename R>
const R* pointer(const View& view, int64_t offset) {
  return static_cast<const R*>(view.data) + offset;
}

// Range of n numbers, and whether they ascend. Ascending numbers are finite where the first and the last are.
template <typename R>
Range scan(const R* x, int64_t n, bool serial, bool* in_order) {
  constexpr int64_t kPart = 65536;
  const int64_t parts = (n + kPart - 1) / kPart;
  std::vector<Range> ranges(parts);
  std::vector<char> ordered(parts);
  parallel_blocks(parts, serial, [&](int64_t part) {
    const int64_t begin = part * kPart, end = std::min(n, begin + kPart), first = begin > 0 ? begin - 1 : 0;
    ordered[part] = in_order && ascending(x + first, end - first);
    if (ordered[part]) {
      ranges[part].include(x + begin, 1);
      ranges[part].include(x + end - 1, 1);
      return;
    }
    for (int64_t i = begin; i < end; i += kHeldPoints) ranges[part].include(x + i, std::min(kHeldPoints, end - i));
  });
  Range all;
  if (in_order) *in_order = true;
  for (int64_t part = 0; part < parts; ++part) {
    all.low = std::fmin(all.low, ranges[part].low);
    all.high = std::fmax(all.high, ranges[part].high);
    all.finite &= ranges[part].finite;
    if (in_order) *in_order &= ordered[part] != 0;
  }
  return all;
}

template <typename R>
class Data {
 public:
  // False where the dense drivers have to serve: numbers that are not finite, or scales beyond what boxes can hold.
  bool prepare(const Problem& problem, int64_t b, bool serial) {
    serial_ = serial;
    channels = static_cast<int>(problem.channels);
    keys = problem.keys;
    queries = problem.queries;
    double w_value = 0;
    read(problem.w, problem.w.offset(problem.batch, b), 1, 0, &w_value);
    w = w_value;
    if (!(std::fabs(w) < kMostScale) || channels > 4096 || queries >= kMostPoints || keys >= kMostPoints) return false;
    bool keys_ascend = false;
    key = line(problem.key, problem.key.offset(problem.batch, b), keys, key_);
    key_range = scan(key, keys, serial, &keys_ascend);
    if (!key_range.finite || !read_weights(problem, b)) return false;
    read_values(problem, b);
    order_keys(keys_ascend);
    if (key_range.magnitude() > kMostCoordinate || !centre_values()) return false;
    if (!prepare_queries(problem.query, problem.query.offset(problem.batch, b), queries, serial)) return false;
    const double magnitude = std::fmax(key_range.magnitude(), query_range.magnitude());
    if (magnitude > 0 && magnitude < kLeastCoordinate) return false;
    exclude = problem.exclude_self;
    if (exclude && (keys_moved || rows_moved)) {
      Buffer<int64_t> place(problem.keys);
      for (int64_t j = 0; j < problem.keys; ++j) place[j] = -1;
      for (int64_t j = 0; j < keys; ++j) place[original_key(j)] = j;
      excluded_.allocate(queries);
      excluding_.allocate(keys);
      for (int64_t i = 0; i < queries; ++i) {
        excluded_[i] = place[original_row(i)];
        if (excluded_[i] >= 0) excluding_[excluded_[i]] = i;
      }
    }
    return true;
  }

  // Sorts the queries, if need be. Keys are in place.
  bool prepare_queries(const View& view, int64_t offset, int64_t n, bool serial) {
    serial_ = serial;
    queries = n;
    bool ascend = false;
    query = line(view, offset, queries, query_);
    query_range = scan(query, queries, serial, &ascend);
    if (!query_range.finite) ascend = replace_bad_queries();
    if (query_range.magnitude() > kMostCoordinate || queries >= kMostPoints) return false;
    if (ascend) return true;
    row_order.allocate(queries);
    Buffer<R> sorted(queries);
    sort_numbers(query, queries, serial, row_order.get(), sorted.get());
    rows_moved = true;
    query_.swap(sorted);
    query = query_.get();
    return true;
  }

  int64_t original_row(int64_t i) const { return rows_moved ? static_cast<int64_t>(row_order[i]) : i; }
  int64_t original_key(int64_t j) const { return keys_moved ? static_cast<int64_t>(key_order[j]) : j; }
  // The place of the key that row i leaves out, or -1.
  int64_t excluded(int64_t i) const { return !exclude ? -1 : keys_moved || rows_moved ? excluded_[i] : i; }
  // Whether row i leaves out key i, and they are equal.
  bool leaves_out_queries() const { return exclude && !keys_moved && !rows_moved && query == key; }
  const int64_t* excluded_places() const { return excluded_.get(); }  // of all rows, where keys or rows have moved
  // The row that leaves key j out.
  int64_t excluding(int64_t j) const { return keys_moved || rows_moved ? excluding_[j] : j; }
  double weight_of(int64_t j) const { return weight ? static_cast<double>(weight[j]) * weight_factor : 1; }
  double value_of(int64_t j, int c) const {
    return static_cast<double>(value[j * row_stride + c * column_stride]) - centre[c];
  }
  // Charges of keys: the weight, and the weight times the centred value of each channel.
  void load(int64_t begin, int64_t n, double* charge, int64_t pitch) const {
    for (int64_t j = 0; j < n; ++j) charge[j] = weight_of(begin + j);
    for (int c = 0; c < channels; ++c) {
      double* const column = charge + (c + 1) * pitch;
      const R* const from = value + begin * row_stride + c * column_stride;
      const double middle = centre[c];
      if (row_stride == 1) {
        for (int64_t j = 0; j < n; ++j) column[j] = static_cast<double>(from[j]) - middle;
      } else {
        for (int64_t j = 0; j < n; ++j) column[j] = static_cast<double>(from[j * row_stride]) - middle;
      }
      if (weight) {
        for (int64_t j = 0; j < n; ++j) column[j] *= charge[j];
      }
    }
  }
  Extent extent(int columns, bool offsets, bool scores) const {
    Extent result;
    result.scale = std::fabs(w);
    result.magnitude = std::fmax(key_range.magnitude(), query_range.magnitude());
    result.spread = std::fmax(key_range.high, query_range.high) - std::fmin(key_range.low, query_range.low);
    if (queries == 0) result.spread = key_range.high - key_range.low;
    result.keys = keys;
    result.queries = queries;
    result.columns = columns;
    result.offsets = offsets;
    result.scores = scores;
    const int64_t samples = std::min<int64_t>(256, keys - 1);
    for (int64_t i = 0; i < samples; ++i) {
      result.gaps.push_back(static_cast<double>(key[(i + 1) * (keys - 1) / samples]) -
                            static_cast<double>(key[i * (keys - 1) / samples]));
    }
    return result;
  }

  int channels = 1;
  int64_t keys = 0, queries = 0;  // keys that have a weight
  double w = 0;
  const R *key = nullptr, *query = nullptr;  // ascending
  const R* value = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  std::vector<double> centre;  // by channel, subtracted from values
  std::vector<Range> values;
  const R* weight = nullptr;  // null where all are 1
  double weight_factor = 1;   // brings the largest weight to 1, about; a power of two
  double weight_span = 0;     // log of the ratio of the largest weight to the smallest
  Range key_range, query_range;
  bool exclude = false, keys_moved = false, rows_moved = false;
  Buffer<uint32_t> key_order, row_order;
  std::vector<uint32_t> dropped;                 // keys of weight 0 in ascending order, as the caller numbers them
  std::vector<int64_t> nan_rows, infinite_rows;  // whose query is not a finite number, as the caller numbers them

 private:
  static constexpr int64_t kMostPoints = int64_t{1} << 32;

  const R* line(const View& view, int64_t offset, int64_t n, Buffer<R>& packed) {
    if (native<R>(view) && (view.row_stride == 1 || n == 1)) return pointer<R>(view, offset);
    packed.allocate(n);
    read(view, offset, n, view.row_stride, packed.get());
    return packed.get();
  }

  template <typename P>
  void permute(const P*& x, const uint32_t* order, int64_t n, Buffer<P>& packed) {
    Buffer<P> sorted(n);
    parallel_blocks((n + kChunk - 1) / kChunk, serial_, [&](int64_t chunk) {
      const int64_t end = std::min(n, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; ++i) sorted[i] = x[order[i]];
    });
    packed.swap(sorted);
    x = packed.get();
  }

  bool replace_bad_queries() {
    if (query_.get() != query) {
      query_.allocate(queries);
      std::copy(query, query + queries, query_.get());
      query = query_.get();
    }
    query_range = Range();
    nan_rows.clear();
    infinite_rows.clear();
    R last = keys > 0 ? key[0] : R(0);
    bool in_order = true;
    for (int64_t i = 0; i < queries; ++i) {
      if (std::isfinite(query_[i])) {
        in_order &= i == 0 || last <= query_[i];
        last = query_[i];
      } else {
        (query_[i] != query_[i] ? nan_rows : infinite_rows).push_back(i);
        query_[i] = last;
        in_order &= i > 0;
      }
    }
    query_range = scan(query_.get(), queries, serial_, nullptr);
    return in_order;
  }

  bool read_weights(const Problem& problem, int64_t b) {
    if (!problem.key_weight.data) return true;
    weight = line(problem.key_weight, problem.key_weight.offset(problem.batch, b), keys, weight_);
    const Range range = scan(weight, keys, serial_, nullptr);
    if (!range.finite || range.low < 0) return false;
    double low = range.low;
    if (low == 0) {
      low = range.high;
      for (int64_t j = 0; j < keys; ++j) low = weight[j] > 0 ? std::fmin(low, weight[j]) : low;
    }
    some_zero_ = range.low == 0;
    if (!(range.high > 0)) return true;                                       // no key is left
    if (range.high < kLeastWeight || range.high > kMostWeight) return false;  // the factor or totals would overflow
    int exponent;
    std::frexp(range.high, &exponent);
    weight_factor = std::ldexp(1.0, -exponent);
    weight_span = std::log(range.high) - std::log(low);
    all_one_ = range.low == 1 && range.high == 1;
    return weight_span < 600;
  }

  void read_values(const Problem& problem, int64_t b) {
    const int64_t offset = problem.value.offset(problem.batch, b);
    if (native<R>(problem.value)) {
      value = pointer<R>(problem.value, offset);
      row_stride = problem.value.row_stride;
      column_stride = problem.value.column_stride;
    } else {
      value_.allocate(keys * channels);
      for (int64_t j = 0; j < keys && channels > 1; ++j) {
        read(problem.value, offset + j * problem.value.row_stride, channels, problem.value.column_stride,
             value_.get() + j * channels);
      }
      if (channels == 1) read(problem.value, offset, keys, problem.value.row_stride, value_.get());
      value = value_.get();
      row_stride = channels;
      column_stride = 1;
    }
  }

  // Of the keys that count. False if their values are not finite, or too large.
  bool centre_values() {
    centre.assign(channels, 0);
    values.assign(channels, Range());
    bool suits = true;
    for (int c = 0; c < channels; ++c) {
      if (row_stride == 1) {
        values[c] = scan(value + c * column_stride, keys, serial_, nullptr);
      } else {
        R block[kHeldPoints];
        for (int64_t begin = 0; begin < keys; begin += kHeldPoints) {
          const int64_t n = std::min(kHeldPoints, keys - begin);
          for (int64_t j = 0; j < n; ++j) block[j] = value[(begin + j) * row_stride + c * column_stride];
          values[c].include(block, n);
        }
      }
      suits &= values[c].finite && values[c].magnitude() <= kMostValue;
      centre[c] = static_cast<double>(static_cast<R>(values[c].centre()));
    }
    return suits;
  }

  // Sorts keys, if need be, and drops those of weight 0.
  void order_keys(bool ascend) {
    const bool drop = weight && some_zero_;
    keys_moved = !ascend || drop;
    if (keys_moved) {
      key_order.allocate(keys);
      if (ascend) {
        for (int64_t j = 0; j < keys; ++j) key_order[j] = static_cast<uint32_t>(j);
      } else {
        Buffer<R> sorted(keys);
        sort_numbers(key, keys, serial_, key_order.get(), sorted.get());
        key_.swap(sorted);
        key = key_.get();
      }
      if (drop) {
        const int64_t all = keys;
        R* const packed = ascend ? nullptr : key_.get();
        keys = 0;
        dropped.clear();
        for (int64_t j = 0; j < all; ++j) {
          if (weight[key_order[j]] > 0) {
            if (packed) packed[keys] = packed[j];
            key_order[keys++] = key_order[j];
          } else {
            dropped.push_back(key_order[j]);
          }
        }
      }
      if (ascend) permute(key, key_order.get(), keys, key_);
      if (weight) permute(weight, key_order.get(), keys, weight_);
      Buffer<R> sorted(keys * channels);
      const R* const from = value;
      parallel_blocks((keys + kChunk - 1) / kChunk, serial_, [&](int64_t chunk) {
        const int64_t end = std::min(keys, (chunk + 1) * kChunk);
        for (int64_t j = chunk * kChunk; j < end; ++j) {
          for (int c = 0; c < channels; ++c) {
            sorted[j * channels + c] = from[key_order[j] * row_stride + c * column_stride];
          }
        }
      });
      value_.swap(sorted);
      value = value_.get();
      row_stride = channels;
      column_stride = 1;
    }
    if (weight && all_one_) weight = nullptr, weight_factor = 1;
    if (keys > 0) {
      key_range.low = static_cast<double>(key[0]);
      key_range.high = static_cast<double>(key[keys - 1]);
    }
  }

  bool serial_ = false, some_zero_ = false, all_one_ = false;
  Buffer<R> key_, query_, value_, weight_;
  Buffer<int64_t> excluded_, excluding_;
};

}  // namespace linear
}  // namespace nwfast
