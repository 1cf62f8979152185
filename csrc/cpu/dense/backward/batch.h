// The rows of a batch element on the way back: which arithmetic serves each, and what the tiles read of it.

#pragma once

#include "../../row_grad.h"
#include "../products/panels.h"
#include "../tiled.h"

namespace nwfast {
namespace backward {

// What the rows of a batch element are differentiated in.
struct Parts {
  Rows narrow, wide, far;
  Rows nan;  // rows that are NaN as a whole and matter: so are all gradients that they add to
};

// The gradients of one row's results.
struct RowGrad {
  RowGrad(int64_t channels) : out(channels) {}

  template <typename R>
  void read_from(const Problem& problem, const BackwardTask<R>& task, int64_t b, int64_t i) {
    size = read_row_grad(problem, task, b, i, out.get(), lse);
  }

  Buffer<double> out;
  double lse = 0, size = 0;
};

template <typename T>
struct BackwardBatch : TiledBatch<T> {
  Buffer<T> row_query, value_grad, lse_grad, offset_grad, inverse_total;
  Buffer<double> shift;
  Buffer<int64_t> row_of, own;  // the rows, and the places of their own keys
  int64_t rows = 0;
  int64_t served = 0;                     // the first of them, which products serve
  std::unique_ptr<ProductPanels> panels;  // of the keys, where there are any

  template <typename R>
  void gather(const Problem& problem, const BackwardTask<R>& task, int64_t b, const Rows& some) {
    const int64_t m = problem.queries, channels = problem.channels, features = problem.features;
    const int64_t pitch = this->data.channel_pitch;
    rows = static_cast<int64_t>(some.size());
    row_query.allocate(rows * features);
    value_grad.allocate((rows + kRowPadding) * pitch);
    std::fill_n(value_grad.get() + rows * pitch, kRowPadding * pitch, 0.0f);
    offset_grad.allocate(rows);
    lse_grad.allocate(rows);
    inverse_total.allocate(rows);
    shift.allocate(rows);
    row_of.allocate(rows);
    own.allocate(rows);
    RowGrad grad(channels);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = b * m + some[i];
      grad.read_from(problem, task, b, some[i]);
      T dot = 0;  // as the kernels sum it, so that it cancels where a row's weight is all on one key
      for (int64_t c = 0; c < channels; ++c) {
        value_grad[i * pitch + c] = static_cast<T>(grad.out[c]);
        const T mean = static_cast<T>(static_cast<T>(task.out[row * channels + c]) - this->centre[c]);
        dot = multiply_add(mean, static_cast<T>(grad.out[c]), dot);
      }
      for (int64_t c = channels; c < pitch; ++c) value_grad[i * pitch + c] = 0;
      std::copy_n(this->query.get() + some[i] * features, features, &row_query[i * features]);
      lse_grad[i] = static_cast<T>(grad.lse);
      offset_grad[i] = dot;
      inverse_total[i] = static_cast<T>(this->weight_unit / task.state[2 * row + 1]);
      shift[i] = task.state[2 * row];
      row_of[i] = some[i];
      own[i] = this->own_place(some[i]);
    }
  }

  template <typename Task>
  void fill(const Problem& problem, int64_t begin, Task& task) const {
    task.data = this->data;
    task.query = row_query.get() + begin * problem.features;
    task.excluded = problem.exclude_self ? own.get() + begin : nullptr;
    task.shift = shift.get() + begin;
    task.inverse_total = inverse_total.get() + begin;
    task.offset_grad = offset_grad.get() + begin;
    task.lse_grad = lse_grad.get() + begin;
    task.value_grad = value_grad.get() + begin * this->data.channel_pitch;
  }

  // The offsets of the rows of a task, from outputs that are not rounded to the dtype of the results: moments about a
  // far query multiply that rounding by the square of its distance.
  static void exact_offsets(const TiledQueryGrad<T>& of, T* offsets) {
    const int64_t channels = of.data.channels;
    double total[kMostRowTask], row_shift[kMostRowTask];
    Buffer<double> sums(of.rows * channels);
    TiledRows<T> task;
    task.data = of.data;
    task.rows = of.rows;
    task.query = of.query;
    task.excluded = of.excluded;
    task.total = total;
    task.shift = row_shift;
    task.values = sums.get();
    kernels<T>().tiled_rows(task);
    for (int64_t i = 0; i < of.rows; ++i) {
      const T* const grad = of.value_grad + i * of.data.channel_pitch;
      T dot = 0;
      for (int64_t c = 0; c < channels; ++c) {
        dot = multiply_add(static_cast<T>(sums[i * channels + c] / total[i]), grad[c], dot);
      }
      offsets[i] = dot;
    }
  }
};

// What a row's or a block's sum of second moments, in units of packed coordinates, adds to the gradient of w.
inline double w_gradient(double w, double unit, double sum) {
  int exponent;  // of w, apart: neither w nor the square of the unit need leave a number in between
  const double fraction = std::frexp(w, &exponent);
  return w == 0 ? sum * 0 : -std::ldexp(fraction * sum, exponent - 2 * std::ilogb(unit));
}

// Sums over rows for the keys of a batch element: of p_ij g_i, of u_ij and of u_ij times the derivatives of scores by
// the key's coordinates; the last two for a unit of key weight or for all of it.
template <typename Sum>
struct KeySums {
  std::vector<Sum> value, weight, key;

