// Any number of features and channels: what surrounds the tiles of tiled_kernels.h.
//
// Keys are packed by feature, scaled by powers of two (exactly) so that squared distances stay finite. float32 data
// is computed in double where a query lies so far from all keys that float32 scores would lose the differences
// between keys, and where key weights span more than float32 can hold beside the scores.

#include <algorithm>
#include <cmath>
#include <memory>

#include "drivers.h"

namespace nwfast {
namespace {

constexpr int64_t kRowTask = 16;  // rows of one parallel task

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double kLow = 0x1p-30, kHigh = 0x1p45;  // of scaled coordinates
};
template <>
struct Limits<double> {
  static constexpr double kLow = 0x1p-40, kHigh = 0x1p450;
};

// float32 scores are good to about 2^-24 times their size: beyond this size in base 2, differences get lost.
constexpr double kFarScore = 1024;
constexpr double kWeightRange = 60;  // log2 of the ratio of key weights

bool moves(const View& view, const Batch& batch) {
  for (int dim = 0; dim < batch.rank; ++dim) {
    if (view.batch_strides[dim] != 0) return true;
  }
  return false;
}

// Which parts of the value a pass reads.
enum class Values { kForward, kBackward };

template <typename T>
class TiledBatch {
 public:
  void prepare(const Problem& problem, int64_t b, Values layout, bool weigh) {
    const Batch& batch = problem.batch;
    TiledData<T>& d = data;
    d.n = problem.keys;
    d.features = problem.features;
    d.channels = problem.channels;
    d.pitch = padded(d.n);
    d.channel_pitch = (d.channels + 63) / 64 * 64;
    pack_coordinates(problem, batch, b);
    pack_values(problem, problem.value.offset(batch, b), layout);
    d.log_weight = nullptr;
    weight_unit = 1;
    if (problem.key_weight.data) {
      pack_weights(problem, problem.key_weight.offset(batch, b));
      if (weigh) d.log_weight = log_weight_.get();
    }
    excluded_.allocate(problem.exclude_self ? problem.queries : 0);
    for (int64_t i = 0; problem.exclude_self && i < problem.queries; ++i) excluded_[i] = i;
    excluded = problem.exclude_self ? excluded_.get() : nullptr;
  }

  TiledData<T> data;
  Buffer<T> query;         // (queries, features), scaled
  Buffer<double> w, unit;  // (features)
  Buffer<T> centre;        // (channels)
  Buffer<Range> values;    // (channels)
  Buffer<double> weight;   // (keys), divided by weight_unit; empty where there are none
  double weight_unit = 1;
  double score_unit = 1;  // what scores must be multiplied by where coordinates had to be shrunk
  const int64_t* excluded = nullptr;

