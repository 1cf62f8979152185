// The backward pass for any number of features and channels; see tiled.h.

#include "tiled.h"

namespace nwfast {
namespace {

constexpr int64_t kFarRows = 16;  // rows whose weights are held at once in long double

// What the rows of a batch element are differentiated in.
struct Plan {
  Rows narrow, wide, far;
  Rows nan;  // rows that are NaN as a whole and matter: so are all gradients that they add to
};

// The gradients of one row's results.
struct RowGrad {
  RowGrad(int64_t channels) : out(channels) {}

  template <typename R>
  void read_from(const Problem& problem, const BackwardTask<R>& task, int64_t b, int64_t i) {
    const View &grad = task.grad_out, &grad_lse = task.grad_lse;
    read(grad, grad.offset(problem.batch, b) + i * grad.row_stride, problem.channels, grad.column_stride, out.get());
    lse = 0;
    if (grad_lse.data) read(grad_lse, grad_lse.offset(problem.batch, b) + i * grad_lse.row_stride, 1, 0, &lse);
    size = std::fabs(lse);
    for (int64_t c = 0; c < problem.channels; ++c) {
      if (!(std::fabs(out[c]) <= size)) size = std::fabs(out[c]);  // NaN stays
    }
  }

  Buffer<double> out;
  double lse = 0, size = 0;
};

template <typename T>
struct BackwardBatch : TiledBatch<T> {
  Buffer<T> row_query, value_grad, lse_grad, offset_grad, inverse_total;
  Buffer<double> shift;
  Buffer<int64_t> places, own;  // of the rows, and of the keys that they leave out
  int64_t rows = 0;

  template <typename R>
  void gather(const Problem& problem, const BackwardTask<R>& task, int64_t b, const Rows& some) {
    const int64_t m = problem.queries, channels = problem.channels, features = problem.features;
    const int64_t pitch = this->data.channel_pitch;
    rows = static_cast<int64_t>(some.size());
    row_query.allocate(rows * features);
    value_grad.allocate(rows * pitch);
    offset_grad.allocate(rows);
    lse_grad.allocate(rows);
    inverse_total.allocate(rows);
    shift.allocate(rows);
    places.allocate(rows);
    own.allocate(rows);
    RowGrad grad(channels);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = b * m + some[i];
      grad.read_from(problem, task, b, some[i]);
      T dot = 0;  // as the kernels sum it, so that it cancels where a row's weight is all on one key
      for (int64_t c = 0; c < channels; ++c) {
        value_grad[i * pitch + c] = static_cast<T>(grad.out[c]);
        const T mean = static_cast<T>(static_cast<T>(task.out[row * channels + c]) - this->centre[c]);
        dot = std::fma(mean, static_cast<T>(grad.out[c]), dot);
      }
      for (int64_t c = channels; c < pitch; ++c) value_grad[i * pitch + c] = 0;
      std::copy_n(this->query.get() + some[i] * features, features, &row_query[i * features]);
      lse_grad[i] = static_cast<T>(grad.lse);
      offset_grad[i] = dot;
      inverse_total[i] = static_cast<T>(this->weight_unit / task.state[2 * row + 1]);
      shift[i] = task.state[2 * row];
      places[i] = some[i];
      own[i] = problem.own_key(some[i]);
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

  // The offsets of up to kRowTask rows, from outputs that are not rounded to the dtype of the results: moments about a
  // far query multiply that rounding by the square of its distance.
  void exact_offsets(const Problem& problem, int64_t begin, int64_t count, T* offsets) const {
    const int64_t channels = problem.channels;
    double total[kRowTask], row_shift[kRowTask];
    Buffer<double> sums(kRowTask * channels);
    TiledRows<T> task;
    task.data = this->data;
    task.rows = count;
    task.query = row_query.get() + begin * problem.features;
    task.excluded = problem.exclude_self ? own.get() + begin : nullptr;
    task.total = total;
    task.shift = row_shift;
    task.values = sums.get();
    kernels<T>().tiled_rows(task);
    for (int64_t i = 0; i < count; ++i) {
      const T* const grad = value_grad.get() + (begin + i) * this->data.channel_pitch;
      T dot = 0;
      for (int64_t c = 0; c < channels; ++c) {
        dot = std::fma(static_cast<T>(sums[i * channels + c] / total[i]), grad[c], dot);
      }
      offsets[i] = dot;
    }
  }
};

// The arithmetic of each row that adds something. Batches that some row needs are prepared.
template <typename R>
struct Element {
  std::unique_ptr<BackwardBatch<float>> narrow;
  std::unique_ptr<BackwardBatch<double>> wide;
  std::unique_ptr<FarBatch> far;
  Plan plan;

