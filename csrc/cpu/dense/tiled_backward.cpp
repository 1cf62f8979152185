// The backward pass for any number of features and channels; see tiled.h.

#include "backward/batch.h"
#include "backward/products.h"
#include "skipping/near_keys.h"
#include "skipping/near_rows.h"
#include "tiled.h"

namespace nwfast {
namespace {

using namespace backward;

constexpr int64_t kFarRows = 16;  // rows whose weights are held at once in long double

// A block of rows on the query side.
template <typename T>
void fill_rows(const Problem& problem, const BackwardBatch<T>& batch, int64_t begin, int64_t rows,
               TiledQueryGrad<T>& task, double* floor) {
  batch.fill(problem, begin, task);
  task.rows = std::min(batch.rows - begin, rows);
  for (int64_t i = 0; i < task.rows; ++i) {
    const double sum = -std::log2(static_cast<double>(task.inverse_total[i])) - task.shift[i];
    floor[i] = std::isfinite(sum) ? sum : kNoSum;
  }
}

// The keys near the rows of a batch; null where nothing is skipped.
template <typename T>
std::unique_ptr<NearKeys<T>> keys_near(const Problem& problem, const BackwardBatch<T>* batch, const SpatialPlan& plan,
                                       double negligible, bool serial) {
  if (!plan.active() || !batch || batch->rows == 0 || !batch->finite()) return nullptr;
  auto near = std::make_unique<NearKeys<T>>(problem, *batch, plan, negligible, serial);
  const bool pays = near->pays(batch->rows, [&](int64_t first, const auto& share) {
    TiledQueryGrad<T> task;
    double floor[kNearRowBlock];
    fill_rows(problem, *batch, first, near->block_of(batch->rows), task, floor);
    return share(floor, task);
  });
  if (!pays) near.reset();
  return near;
}

// The gradients of the queries of the rows that no products serve; adds those of w to grad_w (features), in the order
// of the rows.
template <typename T, typename R>
void query_side(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                const BackwardBatch<T>* batch, const NearKeys<T>* near, double* grad_w) {
  if (!batch || batch->rows == batch->served) return;
  const int64_t features = problem.features, size = near ? near->block_of(batch->rows) : kRowTask;
  const int64_t blocks = (batch->rows - batch->served + size - 1) / size;
  Buffer<double> partial(grad_w ? blocks * features : 0);  // one partial sum a block, added in order below
  Pool<NearData<T>> scratch;
  parallel_blocks(blocks, serial, [&](int64_t block) {
    const int64_t begin = batch->served + block * size;
    Buffer<double> first(size * features), second(size * features);
    TiledQueryGrad<T> rows;
    T offsets[kMostRowTask];
    const auto compute = [&] {
      if (sizeof(T) > sizeof(R)) {
        batch->exact_offsets(rows, offsets);
        rows.offset_grad = offsets;
      }
      rows.first = first.get();
      rows.second = second.get();
      kernels<T>().tiled_query_grad(rows);
    };
    double floor[kMostRowTask];
    fill_rows(problem, *batch, begin, size, rows, floor);
    if (near) {
      const typename Pool<NearData<T>>::Lease chosen(scratch);
      near->choose(floor, rows, *chosen);
      compute();
    } else {
      compute();
    }
    for (int64_t f = 0; f < features; ++f) {
      const double w = batch->w[f], unit = batch->unit[f];
      double sum = 0;
      for (int64_t i = 0; i < rows.rows; ++i) {
        if (task.grad_query) {
          task.grad_query[(b * problem.queries + batch->row_of[begin + i]) * features + f] =
              static_cast<R>(-w * ((w / unit) * first[i * features + f]));
        }
        if (task.rows_grad_w) {
          task.rows_grad_w[(b * problem.queries + batch->row_of[begin + i]) * features + f] =
              static_cast<R>(w_gradient(w, unit, second[i * features + f]));
        }
        sum += second[i * features + f];
      }
      if (!grad_w) continue;
      partial[block * features + f] = w_gradient(w, unit, sum);
    }
  });
  for (int64_t i = 0; grad_w && i < blocks * features; ++i) grad_w[i % features] += partial[i];
}

template <typename R>
void far_query_side(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                    const Element<R>& element, double* grad_w) {
  const Rows& rows = element.parts.far;
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
    for (int64_t f = 0; task.rows_grad_w && f < features; ++f) {
      task.rows_grad_w[(b * problem.queries + rows[i]) * features + f] = static_cast<R>(partial[i * features + f]);
    }
  });
  for (int64_t f = 0; grad_w && f < features; ++f) {
    FarBatch::Real sum = 0;  // of terms that may overflow in double where their sum does not
    for (int64_t i = 0; i < count; ++i) sum += partial[i * features + f];
    grad_w[f] += static_cast<double>(sum);
  }
}