 private:
  void pack_coordinates(const Problem& problem, const Batch& batch, int64_t b) {
    const int64_t features = problem.features, n = problem.keys, m = problem.queries;
    const int64_t key_offset = problem.key.offset(batch, b), query_offset = problem.query.offset(batch, b);
    w.allocate(features);
    unit.allocate(features);
    read(problem.w, problem.w.offset(batch, b), features, problem.w.column_stride, w.get());
    key_.allocate(features * data.pitch);
    query.allocate(m * features);
    Buffer<T> column(m);
    bool uniform = true;
    for (int64_t f = 1; f < features; ++f) uniform &= std::fabs(w[f]) == std::fabs(w[0]);
    Buffer<double> magnitude(features), ideal(features);
    double largest = 0;
    for (int64_t f = 0; f < features; ++f) {
      T* const key = key_.get() + f * data.pitch;
      read(problem.key, key_offset + f * problem.key.column_stride, n, problem.key.row_stride, key);
      for (int64_t j = n; j < data.pitch; ++j) key[j] = 0;
      read(problem.query, query_offset + f * problem.query.column_stride, m, problem.query.row_stride, column.get());
      for (int64_t i = 0; i < m; ++i) query[i * features + f] = column[i];
      Range range;
      range.include(key, n);
      range.include(column.get(), m);
      magnitude[f] = range.magnitude();
      largest = std::fmax(largest, magnitude[f]);
    }
    // The power of two nearest below each scale, unless coordinates would leave the range; one for all if all w agree.
    double highest = 0;
    for (int64_t f = 0; f < features; ++f) {
      const double scale = std::fabs(w[f]) * std::sqrt(kHalfLog2E);
      const double size = uniform ? largest : magnitude[f];
      ideal[f] = scale > 0 && std::isfinite(scale) ? std::ldexp(1.0, std::ilogb(scale)) : 1;
      if (size > 0 && ideal[f] * size < Limits<T>::kLow) {
        ideal[f] = std::ldexp(1.0, std::ilogb(Limits<T>::kLow) - std::ilogb(size));
      }
      highest = std::fmax(highest, ideal[f] * size);
    }
    const double shrink =
        highest > Limits<T>::kHigh ? std::ldexp(1.0, std::ilogb(Limits<T>::kHigh) - std::ilogb(highest)) : 1;
    score_unit = 1 / shrink / shrink;
    feature_scale_.allocate(features);
    for (int64_t f = 0; f < features; ++f) {
      // Where coordinates are shrunk, so are the scores: all their weight is on the nearest key either way.
      unit[f] = ideal[f] * shrink;
      const double scale = std::fabs(w[f]) * std::sqrt(kHalfLog2E) / ideal[f];
      feature_scale_[f] = static_cast<T>(std::isinf(scale) ? 1 : scale);
      T* const key = key_.get() + f * data.pitch;
      for (int64_t j = 0; j < n; ++j) key[j] = static_cast<T>(key[j] * unit[f]);
      for (int64_t i = 0; i < m; ++i) query[i * features + f] = static_cast<T>(query[i * features + f] * unit[f]);
    }
    data.key = key_.get();
    data.feature_scale = uniform ? nullptr : feature_scale_.get();
    data.score_scale = uniform ? feature_scale_[0] * feature_scale_[0] : T(1);
  }

  void pack_values(const Problem& problem, int64_t offset, Values layout) {
    const int64_t n = problem.keys, channels = problem.channels;
    const bool columns = layout == Values::kBackward || channels <= kMaxColumns;
    values.allocate(channels);
    centre.allocate(channels);
    Buffer<T> column(data.pitch);
    if (columns) {
      value_columns_.allocate(channels * data.pitch);
    } else {
      value_rows_.allocate(n * data.channel_pitch);
      std::fill(value_rows_.get(), value_rows_.get() + n * data.channel_pitch, T(0));
    }
    for (int64_t c = 0; c < channels; ++c) {
      T* const packed = columns ? value_columns_.get() + c * data.pitch : column.get();
      read(problem.value, offset + c * problem.value.column_stride, n, problem.value.row_stride, packed);
      values[c] = Range();
      values[c].include(packed, n);
      centre[c] = static_cast<T>(values[c].centre());
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
    log_weight_.allocate(n);
    read(problem.key_weight, offset, n, problem.key_weight.row_stride, weight.get());
    double high = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (weight[j] < INFINITY) high = std::fmax(high, weight[j]);
    }
    if (high > 0) weight_unit = std::ldexp(1.0, std::ilogb(high));
    for (int64_t j = 0; j < n; ++j) {
      weight[j] /= weight_unit;
      log_weight_[j] = static_cast<T>(std::log2(weight[j]));  // NaN for a negative weight
    }
  }