  // `nearer`: whether keys may lie nearer than all that count, which only double has the range for.
  Element(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool weigh, bool nearer) {
    const bool finite = finite_w(problem, b);
    RowGrad grad(problem.channels);
    if (sizeof(R) == 4 && finite && !nearer) {
      narrow = std::make_unique<BackwardBatch<float>>();
      narrow->prepare(problem, b, Values::kBackward, weigh);
      if (!narrow->usable) narrow.reset();
    }
    for (int64_t i = 0; i < problem.queries; ++i) {
      grad.read_from(problem, task, b, i);
      const double* const state = task.state + 2 * (b * problem.queries + i);
      if (grad.size == 0 || (finite && state[1] == 0)) continue;
      if (!finite || std::isnan(state[1])) {
        plan.nan.push_back(i);
      } else if (narrow && !narrow->odd[i] && state[0] <= most_score<float, R>(problem) &&
                 !(grad.size < 0x1p-50 || grad.size > 0x1p40)) {
        plan.narrow.push_back(i);
      } else if (state[0] <= most_score<double, R>(problem)) {
        plan.wide.push_back(i);
      } else {
        plan.far.push_back(i);
      }
    }
    if (!plan.wide.empty()) {
      wide = std::make_unique<BackwardBatch<double>>();
      wide->prepare(problem, b, Values::kBackward, weigh);
      Rows left;
      for (const int64_t i : plan.wide) (wide->usable && !wide->odd[i] ? left : plan.far).push_back(i);
      plan.wide.swap(left);
      wide->gather(problem, task, b, plan.wide);
    }
    if (narrow) narrow->gather(problem, task, b, plan.narrow);
    if (!plan.far.empty()) far = std::make_unique<FarBatch>(problem, b);
  }
};

// The gradients of the queries of some rows; adds those of w to grad_w (features), in the order of the rows.
template <typename T, typename R>
void query_side(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                const BackwardBatch<T>* batch, double* grad_w) {
  if (!batch || batch->rows == 0) return;
  const int64_t features = problem.features, blocks = (batch->rows + kRowTask - 1) / kRowTask;
  Buffer<double> partial(grad_w ? blocks * features : 0);  // one partial sum a block, added in order below
  parallel_blocks(blocks, serial, [&](int64_t block) {
    const int64_t begin = block * kRowTask;
    Buffer<double> first(kRowTask * features), second(kRowTask * features);
    TiledQueryGrad<T> rows;
    rows.rows = std::min(batch->rows - begin, kRowTask);
    batch->fill(problem, begin, rows);
    T offsets[kRowTask];
    if (sizeof(T) > sizeof(R)) {
      batch->exact_offsets(problem, begin, rows.rows, offsets);
      rows.offset_grad = offsets;
    }
    rows.first = first.get();
    rows.second = second.get();
    kernels<T>().tiled_query_grad(rows);
    for (int64_t f = 0; f < features; ++f) {
      const double w = batch->w[f], unit = batch->unit[f];
      double sum = 0;
      for (int64_t i = 0; i < rows.rows; ++i) {
        if (task.grad_query) {
          task.grad_query[(b * problem.queries + batch->places[begin + i]) * features + f] =
              static_cast<R>(-w * ((w / unit) * first[i * features + f]));
        }
        sum += second[i * features + f];
      }
      if (!grad_w) continue;
      int exponent;  // of w, apart: neither w nor the square of the unit need leave a number in between
      const double fraction = std::frexp(w, &exponent);
      partial[block * features + f] = w == 0 ? sum * 0 : -std::ldexp(fraction * sum, exponent - 2 * std::ilogb(unit));
    }
  });
  for (int64_t i = 0; grad_w && i < blocks * features; ++i) grad_w[i % features] += partial[i];
}

template <typename R>
void far_query_side(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                    const Element<R>& element, double* grad_w) {
  const Rows& rows = element.plan.far;
  const int64_t features = problem.features, count = static_cast<int64_t>(rows.size());
  std::vector<FarBatch::Real> partial(count * features);
  parallel_blocks(count, serial, [&](int64_t i) {
    RowGrad grad(problem.channels);
    grad.read_from(problem, task, b, rows[i]);
    std::vector<FarBatch::Real> grad_query(features);
    const FarBatch::Row row = element.far->weigh(rows[i]);
    element.far->differentiate(row, grad.out.get(), grad.lse, grad_query.data(), &partial[i * features]);
    for (int64_t f = 0; task.grad_query && f < features; ++f) {
      task.grad_query[(b * problem.queries + rows[i]) * features + f] = static_cast<R>(grad_query[f]);
    }
  });
  for (int64_t f = 0; grad_w && f < features; ++f) {
    FarBatch::Real sum = 0;  // of terms that may overflow in double where their sum does not
    for (int64_t i = 0; i < count; ++i) sum += partial[i * features + f];
    grad_w[f] += static_cast<double>(sum);
  }
}

template <typename R>
void query_backward(const Problem& problem, const BackwardTask<R>& task) {
  const int64_t m = problem.queries, features = problem.features;
  over_elements(problem, (m + kRowTask - 1) / kRowTask, [&](int64_t b, bool serial) {
    double* const grad_w = task.grad_w ? task.grad_w + b * features : nullptr;
    if (grad_w) std::fill_n(grad_w, features, 0.0);
    if (task.grad_query) std::fill_n(task.grad_query + b * m * features, m * features, R(0));
    const Element<R> element(problem, task, b, true, false);
    query_side(problem, task, b, serial, element.narrow.get(), grad_w);
    query_side(problem, task, b, serial, element.wide.get(), grad_w);
    far_query_side(problem, task, b, serial, element, grad_w);
    for (const int64_t i : element.plan.nan) {
      if (task.grad_query) std::fill_n(task.grad_query + (b * m + i) * features, features, static_cast<R>(NAN));
      if (grad_w) std::fill_n(grad_w, features, NAN);
    }
  });
}

// Sums over rows for the keys of a batch element: of p_ij g_i, of u_ij and of u_ij times the derivatives of scores by
// the key's coordinates; the last two for a unit of key weight or for all of it.
template <typename Sum>
struct KeySums {
  std::vector<Sum> value, weight, key;

