// One batch element of the grid method: its points sorted into cells, with what the kernels read of them, and the rows
// that are summed over all keys instead.

#pragma once

#include "../dense/tiled.h"
#include "points.h"

namespace nwfast {
namespace grid {

constexpr double kLeastOthers = 0.25;  // of what a row's own key added to an expansion, to be taken out of it
constexpr double kMostCoordinate = 1e100, kLeastSpread = 1e-150, kMostScale = 1e60;

template <typename R>
struct Element {
  Plan plan;
  Points<R> keys, queries;
  Problem sorted;                // one batch element: keys and queries in their new order
  TiledBatch<R> batch;           // the same as direct sums read it
  Buffer<int64_t> own;           // (queries) the places of the keys that rows leave out, -1 for none
  Buffer<int64_t> key_place;     // (all keys) by the caller's number, where rows leave keys out
  std::vector<int64_t> outside;  // rows outside of the grid, by the caller's numbers
  double mass = 0;               // of all keys, in units of batch.weight_unit
  bool anywhere = false;         // whether the grid is for queries that are not there yet, as many as keys
  bool moments = false;          // whether covariances of keys are asked for, see Plan; set before it is prepared
  double key_low[kAxes], key_high[kAxes];

  // False where the dense drivers have to serve: numbers that are not finite, or scales beyond what cells can hold;
  // with `moments` also keys that do not extend over a bandwidth, whose covariances would lose digits.
  bool prepare(const Problem& problem, int64_t b, int order, Values layout, bool weigh, bool serial) {
    const int64_t n = problem.keys, m = problem.queries;
    const int features = static_cast<int>(problem.features);
    constexpr int64_t kMostPoints = int64_t{1} << 31;
    if (n >= kMostPoints || m >= kMostPoints || problem.channels > 4096) return false;
    w_.allocate(features);
    read(problem.w, problem.w.offset(problem.batch, b), features, problem.w.column_stride, w_.get());
    Buffer<R> key(features * n), query(features * m);
    Extent extent;
    plan.log_span = log_span_of<R>(n);
    extent.features = features;
    extent.keys = n;
    extent.queries = anywhere ? n : m;
    extent.order = order;
    extent.columns = static_cast<int>(problem.channels) + 1;
    extent.expand = anywhere;
    extent.moments = moments;
    for (int f = 0; f < features; ++f) {
      extent.scale[f] = std::fabs(w_[f]);
      if (!(extent.scale[f] < kMostScale)) return false;
      Range keys_range, queries_range;
      read_column(problem.key, problem.key.offset(problem.batch, b), n, f, serial, key.get() + f * n, keys_range);
      if (!keys_range.finite || keys_range.magnitude() > kMostCoordinate) return false;
      read_column(problem.query, problem.query.offset(problem.batch, b), m, f, serial, query.get() + f * m,
                  queries_range);
      if (anywhere) {
        queries_range.low = -kMostCoordinate;
        queries_range.high = kMostCoordinate;
      }
      extent.key_low[f] = extent.low[f] = key_low[f] = keys_range.low;
      extent.key_high[f] = extent.high[f] = key_high[f] = keys_range.high;
      if (moments && !(extent.scale[f] * (keys_range.high / 2 - keys_range.low / 2) > 1)) return false;
      if (queries_range.high >= queries_range.low) {
        // Queries further away than this from all keys are not summed in cells.
        const double far = plan.radius_at(kLevelDistance[kLevels - 1]) / extent.scale[f];
        extent.low[f] = std::fmin(keys_range.low, std::fmax(queries_range.low, keys_range.low - far));
        extent.high[f] = std::fmax(keys_range.high, std::fmin(queries_range.high, keys_range.high + far));
        extent.low[f] = std::fmax(extent.low[f], -kMostCoordinate);
        extent.high[f] = std::fmin(extent.high[f], kMostCoordinate);
      }
      const double spread = extent.high[f] - extent.low[f];
      if (spread > 0 && spread < kLeastSpread) return false;
      const int64_t samples = std::min<int64_t>(n, 1024);
      for (int64_t i = 0; i < samples; ++i) extent.sample[f].push_back(key[f * n + i * n / samples]);
      const int64_t query_samples = std::min<int64_t>(m, 256);  // not at the same places: they may be the keys
      for (int64_t i = 0; i < query_samples; ++i) {
        extent.query_sample[f].push_back(query[f * m + (2 * i + 1) * m / (2 * query_samples)]);
      }
    }
    if (!make_plan<R>(extent, plan)) return false;
    std::vector<int64_t> none;
    keys.sort(plan, key.get(), n, false, serial, none);
    queries.sort(plan, query.get(), m, true, serial, outside);
    return none.empty() && read_rest(problem, b, layout, weigh, serial);
  }