  Buffer<T> key_, value_columns_, value_rows_, log_weight_, feature_scale_;
  Buffer<int64_t> excluded_;
};

// Whether some query lies far outside the box of all keys, or weights span much: both passes decide alike.
bool needs_double(const Problem& problem) {
  const int64_t features = problem.features, n = problem.keys, m = problem.queries;
  Buffer<double> w(features), distance(m), column(std::max(n, m)), weight(n);
  const bool batched = moves(problem.key, problem.batch) || moves(problem.query, problem.batch) ||
                       moves(problem.w, problem.batch) ||
                       (problem.key_weight.data && moves(problem.key_weight, problem.batch));
  for (int64_t b = 0; b < (batched ? problem.batch.count : 1); ++b) {
    read(problem.w, problem.w.offset(problem.batch, b), features, problem.w.column_stride, w.get());
    std::fill(distance.get(), distance.get() + m, 0.0);
    for (int64_t f = 0; f < features; ++f) {
      const double scale = std::fabs(w[f]) * std::sqrt(kHalfLog2E);
      Range range;
      read(problem.key, problem.key.offset(problem.batch, b) + f * problem.key.column_stride, n, problem.key.row_stride,
           column.get());
      range.include(column.get(), n);
      read(problem.query, problem.query.offset(problem.batch, b) + f * problem.query.column_stride, m,
           problem.query.row_stride, column.get());
      for (int64_t i = 0; i < m; ++i) {
        const double outside = std::fmax(std::fmax(range.low - column[i], column[i] - range.high), 0.0) * scale;
        distance[i] += outside * outside;
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      if (distance[i] > kFarScore && distance[i] < INFINITY) return true;
    }
    if (!problem.key_weight.data) continue;
    read(problem.key_weight, problem.key_weight.offset(problem.batch, b), n, problem.key_weight.row_stride,
         weight.get());
    double low = INFINITY, high = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (!(weight[j] > 0 && weight[j] < INFINITY)) continue;
      low = std::fmin(low, weight[j]);
      high = std::fmax(high, weight[j]);
    }
    if (high > 0 && std::log2(high) - std::log2(low) > kWeightRange) return true;
  }
  return false;
}

template <typename T, typename R>
void forward_rows(const Problem& problem, const TiledBatch<T>& batch, const Kernels<T>& table, int64_t b, int64_t begin,
                  const ForwardResult<R>& result) {
  const int64_t channels = problem.channels;
  double total[kRowTask], shift[kRowTask];
  Buffer<double> values(kRowTask * channels);
  TiledRows<T> rows;
  rows.data = batch.data;
  rows.rows = std::min(problem.queries - begin, kRowTask);
  rows.query = batch.query.get() + begin * problem.features;
  rows.excluded = batch.excluded ? batch.excluded + begin : nullptr;
  rows.total = total;
  rows.shift = shift;
  rows.values = values.get();
  table.tiled_rows(rows);
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int64_t row = b * problem.queries + begin + i;
    const bool empty = total[i] == 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = values[i * channels + c] / total[i];
      const Range& range = batch.values[c];
      double out = static_cast<double>(batch.centre[c]) + mean;
      if (range.finite) out = std::fmin(std::fmax(out, range.low), range.high);
      result.out[row * channels + c] = static_cast<R>(empty ? NAN : std::isnan(mean) ? mean : out);
    }
    if (result.lse) {
      result.lse[row] = static_cast<R>(log_sum({shift[i] * batch.score_unit, total[i] * batch.weight_unit}));
    }
    if (result.state) {
      result.state[2 * row] = shift[i];
      result.state[2 * row + 1] = total[i] * batch.weight_unit;
    }
  }
}

// run(data, b, block) for all blocks of all batch elements b, with data = prepare(b).
template <typename T, typename Prepare, typename Run>
void over_batches(const Problem& problem, int64_t blocks, const Prepare& prepare, const Run& run) {
  const double work = static_cast<double>(problem.queries) * static_cast<double>(problem.keys) *
                      static_cast<double>(problem.features + problem.channels);
  if (problem.batch.count > blocks) {
    parallel_blocks(problem.batch.count, work * static_cast<double>(problem.batch.count) < kSerialPairs,
                    [&](int64_t b) {
                      auto data = prepare(b);
                      for (int64_t block = 0; block < blocks; ++block) run(*data, b, block);
                    });
    return;
  }
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    auto data = prepare(b);
    parallel_blocks(blocks, work < kSerialPairs, [&](int64_t block) { run(*data, b, block); });
  }
}

