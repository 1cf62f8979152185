// One batch element of the linear method: sorted coordinates, charges, and the way back to the caller's order.
// Sorted contiguous input is used where it lies; all else is packed.

#pragma once

#include <memory>

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

// Copies share what was packed and sorted.
template <typename R>
class Data {
 public:
  // False where the dense drivers have to serve: numbers that are not finite, or scales beyond what boxes can hold.
  bool prepare(const Problem& problem, int64_t b, bool serial) {
    serial_ = serial;
    channels = static_cast<int>(problem.channels);
    keys = problem.keys;
    queries = problem.queries;
    if (!take_scale(problem, b) || channels > 4096 || queries >= kMostPoints || keys >= kMostPoints) return false;
    bool keys_ascend = false;
    const int64_t key_at = problem.key.offset(problem.batch, b), query_at = problem.query.offset(problem.batch, b);
    key = line(problem.key, key_at, keys, held_->key);
    key_range = scan(key, keys, serial, &keys_ascend);
    if (!key_range.finite || !read_weights(problem, b)) return false;
    read_values(problem, b);
    order_keys(keys_ascend);
    if (key_range.magnitude() > kMostCoordinate || !centre_values()) return false;
    if (keys_moved && keys == problem.keys && same(problem.query, query_at, problem.key, key_at)) {
      query = key;  // sorted already
      query_range = key_range;
      row_order = key_order;
      rows_moved = matched = true;
    } else {
      if (!prepare_queries(problem.query, query_at, queries, serial)) return false;
      matched = !keys_moved && !rows_moved;
    }
    const double magnitude = std::fmax(key_range.magnitude(), query_range.magnitude());
    if (magnitude > 0 && magnitude < kLeastCoordinate) return false;
    exclude = problem.exclude_self;
    if (exclude && !matched) {
      Buffer<int64_t> place(problem.keys), &excluded = held_->excluded, &excluding = held_->excluding;
      for (int64_t j = 0; j < problem.keys; ++j) place[j] = -1;
      for (int64_t j = 0; j < keys; ++j) place[original_key(j)] = j;
      excluded.allocate(queries);
      excluding.allocate(keys);
      for (int64_t i = 0; i < queries; ++i) {
        excluded[i] = place[original_row(i)];
        if (excluded[i] >= 0) excluding[excluded[i]] = i;
      }
    }
    return true;
  }

  // The w of a batch element; false if it is beyond what boxes can hold.
  bool take_scale(const Problem& problem, int64_t b) {
    read(problem.w, problem.w.offset(problem.batch, b), 1, 0, &w);
    return std::fabs(w) < kMostScale;
  }

  // Sorts the queries, if need be. Keys are in place.
  bool prepare_queries(const View& view, int64_t offset, int64_t n, bool serial) {
    serial_ = serial;
    queries = n;
    bool ascend = false;
    query = line(view, offset, queries, held_->query);
    query_range = scan(query, queries, serial, &ascend);
    if (!query_range.finite) ascend = replace_bad_queries();
    if (query_range.magnitude() > kMostCoordinate || queries >= kMostPoints) return false;
    if (ascend) return true;
    held_->row_order.allocate(queries);
    Buffer<R> sorted(queries);
    sort_numbers(query, queries, serial, held_->row_order.get(), sorted.get());
    rows_moved = true;
    held_->query.swap(sorted);
    query = held_->query.get();
    row_order = held_->row_order.get();
    return true;
  }

  int64_t original_row(int64_t i) const { return rows_moved ? static_cast<int64_t>(row_order[i]) : i; }
  int64_t original_key(int64_t j) const { return keys_moved ? static_cast<int64_t>(key_order[j]) : j; }
  // The place of the key that row i leaves out, or -1.
  int64_t excluded(int64_t i) const { return !exclude ? -1 : matched ? i : held_->excluded[i]; }
  // Whether row i leaves out key i, and they are equal.
  bool leaves_out_queries() const { return exclude && matched && query == key; }
  // Those places of all rows; null where row i leaves out key i, or none.
  const int64_t* excluded_places() const { return exclude && !matched ? held_->excluded.get() : nullptr; }
  // The row that leaves key j out.
  int64_t excluding(int64_t j) const { return matched ? j : held_->excluding[j]; }
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
  bool matched = false;                                       // query i and key i are of one number of the caller's
  const uint32_t *key_order = nullptr, *row_order = nullptr;  // of the keys and queries that moved
  std::vector<uint32_t> dropped;                 // keys of weight 0 in ascending order, as the caller numbers them
  std::vector<int64_t> nan_rows, infinite_rows;  // whose query is not a finite number, as the caller numbers them

 private:
  static constexpr int64_t kMostPoints = int64_t{1} << 32;