  double weight(int64_t j) const { return batch.weight.get() && weighted_ ? batch.weight[j] : 1; }
  double value(int64_t j, int64_t c) const {
    return static_cast<double>(value_[c * keys.n + j]) - static_cast<double>(batch.centre[c]);
  }
  // The weight of a key, and that times its values, as charges.
  void load(int64_t begin, int64_t n, double* charge, int64_t pitch) const {
    for (int64_t j = 0; j < n; ++j) charge[j] = weight(begin + j);
    for (int64_t c = 0; c < sorted.channels; ++c) {
      const double centre = batch.centre[c];
      const R* const from = value_.get() + c * keys.n + begin;
      for (int64_t j = 0; j < n; ++j) charge[(c + 1) * pitch + j] = (static_cast<double>(from[j]) - centre) * charge[j];
    }
  }
  // log2 of the least total, in units of batch.weight_unit, of which what lies beyond a radius is a small enough share:
  // so much charge, and all of it beyond a larger radius.
  double least_total(double radius) const {
    return std::log2(mass / Accuracy<R>::kBeyond) - radius * radius * kHalfLog2E;
  }
  double least_total(double radius, double charge, double larger) const {
    return std::log2((charge * Plan::beyond(radius) + mass * Plan::beyond(larger)) / Accuracy<R>::kBeyond);
  }
  // The weights of some keys, in units of batch.weight_unit.
  double weight_of(int64_t begin, int64_t end) const {
    return weighted_ ? weight_before_[end] - weight_before_[begin] : static_cast<double>(end - begin);
  }
  // |x_i - u_j|^2 in bandwidths.
  double square(int64_t i, int64_t j) const {
    double sum = 0;
    for (int f = 0; f < plan.features; ++f) {
      const double x = queries.columns[f * queries.pitch + i], u = keys.columns[f * keys.pitch + j];
      sum += (x - u) * w_[f] * ((x - u) * w_[f]);
    }
    return sum;
  }
  // Whether a key's charge is more than those of the keys beside it together. Where it is not, a small sum without it
  // is one of terms that cancel, which no other way of adding them makes better.
  bool stands_out(int64_t j, int64_t c) const {
    const std::vector<Box>& boxes = keys.boxes;
    const auto after = std::upper_bound(boxes.begin(), boxes.end(), j,
                                        [](int64_t place, const Box& box) { return place < box.begin; });
    const Box& box = after[-1];
    constexpr int64_t kBeside = 4;
    const double own = std::fabs(weight(j) * value(j, c));
    double beside = 0;
    for (int64_t k = std::max(box.begin, j - kBeside); k <= j + kBeside && k < box.end; ++k) {
      if (k != j) beside += std::fabs(weight(k) * value(k, c));
    }
    return !(beside >= own);
  }

  // Takes a row's own key, of these charges, out of its sums, (slots, columns) as GridEvaluate has them up to
  // derivatives of this order. False where that was much of them.
  bool subtract_own(int64_t i, const double* charge, int columns, int order, double* row) const {
    const int64_t j = own[i];
    const double kernel = std::exp(-square(i, j) / 2);
    if (!(row[0] - charge[0] * kernel >= kLeastOthers * charge[0] * kernel)) return false;
    for (int64_t c = 0; c < sorted.channels; ++c) {
      const double taken = charge[c + 1] * kernel, rest = row[c + 1] - taken;
      if (!(linear::kMostOwnValue * std::fabs(rest) >= std::fabs(taken)) && stands_out(j, c)) return false;
    }
    for (int column = 0; column < columns; ++column) row[column] -= charge[column] * kernel;
    for (int a = 0; a < kAxes && order > 0; ++a) {
      const Axis& axis = plan.axis[a];
      if (axis.feature < 0) continue;
      const double x = queries.axis(plan, a)[i], u = keys.axis(plan, a)[j], z = (x - u) * axis.scale;
      const double first = kernel * z * axis.half, second = kernel * (z * z - 1) * axis.half * axis.half;
      for (int column = 0; column < columns; ++column) {
        row[(1 + a) * columns + column] += charge[column] * first;
        if (order == 2) row[(4 + a) * columns + column] -= charge[column] * second;
      }
    }
    return true;
  }

  double w(int64_t f) const { return w_[f]; }

 private:
  static void read_column(const View& view, int64_t offset, int64_t n, int f, bool serial, R* to, Range& range) {
    constexpr int64_t kPart = 65536;
    std::vector<Range> ranges((n + kPart - 1) / kPart);
    parallel_blocks(static_cast<int64_t>(ranges.size()), serial, [&](int64_t part) {
      const int64_t begin = part * kPart, count = std::min(kPart, n - begin);
      read(view, offset + f * view.column_stride + begin * view.row_stride, count, view.row_stride, to + begin);
      ranges[part].include(to + begin, count);
    });
    for (const Range& part : ranges) {
      range.low = std::fmin(range.low, part.low);
      range.high = std::fmax(range.high, part.high);
      range.finite &= part.finite;
    }
  }