template <typename T, typename R>
void forward_in(const Problem& problem, const ForwardResult<R>& result) {
  const Kernels<T>& table = kernels<T>();
  const int64_t blocks = (problem.queries + kRowTask - 1) / kRowTask;
  over_batches<T>(
      problem, blocks,
      [&](int64_t b) {
        auto batch = std::make_unique<TiledBatch<T>>();
        batch->prepare(problem, b, Values::kForward, true);
        return batch;
      },
      [&](const TiledBatch<T>& batch, int64_t b, int64_t block) {
        forward_rows(problem, batch, table, b, block * kRowTask, result);
      });
}

// A batch element with what the backward pass needs of each row.
template <typename T>
struct BackwardBatch : TiledBatch<T> {
  Buffer<T> value_grad, offset_grad, inverse_total;
  Buffer<double> shift;

  template <typename R>
  void gather(const Problem& problem, const BackwardTask<R>& task, int64_t b) {
    const int64_t m = problem.queries, channels = problem.channels, pitch = this->data.channel_pitch;
    const int64_t grad = task.grad_out.offset(problem.batch, b);
    const int64_t grad_lse = task.grad_lse.data ? task.grad_lse.offset(problem.batch, b) : 0;
    value_grad.allocate(m * pitch);
    offset_grad.allocate(m);
    inverse_total.allocate(m);
    shift.allocate(m);
    Buffer<double> g(channels);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = b * m + i;
      const double total = task.state[2 * row + 1] / this->weight_unit;
      const bool empty = total == 0;
      read(task.grad_out, grad + i * task.grad_out.row_stride, channels, task.grad_out.column_stride, g.get());
      double g_lse = 0;
      T dot = 0;  // as the kernels sum it, so that it cancels where a row's weight is all on one key
      if (task.grad_lse.data) read(task.grad_lse, grad_lse + i * task.grad_lse.row_stride, 1, 0, &g_lse);
      for (int64_t c = 0; c < channels; ++c) {
        value_grad[i * pitch + c] = static_cast<T>(empty ? 0 : g[c]);
        const T mean = static_cast<T>(static_cast<T>(task.out[row * channels + c]) - this->centre[c]);
        dot = std::fma(mean, static_cast<T>(g[c]), dot);
      }
      for (int64_t c = channels; c < pitch; ++c) value_grad[i * pitch + c] = 0;
      offset_grad[i] = static_cast<T>(empty ? 0 : dot - g_lse);
      inverse_total[i] = static_cast<T>(empty ? 0 : 1 / total);
      shift[i] = task.state[2 * row];
    }
  }

  template <typename Task>
  void fill(const Problem& problem, int64_t begin, Task& rows) const {
    rows.data = this->data;
    rows.query = this->query.get() + begin * problem.features;
    rows.excluded = this->excluded ? this->excluded + begin : nullptr;
    rows.shift = shift.get() + begin;
    rows.inverse_total = inverse_total.get() + begin;
    rows.offset_grad = offset_grad.get() + begin;
    rows.value_grad = value_grad.get() + begin * this->data.channel_pitch;
  }
};