// What is left of an element's query side: rows that no products serve.
template <typename R>
void finish_queries(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                    const Element<R>& element, const NearKeys<float>* narrow, const NearKeys<double>* wide,
                    double* grad_w) {
  const int64_t features = problem.features;
  query_side(problem, task, b, serial, element.narrow.get(), narrow, grad_w);
  query_side(problem, task, b, serial, element.wide.get(), wide, grad_w);
  far_query_side(problem, task, b, serial, element, grad_w);
  for (const int64_t i : element.parts.nan) {
    if (task.grad_query) {
      std::fill_n(task.grad_query + (b * problem.queries + i) * features, features, static_cast<R>(NAN));
    }
    if (task.rows_grad_w) {
      std::fill_n(task.rows_grad_w + (b * problem.queries + i) * features, features, static_cast<R>(NAN));
    }
    if (grad_w) std::fill_n(grad_w, features, NAN);
  }
}

// Sets the results of an element's query side to 0; returns its gradients of w, or null.
template <typename R>
double* clear_queries(const Problem& problem, const BackwardTask<R>& task, int64_t b) {
  const int64_t size = problem.queries * problem.features;
  double* const grad_w = task.grad_w ? task.grad_w + b * problem.features : nullptr;
  if (grad_w) std::fill_n(grad_w, problem.features, 0.0);
  if (task.grad_query) std::fill_n(task.grad_query + b * size, size, R(0));
  if (task.rows_grad_w) std::fill_n(task.rows_grad_w + b * size, size, R(0));
  return grad_w;
}

template <typename R>
void query_element(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial, SpatialPlan& plan) {
  double* const grad_w = clear_queries(problem, task, b);
  auto element = std::make_unique<Element<R>>(problem, task, b, true, false, plan);
  const auto narrow = keys_near(problem, element->narrow.get(), plan, kNegligible<R>, serial);
  const auto wide = keys_near(problem, element->wide.get(), plan, kNegligible<R>, serial);
  if (plan.active() && !narrow && !wide) {
    plan.give_up();
    element = std::make_unique<Element<R>>(problem, task, b, true, false, plan);
  }
  if (element->narrow) product_backward<R>(problem, task, b, serial, *element->narrow, true, grad_w, nullptr);
  finish_queries(problem, task, b, serial, *element, narrow.get(), wide.get(), grad_w);
}

// The log2 of the weight that keys at some places have at most; of 1 where the gradient of their weight is wanted.
template <typename T>
double key_charge(const Problem& problem, const BackwardBatch<T>& batch, bool of_weights, int64_t begin, int64_t end) {
  if (!problem.key_weight.data) return 0;
  const double most = std::log2(*std::max_element(batch.weight.get() + begin, batch.weight.get() + end));
  return std::fmax(most, of_weights ? std::fmax(0, -std::log2(batch.weight_unit)) : -1e5);
}

// The log2 of the size of each row's gradients, the largest of its gradients relative to that of all rows.
template <typename T>
std::vector<double> gradient_sizes(const BackwardBatch<T>& batch) {
  const int64_t channels = batch.data.channels, pitch = batch.data.channel_pitch;
  std::vector<double> sizes(batch.rows, 0);
  const auto include = [&](const T* x, int64_t distance) {
    double most = 0;
    for (int64_t i = 0; i < batch.rows; ++i) most = std::fmax(most, std::fabs(x[i * distance]));
    for (int64_t i = 0; most > 0 && i < batch.rows; ++i) {
      sizes[i] = std::fmax(sizes[i], std::fabs(static_cast<double>(x[i * distance])) / most);
    }
  };
  for (int64_t c = 0; c < channels; ++c) include(batch.value_grad.get() + c, pitch);
  include(batch.lse_grad.get(), 1);
  for (double& size : sizes) size = std::log2(size);
  return sizes;
}