  // Values and weights in the order of keys; the sorted problem, and what follows from it.
  bool read_rest(const Problem& problem, int64_t b, Values layout, bool weigh, bool serial) {
    const int64_t n = keys.n, channels = problem.channels;
    value_.allocate(n * channels);
    const int64_t offset = problem.value.offset(problem.batch, b);
    constexpr int64_t kPart = 16384;
    const int64_t parts = (n + kPart - 1) / kPart;
    std::vector<char> finite(parts, 1);
    parallel_blocks(parts, serial, [&](int64_t part) {
      const int64_t begin = part * kPart, count = std::min(kPart, n - begin);
      for (int64_t c = 0; c < channels; ++c) {
        R* const to = value_.get() + c * n + begin;
        gather(problem.value, offset + c * problem.value.column_stride, keys.order.get() + begin, count,
               problem.value.row_stride, to);
        for (int64_t j = 0; j < count; ++j) finite[part] &= std::isfinite(to[j]);
      }
    });
    if (std::find(finite.begin(), finite.end(), 0) != finite.end()) return false;
    sorted = Problem();
    sorted.batch.rank = 0;
    sorted.batch.count = 1;
    sorted.queries = queries.n;
    sorted.keys = n;
    sorted.features = problem.features;
    sorted.channels = channels;
    sorted.exclude_self = problem.exclude_self;
    sorted.query = array_view(queries.columns.get(), 1, queries.pitch);
    sorted.key = array_view(keys.columns.get(), 1, keys.pitch);
    sorted.value = array_view(value_.get(), 1, n);
    sorted.w = array_view(w_.get(), 0, 1);
    mass = static_cast<double>(n);
    if (problem.key_weight.data) {
      weighted_ = true;
      weight_.allocate(n);
      gather(problem.key_weight, problem.key_weight.offset(problem.batch, b), keys.order.get(), n,
             problem.key_weight.row_stride, weight_.get());
      bool valid = true, any = false;
      for (int64_t j = 0; j < n; ++j) {
        valid &= weight_[j] >= 0 && weight_[j] < 1e290 && (weight_[j] == 0 || weight_[j] > 1e-290);
        any |= weight_[j] > 0;
      }
      if (!valid || !any) return false;
      sorted.key_weight = array_view(weight_.get(), 1, 0);
    }
    if (problem.exclude_self) {
      key_place.allocate(n);
      own.allocate(queries.n);
      for (int64_t j = 0; j < n; ++j) key_place[keys.order[j]] = j;
      for (int64_t i = 0; i < queries.n; ++i) own[i] = key_place[queries.order[i]];
      sorted.own = own.get();
    }
    batch.prepare(sorted, 0, layout, weigh, nullptr);
    if (!batch.usable) return false;
    if (weighted_) {
      weight_before_.allocate(n + 1);
      weight_before_[0] = 0;
      for (int64_t j = 0; j < n; ++j) weight_before_[j + 1] = weight_before_[j] + batch.weight[j];
      mass = weight_before_[n];
    }
    return true;
  }

  Buffer<double> w_, weight_, weight_before_;
  Buffer<R> value_;  // (channels, keys)
  bool weighted_ = false;
};

// One row of results: `total` and `values` (with `stride`, relative to `centre`) are sums relative to 2^-shift, of
// weights in units of `unit`; results lie between the least value and the largest.
template <typename R>
void write_row(const ForwardResult<R>& result, int64_t row, int64_t channels, const R* centre, const Range* range,
               double shift, double total, double unit, const double* values, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    const double out = static_cast<double>(centre[c]) + values[c * stride] / total;
    result.out[row * channels + c] = static_cast<R>(std::fmin(std::fmax(out, range[c].low), range[c].high));
  }
  if (result.lse) result.lse[row] = static_cast<R>(log_sum({shift, total * unit}));
  if (!result.state) return;
  result.state[2 * row] = shift;
  result.state[2 * row + 1] = total * unit;
}

// A part of an element's rows as a problem of its own, over all keys.
template <typename R>
struct LeftOverRows {
  std::vector<int64_t> rows;  // by the caller's numbers
  Problem problem;

  LeftOverRows(const Element<R>& element, const Problem& from, int64_t b, std::vector<int64_t> some)
      : rows(std::move(some)) {
    const int64_t count = static_cast<int64_t>(rows.size());
    problem = element.sorted;
    problem.queries = count;
    query_.allocate(count * from.features);
    const int64_t offset = from.query.offset(from.batch, b);
    for (int64_t i = 0; i < count; ++i) {
      read(from.query, offset + rows[i] * from.query.row_stride, from.features, from.query.column_stride,
           query_.get() + i * from.features);
    }
    problem.query = array_view(query_.get(), from.features, 1);
    if (!from.exclude_self) return;
    own_.allocate(count);
    for (int64_t i = 0; i < count; ++i) own_[i] = element.key_place[rows[i]];
    problem.own = own_.get();
  }

 private:
  Buffer<R> query_;
  Buffer<int64_t> own_;
};

}  // namespace grid
}  // namespace nwfast