template <typename T, typename R>
void query_backward_in(const Problem& problem, const BackwardTask<R>& task) {
  const Kernels<T>& table = kernels<T>();
  const int64_t blocks = (problem.queries + kRowTask - 1) / kRowTask, features = problem.features;
  // One partial sum a block, added in order below.
  Buffer<double> partial(task.grad_w ? problem.batch.count * blocks * features : 0);
  over_batches<T>(
      problem, blocks,
      [&](int64_t b) {
        auto batch = std::make_unique<BackwardBatch<T>>();
        batch->prepare(problem, b, Values::kBackward, true);
        batch->gather(problem, task, b);
        return batch;
      },
      [&](const BackwardBatch<T>& batch, int64_t b, int64_t block) {
        const int64_t begin = block * kRowTask;
        Buffer<double> first(kRowTask * features), second(kRowTask * features);
        TiledQueryGrad<T> rows;
        rows.rows = std::min(problem.queries - begin, kRowTask);
        batch.fill(problem, begin, rows);
        rows.first = first.get();
        rows.second = second.get();
        table.tiled_query_grad(rows);
        for (int64_t f = 0; f < features; ++f) {
          const double w = batch.w[f], unit = batch.unit[f];
          double sum = 0;
          for (int64_t i = 0; i < rows.rows; ++i) {
            if (task.grad_query) {
              task.grad_query[(b * problem.queries + begin + i) * features + f] =
                  static_cast<R>(-w * (w / unit) * first[i * features + f]);
            }
            sum += second[i * features + f];
          }
          if (task.grad_w) partial[(b * blocks + block) * features + f] = -(w / unit) / unit * sum;
        }
      });
  if (!task.grad_w) return;
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    for (int64_t f = 0; f < features; ++f) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[(b * blocks + block) * features + f];
      task.grad_w[b * features + f] = sum;
    }
  }
}

template <typename T, typename R>
void key_backward_in(const Problem& problem, const BackwardTask<R>& task) {
  const Kernels<T>& table = kernels<T>();
  const int64_t blocks = (problem.keys + kKeyTile - 1) / kKeyTile;
  const int64_t features = problem.features, channels = problem.channels;
  over_batches<T>(
      problem, blocks,
      [&](int64_t b) {
        auto batch = std::make_unique<BackwardBatch<T>>();
        batch->prepare(problem, b, Values::kBackward, false);
        batch->gather(problem, task, b);
        return batch;
      },
      [&](const BackwardBatch<T>& batch, int64_t b, int64_t block) {
        Buffer<double> sum_value(kKeyTile * channels), sum_offset(kKeyTile * features), sum_weight(kKeyTile);
        TiledKeyGrad<T> keys;
        batch.fill(problem, 0, keys);
        keys.rows = problem.queries;
        keys.key_begin = block * kKeyTile;
        keys.key_end = std::min(problem.keys, keys.key_begin + kKeyTile);
        keys.sum_value = sum_value.get();
        keys.sum_weight = sum_weight.get();
        keys.sum_offset = sum_offset.get();
        table.tiled_key_grad(keys);
        for (int64_t j = keys.key_begin; j < keys.key_end; ++j) {
          const int64_t i = j - keys.key_begin, place = b * problem.keys + j;
          const double weight = problem.key_weight.data ? batch.weight[j] : 1;
          for (int64_t c = 0; task.grad_value && c < channels; ++c) {
            task.grad_value[place * channels + c] = static_cast<R>(weight * sum_value[i * channels + c]);
          }
          for (int64_t f = 0; task.grad_key && f < features; ++f) {
            const double w = batch.w[f];
            task.grad_key[place * features + f] =
                static_cast<R>(w * (w / batch.unit[f]) * weight * sum_offset[i * features + f]);
          }
          if (task.grad_key_weight) task.grad_key_weight[place] = static_cast<R>(sum_weight[i] / batch.weight_unit);
        }
      });
}

}  // namespace

template <>
void tiled_forward<double>(const Problem& problem, const ForwardResult<double>& result) {
  forward_in<double>(problem, result);
}
template <>
void tiled_query_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  query_backward_in<double>(problem, task);
}
template <>
void tiled_key_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  key_backward_in<double>(problem, task);
}

template <>
void tiled_forward<float>(const Problem& problem, const ForwardResult<float>& result) {
  needs_double(problem) ? forward_in<double>(problem, result) : forward_in<float>(problem, result);
}
template <>
void tiled_query_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  needs_double(problem) ? query_backward_in<double>(problem, task) : query_backward_in<float>(problem, task);
}
template <>
void tiled_key_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  needs_double(problem) ? key_backward_in<double>(problem, task) : key_backward_in<float>(problem, task);
}

}  // namespace nwfast