  KeySums(const Problem& problem)
      : value(problem.keys * problem.channels), weight(problem.keys), key(problem.keys * problem.features) {}

  // What the kernels give for the keys at the places [begin, end); null where it is not wanted.
  template <typename T>
  void add(const Problem& problem, const BackwardBatch<T>& batch, int64_t begin, int64_t end, const double* sum_value,
           const double* sum_weight, const double* sum_offset) {
    const int64_t features = problem.features, channels = problem.channels;
    for (int64_t place = begin; place < end; ++place) {
      const int64_t i = place - begin, j = batch.original_key(place);
      const double charge = problem.key_weight.data ? batch.weight[place] : 1;
      weight[j] += sum_weight[i] / batch.weight_unit;
      if (charge == 0) continue;  // no product of 0 and an overflow
      for (int64_t c = 0; sum_value && c < channels; ++c)
        value[j * channels + c] += charge * sum_value[i * channels + c];
      for (int64_t f = 0; sum_offset && f < features; ++f) {
        const double w = batch.w[f];
        key[j * features + f] += w * ((w / batch.unit[f]) * (charge * sum_offset[i * features + f]));
      }
    }
  }
};

// The arithmetic of each row that adds something. Batches that some row needs are prepared.
template <typename R>
struct Element {
  std::unique_ptr<BackwardBatch<float>> narrow;
  std::unique_ptr<BackwardBatch<double>> wide;
  std::unique_ptr<FarBatch> far;
  Parts parts;

  // `nearer`: whether keys may lie nearer than all that count, which only double has the range for.
  Element(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool weigh, bool nearer,
          const SpatialPlan& plan) {
    const bool finite = finite_w(problem, b);
    RowGrad grad(problem.channels);
    if (sizeof(R) == 4 && finite && !nearer) {
      narrow = std::make_unique<BackwardBatch<float>>();
      narrow->prepare(problem, b, Values::kBackward, weigh, plan.key_order());
      if (!narrow->usable) narrow.reset();
    }
    for (const int64_t i : plan.rows()) {
      grad.read_from(problem, task, b, i);
      const double* const state = task.state + 2 * (b * problem.queries + i);
      if (grad.size == 0 || (finite && state[1] == 0)) continue;
      if (!finite || std::isnan(state[1])) {
        parts.nan.push_back(i);
      } else if (narrow && !narrow->odd[i] && state[0] <= most_score<float, R>(problem) &&
                 !(grad.size < 0x1p-50 || grad.size > 0x1p40)) {
        parts.narrow.push_back(i);
      } else if (state[0] <= most_score<double, R>(problem)) {
        parts.wide.push_back(i);
      } else {
        parts.far.push_back(i);
      }
    }
    if (!parts.wide.empty()) {
      wide = std::make_unique<BackwardBatch<double>>();
      wide->prepare(problem, b, Values::kBackward, weigh, plan.key_order());
      Rows left;
      for (const int64_t i : parts.wide) (wide->usable && !wide->odd[i] ? left : parts.far).push_back(i);
      parts.wide.swap(left);
      wide->gather(problem, task, b, parts.wide);
    }
    if (narrow && !plan.active()) serve_by_products(task, b * problem.queries);
    if (narrow) narrow->gather(problem, task, b, parts.narrow);
    if (!parts.far.empty()) far = std::make_unique<FarBatch>(problem, b);
  }

 private:
  // Brings the rows that products serve to the front.
  void serve_by_products(const BackwardTask<R>& task, int64_t first) {
    BackwardBatch<float>& batch = *narrow;
    if (static_cast<int64_t>(parts.narrow.size()) < kLeastProductRows) return;
    batch.panels = ProductPanels::of(batch, Values::kBackward);
    if (!batch.panels) return;
    const int64_t features = batch.data.features;
    Buffer<float> row(features);
    const auto end = std::stable_partition(parts.narrow.begin(), parts.narrow.end(), [&](int64_t i) {
      batch.panels->pack_row(batch.query.get() + i * features, row.get());
      return batch.panels->serves(batch.panels->trust_of(row.get()), task.state[2 * (first + i)]);
    });
    batch.served = end - parts.narrow.begin();
    if (batch.served < kLeastProductRows) batch.served = 0;
  }
};

}  // namespace backward
}  // namespace nwfast