// The rows near the keys of a batch; null where nothing is skipped.
template <typename T>
std::unique_ptr<NearRows<T>> rows_near(const Problem& problem, const BackwardBatch<T>* batch, const SpatialPlan& plan,
                                       bool of_weights, double negligible, bool serial) {
  if (!plan.active() || !batch || batch->rows == 0 || !batch->finite()) return nullptr;
  TiledKeyGrad<T> all;
  batch->fill(problem, 0, all);
  all.rows = batch->rows;
  auto near = std::make_unique<NearRows<T>>(all, *batch, gradient_sizes(*batch).data(), negligible, serial);
  const bool pays =
      near->pays([&](int64_t begin, int64_t end) { return key_charge(problem, *batch, of_weights, begin, end); });
  if (!pays) near.reset();
  return near;
}

template <typename T>
void key_side(const Problem& problem, bool serial, const BackwardBatch<T>* batch, const NearRows<T>* near,
              bool of_weights, KeySums<double>& sums) {
  if (!batch || batch->rows == batch->served) return;
  const int64_t features = problem.features, channels = problem.channels;
  Pool<NearRowData<T>> scratch;
  parallel_blocks((problem.keys + kKeyTile - 1) / kKeyTile, serial, [&](int64_t block) {
    Buffer<double> sum_value(kKeyTile * channels), sum_offset(kKeyTile * features), sum_weight(kKeyTile);
    TiledKeyGrad<T> keys;
    batch->fill(problem, batch->served, keys);
    keys.rows = batch->rows - batch->served;
    keys.key_begin = block * kKeyTile;
    keys.key_end = std::min(problem.keys, keys.key_begin + kKeyTile);
    keys.sum_value = sum_value.get();
    keys.sum_weight = sum_weight.get();
    keys.sum_offset = sum_offset.get();
    if (near) {
      const typename Pool<NearRowData<T>>::Lease chosen(scratch);
      near->choose(key_charge(problem, *batch, of_weights, keys.key_begin, keys.key_end), keys, *chosen);
      kernels<T>().tiled_key_grad(keys);
    } else {
      kernels<T>().tiled_key_grad(keys);
    }
    sums.add(problem, *batch, keys.key_begin, keys.key_end, sum_value.get(), sum_weight.get(), sum_offset.get());
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
  if (element.parts.far.empty()) return;
  const auto sums = far_key_sums(problem, task, b, serial, *element.far, element.parts.far);
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
  Rows rows = element.parts.wide;
  rows.insert(rows.end(), element.parts.far.begin(), element.parts.far.end());
  const auto again = far_key_sums(problem, task, b, serial, FarBatch(problem, b), rows);
  for (int64_t j = 0; j < problem.keys; ++j) {
    if (beyond(j)) sums[j] = static_cast<double>(again.weight[j]);
  }
}

// What is left of an element's key side beside sums: rows that no products serve, and the results.
template <typename R>
void finish_keys(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial, const Element<R>& element,
                 const NearRows<float>* narrow, const NearRows<double>* wide, const double* left_out,
                 KeySums<double>& sums) {
  const int64_t n = problem.keys, features = problem.features, channels = problem.channels;
  const bool of_weights = task.grad_key_weight != nullptr;
  key_side(problem, serial, element.narrow.get(), narrow, of_weights, sums);
  key_side(problem, serial, element.wide.get(), wide, of_weights, sums);
  far_key_side(problem, task, b, serial, element, sums);
  if (left_out) settle_beyond(problem, task, b, serial, element, left_out, sums.weight);
  if (!element.parts.nan.empty()) {
    for (std::vector<double>* sum : {&sums.value, &sums.weight, &sums.key}) std::fill(sum->begin(), sum->end(), NAN);
  }
  constexpr double most = std::numeric_limits<R>::max();
  for (int64_t i = 0; task.grad_value && i < n * channels; ++i) {
    task.grad_value[b * n * channels + i] = static_cast<R>(sums.value[i]);
  }
  for (int64_t i = 0; task.grad_key && i < n * features; ++i) {
    task.grad_key[b * n * features + i] = static_cast<R>(sums.key[i]);
  }
  for (int64_t j = 0; task.grad_key_weight && j < n; ++j) {
    const double sum = sums.weight[j];  // a key that is left out may be nearer than all others by any measure
    const bool beyond = left_out && left_out[j] == 0 && std::fabs(sum) > most;
    task.grad_key_weight[b * n + j] = static_cast<R>(beyond ? std::copysign(most, sum) : sum);
  }
}

template <typename R>
void key_element(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial) {
  const int64_t n = problem.keys;
  Buffer<double> weight(n);
  bool nearer = false;
  // Left-out keys hold what is their own only where nothing but the gradient of their weight is asked for (left_out.h);
  // elsewhere they are no nearer than those that count.
  if (task.grad_key_weight && problem.key_weight.data && !task.grad_key && !task.grad_value) {
    const View& view = problem.key_weight;
    read(view, view.offset(problem.batch, b), n, view.row_stride, weight.get());
    for (int64_t j = 0; j < n; ++j) nearer |= weight[j] == 0;
  }
  SpatialPlan plan(problem, b, kNegligible<R>, serial);
  auto element = std::make_unique<Element<R>>(problem, task, b, false, nearer, plan);
  const bool of_weights = task.grad_key_weight != nullptr;
  const auto narrow = rows_near(problem, element->narrow.get(), plan, of_weights, kNegligible<R>, serial);
  const auto wide = rows_near(problem, element->wide.get(), plan, of_weights, kNegligible<R>, serial);
  if (plan.active() && !narrow && !wide) {
    plan.give_up();
    element = std::make_unique<Element<R>>(problem, task, b, false, nearer, plan);
  }
  KeySums<double> sums(problem);
  if (element->narrow) product_backward<R>(problem, task, b, serial, *element->narrow, false, nullptr, &sums);
  finish_keys(problem, task, b, serial, *element, narrow.get(), wide.get(), nearer ? weight.get() : nullptr, sums);
}

template <typename R>
void query_backward(const Problem& problem, const BackwardTask<R>& task) {
  over_elements(problem, (problem.queries + kRowTask - 1) / kRowTask, [&](int64_t b, bool serial) {
    SpatialPlan plan(problem, b, kNegligible<R>, serial);
    query_element(problem, task, b, serial, plan);
  });
}

template <typename R>
void key_backward(const Problem& problem, const BackwardTask<R>& task) {
  over_elements(problem, (problem.keys + kKeyTile - 1) / kKeyTile,
                [&](int64_t b, bool serial) { key_element(problem, task, b, serial); });
}

// Both, in one pass where products serve.
template <typename R>
void both_backward(const Problem& problem, const BackwardTask<R>& task) {
  if (sizeof(R) > 4 || problem.features < kLeastProductFeatures || problem.key_weight.data) {
    query_backward(problem, task);
    key_backward(problem, task);
    return;
  }
  over_elements(problem, (problem.keys + kKeyTile - 1) / kKeyTile, [&](int64_t b, bool serial) {
    SpatialPlan plan(problem, b, kNegligible<R>, serial);
    if (plan.active()) {
      query_element(problem, task, b, serial, plan);
      key_element(problem, task, b, serial);
      return;
    }
    double* const grad_w = clear_queries(problem, task, b);
    const Element<R> element(problem, task, b, true, false, plan);
    KeySums<double> sums(problem);
    if (element.narrow) product_backward<R>(problem, task, b, serial, *element.narrow, true, grad_w, &sums);
    finish_queries<R>(problem, task, b, serial, element, nullptr, nullptr, grad_w);
    finish_keys<R>(problem, task, b, serial, element, nullptr, nullptr, nullptr, sums);
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
void tiled_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  both_backward(problem, task);
}
template <>
void tiled_key_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  key_backward(problem, task);
}
template <>
void tiled_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  both_backward(problem, task);
}
template <>
void tiled_key_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  key_backward(problem, task);
}

}  // namespace nwfast