  static bool same(const View& a, int64_t a_offset, const View& b, int64_t b_offset) {
    return a.data == b.data && a.dtype == b.dtype && a_offset == b_offset && a.row_stride == b.row_stride;
  }

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
    Buffer<R>& packed = held_->query;
    if (packed.get() != query) {
      packed.allocate(queries);
      std::copy(query, query + queries, packed.get());
      query = packed.get();
    }
    query_range = Range();
    nan_rows.clear();
    infinite_rows.clear();
    R last = keys > 0 ? key[0] : R(0);
    bool in_order = true;
    for (int64_t i = 0; i < queries; ++i) {
      if (std::isfinite(packed[i])) {
        in_order &= i == 0 || last <= packed[i];
        last = packed[i];
      } else {
        (packed[i] != packed[i] ? nan_rows : infinite_rows).push_back(i);
        packed[i] = last;
        in_order &= i > 0;
      }
    }
    query_range = scan(packed.get(), queries, serial_, nullptr);
    return in_order;
  }

  bool read_weights(const Problem& problem, int64_t b) {
    if (!problem.key_weight.data) return true;
    weight = line(problem.key_weight, problem.key_weight.offset(problem.batch, b), keys, held_->weight);
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
      Buffer<R>& packed = held_->value;
      packed.allocate(keys * channels);
      for (int64_t j = 0; j < keys && channels > 1; ++j) {
        read(problem.value, offset + j * problem.value.row_stride, channels, problem.value.column_stride,
             packed.get() + j * channels);
      }
      if (channels == 1) read(problem.value, offset, keys, problem.value.row_stride, packed.get());
      value = packed.get();
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
      Buffer<uint32_t>& order = held_->key_order;
      order.allocate(keys);
      if (ascend) {
        for (int64_t j = 0; j < keys; ++j) order[j] = static_cast<uint32_t>(j);
      } else {
        Buffer<R> sorted(keys);
        sort_numbers(key, keys, serial_, order.get(), sorted.get());
        held_->key.swap(sorted);
        key = held_->key.get();
      }
      if (drop) {
        const int64_t all = keys;
        R* const packed = ascend ? nullptr : held_->key.get();
        keys = 0;
        dropped.clear();
        for (int64_t j = 0; j < all; ++j) {
          if (weight[order[j]] > 0) {
            if (packed) packed[keys] = packed[j];
            order[keys++] = order[j];
          } else {
            dropped.push_back(order[j]);
          }
        }
      }
      if (ascend) permute(key, order.get(), keys, held_->key);
      if (weight) permute(weight, order.get(), keys, held_->weight);
      Buffer<R> sorted(keys * channels);
      const R* const from = value;
      parallel_blocks((keys + kChunk - 1) / kChunk, serial_, [&](int64_t chunk) {
        const int64_t end = std::min(keys, (chunk + 1) * kChunk);
        for (int64_t j = chunk * kChunk; j < end; ++j) {
          for (int c = 0; c < channels; ++c) {
            sorted[j * channels + c] = from[order[j] * row_stride + c * column_stride];
          }
        }
      });
      held_->value.swap(sorted);
      value = held_->value.get();
      key_order = order.get();
      row_stride = channels;
      column_stride = 1;
    }
    if (weight && all_one_) weight = nullptr, weight_factor = 1;
    if (keys > 0) {
      key_range.low = static_cast<double>(key[0]);
      key_range.high = static_cast<double>(key[keys - 1]);
    }
  }

  struct Held {
    Buffer<R> key, query, value, weight;
    Buffer<uint32_t> key_order, row_order;
    Buffer<int64_t> excluded, excluding;
  };

  bool serial_ = false, some_zero_ = false, all_one_ = false;
  std::shared_ptr<Held> held_ = std::make_shared<Held>();
};

// The data of batch elements; sorted once where they differ in w alone.
template <typename R>
class BatchData {
 public:
  explicit BatchData(const Problem& problem) : problem_(problem) {
    for (int dim = 0; dim < problem.batch.rank; ++dim) {
      for (const View* view : {&problem.query, &problem.key, &problem.value, &problem.key_weight}) {
        one_ &= problem.batch.sizes[dim] == 1 || !view->data || view->batch_strides[dim] == 0;
      }
    }
    one_ &= problem.batch.count > 1;
    if (one_) served_ = data_.prepare(problem, 0, problem.queries + problem.keys < kChunk);
  }
  // False where the dense drivers have to serve.
  bool prepare(int64_t b, bool serial, Data<R>& data) const {
    if (!one_) return data.prepare(problem_, b, serial);
    data = data_;
    return served_ && data.take_scale(problem_, b);
  }

 private:
  const Problem& problem_;
  bool one_ = true, served_ = false;
  Data<R> data_;
};

}  // namespace linear
}  // namespace nwfast