  KeySums(const Problem& problem)
      : value(problem.keys * problem.channels), weight(problem.keys), key(problem.keys * problem.features) {}
};

template <typename T>
void key_side(const Problem& problem, bool serial, const BackwardBatch<T>* batch, KeySums<double>& sums) {
  if (!batch || batch->rows == 0) return;
  const int64_t features = problem.features, channels = problem.channels;
  parallel_blocks((problem.keys + kKeyTile - 1) / kKeyTile, serial, [&](int64_t block) {
    Buffer<double> sum_value(kKeyTile * channels), sum_offset(kKeyTile * features), sum_weight(kKeyTile);
    TiledKeyGrad<T> keys;
    batch->fill(problem, 0, keys);
    keys.rows = batch->rows;
    keys.key_begin = block * kKeyTile;
    keys.key_end = std::min(problem.keys, keys.key_begin + kKeyTile);
    keys.sum_value = sum_value.get();
    keys.sum_weight = sum_weight.get();
    keys.sum_offset = sum_offset.get();
    kernels<T>().tiled_key_grad(keys);
    for (int64_t j = keys.key_begin; j < keys.key_end; ++j) {
      const int64_t i = j - keys.key_begin;
      const double weight = problem.key_weight.data ? batch->weight[j] : 1;
      sums.weight[j] += sum_weight[i] / batch->weight_unit;
      if (weight == 0) continue;  // no product of 0 and an overflow
      for (int64_t c = 0; c < channels; ++c) sums.value[j * channels + c] += weight * sum_value[i * channels + c];
      for (int64_t f = 0; f < features; ++f) {
        const double w = batch->w[f];
        sums.key[j * features + f] += w * ((w / batch->unit[f]) * (weight * sum_offset[i * features + f]));
      }
    }
  });
}

// In long double: terms may overflow in double where their sum does not.
template <typename R>
KeySums<FarBatch::Real> far_key_sums(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                                     const FarBatch& batch, const Rows& rows) {
  KeySums<FarBatch::Real> sums(problem);
  const int64_t features = problem.features, channels = problem.channels, n = problem.keys;
  std::vector<std::unique_ptr<RowGrad>> grads(kFarRows);
  std::vector<FarBatch::Row> weighed(kFarRows);
  std::vector<FarBatch::KeyParts> parts(kFarRows);
  for (int64_t begin = 0; begin < static_cast<int64_t>(rows.size()); begin += kFarRows) {
    const int64_t count = std::min(kFarRows, static_cast<int64_t>(rows.size()) - begin);
    parallel_blocks(count, serial, [&](int64_t i) {
      const int64_t row = rows[begin + i];
      grads[i] = std::make_unique<RowGrad>(channels);
      grads[i]->read_from(problem, task, b, row);
      weighed[i] = batch.weigh(row);
      parts[i] = batch.differentiate(weighed[i], grads[i]->out.get(), grads[i]->lse, nullptr, nullptr);
    });
    parallel_blocks((n + kKeyTile - 1) / kKeyTile, serial, [&](int64_t block) {
      for (int64_t i = 0; i < count; ++i) {
        const std::vector<int64_t>& keys = weighed[i].keys;
        size_t place = std::lower_bound(keys.begin(), keys.end(), block * kKeyTile) - keys.begin();
        for (; place < keys.size() && keys[place] < (block + 1) * kKeyTile; ++place) {
          const int64_t j = keys[place];
          const FarBatch::Real weight = parts[i].value[place], score = parts[i].score[place];
          sums.weight[j] += parts[i].weight[place];
          if (weight != 0) {
            for (int64_t c = 0; c < channels; ++c) sums.value[j * channels + c] += weight * grads[i]->out[c];
          }
          if (score == 0) continue;
          for (int64_t f = 0; f < features; ++f) {
            sums.key[j * features + f] += score * batch.score_by_key(weighed[i], j, f);
          }
        }
      }
    });
  }
  return sums;
}

template <typename R>
void far_key_side(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                  const Element<R>& element, KeySums<double>& total) {
  if (element.plan.far.empty()) return;
  const auto sums = far_key_sums(problem, task, b, serial, *element.far, element.plan.far);
  const auto add = [](const std::vector<FarBatch::Real>& from, std::vector<double>& to) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += static_cast<double>(from[i]);
  };
  add(sums.value, total.value);
  add(sums.weight, total.weight);
  add(sums.key, total.key);
}

// The derivatives by the weights of keys that have none and lie so much nearer to rows than all that count that double
// does not hold what a row gives them.
template <typename R>
void settle_beyond(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                   const Element<R>& element, const double* weight, std::vector<double>& sums) {
  const auto beyond = [&](int64_t j) { return weight[j] == 0 && !std::isfinite(sums[j]); };
  bool any = false;
  for (int64_t j = 0; j < problem.keys; ++j) any |= beyond(j);
  if (!any) return;
  Rows rows = element.plan.wide;
  rows.insert(rows.end(), element.plan.far.begin(), element.plan.far.end());
  const auto again = far_key_sums(problem, task, b, serial, FarBatch(problem, b), rows);
  for (int64_t j = 0; j < problem.keys; ++j) {
    if (beyond(j)) sums[j] = static_cast<double>(again.weight[j]);
  }
}

template <typename R>
void key_backward(const Problem& problem, const BackwardTask<R>& task) {
  const int64_t n = problem.keys, features = problem.features, channels = problem.channels;
  over_elements(problem, (n + kKeyTile - 1) / kKeyTile, [&](int64_t b, bool serial) {
    Buffer<double> weight(n);
    bool nearer = false;
    // Left-out keys hold what is their own only where nothing but the gradient of their weight is asked for
    // (left_out.h); elsewhere they are no nearer than those that count.
    if (task.grad_key_weight && problem.key_weight.data && !task.grad_key && !task.grad_value) {
      const View& view = problem.key_weight;
      read(view, view.offset(problem.batch, b), n, view.row_stride, weight.get());
      for (int64_t j = 0; j < n; ++j) nearer |= weight[j] == 0;
    }
    const Element<R> element(problem, task, b, false, nearer);
    KeySums<double> sums(problem);
    key_side(problem, serial, element.narrow.get(), sums);
    key_side(problem, serial, element.wide.get(), sums);
    far_key_side(problem, task, b, serial, element, sums);
    if (nearer) settle_beyond(problem, task, b, serial, element, weight.get(), sums.weight);
    if (!element.plan.nan.empty()) {
      for (std::vector<double>* sum : {&sums.value, &sums.weight, &sums.key}) std::fill(sum->begin(), sum->end(), NAN);
    }
    const double most = task.grad_key_weight ? most_weight_gradient<R>(problem) : 0;
    for (int64_t i = 0; task.grad_value && i < n * channels; ++i) {
      task.grad_value[b * n * channels + i] = static_cast<R>(sums.value[i]);
    }
    for (int64_t i = 0; task.grad_key && i < n * features; ++i) {
      task.grad_key[b * n * features + i] = static_cast<R>(sums.key[i]);
    }
    for (int64_t j = 0; task.grad_key_weight && j < n; ++j) {
      const double sum = sums.weight[j];  // a key that is left out may be nearer than all others by any measure
      const bool beyond = nearer && weight[j] == 0 && std::fabs(sum) > most;
      task.grad_key_weight[b * n + j] = static_cast<R>(beyond ? std::copysign(most, sum) : sum);
    }
  });
}

}  // namespace

template <>
void tiled_query_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  query_backward(problem, task);
}
template <>
void tiled_query_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  query_backward(problem, task);
}
template <>
void tiled_key_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  key_backward(problem, task);
}
template <>
void tiled_key_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  key_backward(problem, task);
}

}  // namespace nwfast
