// The forward pass for any number of features and channels; see tiled.h.

#include "products/panels.h"
#include "skipping/near_keys.h"
#include "tiled.h"

namespace nwfast {
namespace {

template <typename R>
void fill_nan(const Problem& problem, int64_t row, const ForwardResult<R>& result) {
  std::fill_n(result.out + row * problem.channels, problem.channels, static_cast<R>(NAN));
  if (result.lse) result.lse[row] = static_cast<R>(NAN);
  if (result.state) result.state[2 * row] = result.state[2 * row + 1] = NAN;
}

// Some rows as a task of the kernels, and what it points to.
template <typename T>
struct ForwardRows {
  ForwardRows(const Problem& problem, const TiledBatch<T>& batch, const int64_t* some, int64_t rows) {
    const int64_t features = problem.features;
    task.data = batch.data;
    task.rows = rows;
    task.query = batch.query.get() + some[0] * features;
    bool together = true;
    for (int64_t i = 1; i < rows; ++i) together &= some[i] == some[0] + i;
    if (!together) {
      query.allocate(rows * features);
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(batch.query.get() + some[i] * features, features, &query[i * features]);
      }
      task.query = query.get();
    }
    for (int64_t i = 0; i < rows; ++i) excluded[i] = batch.own_place(some[i]);
    task.excluded = problem.exclude_self ? excluded : nullptr;
    values.allocate(rows * problem.channels);
    task.total = total;
    task.shift = shift;
    task.values = values.get();
  }
  ForwardRows(const ForwardRows&) = delete;
  ForwardRows& operator=(const ForwardRows&) = delete;

  TiledRows<T> task;
  double total[kMostRowTask], shift[kMostRowTask];
  Buffer<double> values;

 private:
  int64_t excluded[kMostRowTask];
  Buffer<T> query;
};

// From the sums of some rows to their results; returns by `left` which of them T does not serve.
template <typename T, typename R>
void settle(const Problem& problem, const TiledBatch<T>& batch, int64_t b, const int64_t* some, int64_t rows,
            const double* total, double* shift, const double* values, char* left, const ForwardResult<R>& result) {
  const int64_t channels = problem.channels;
  const double most = most_score<T, R>(problem);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = b * problem.queries + some[i];
    left[i] = batch.odd[some[i]] || total[i] == 0 || shift[i] > most;
    if (std::isnan(total[i])) left[i] = batch.odd[some[i]];
    if (left[i]) continue;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = values[i * channels + c] / total[i];
      const Range& range = batch.values[c];
      double out = static_cast<double>(batch.centre[c]) + mean;
      if (range.finite) out = std::fmin(std::fmax(out, range.low), range.high);
      result.out[row * channels + c] = static_cast<R>(std::isnan(mean) ? mean : out);  // fmin and fmax drop NaN
    }
    if (std::isnan(total[i])) shift[i] = NAN;
    if (result.lse) result.lse[row] = static_cast<R>(log_sum({shift[i], total[i] * batch.weight_unit}));
    if (result.state) {
      result.state[2 * row] = shift[i];
      result.state[2 * row + 1] = total[i] * batch.weight_unit;
    }
  }
}

// Some rows in T; returns by `left` which of them it does not serve.
template <typename T, typename R>
void forward_rows(const Problem& problem, const TiledBatch<T>& batch, const NearKeys<T>* near,
                  Pool<NearData<T>>& scratch, int64_t b, const int64_t* some, int64_t rows, char* left,
                  const ForwardResult<R>& result) {
  ForwardRows<T> block(problem, batch, some, rows);
  if (near) {
    const typename Pool<NearData<T>>::Lease chosen(scratch);
    near->choose(nullptr, block.task, *chosen);
    kernels<T>().tiled_rows(block.task);
  } else {
    kernels<T>().tiled_rows(block.task);
  }
  settle(problem, batch, b, some, rows, block.total, block.shift, block.values.get(), left, result);
}

void keep_left(const std::vector<char>& left, Rows& rows) {
  size_t place = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (left[i]) rows[place++] = rows[i];
  }
  rows.resize(place);
}

// A block of rows by products; marks by `left` those that are not served, and returns how many are.
template <typename R>
int64_t product_block(const Problem& problem, const TiledBatch<float>& batch, const ProductPanels& panels, int64_t b,
                      const int64_t* some, int64_t rows, char* left, const ForwardResult<R>& result) {
  const int64_t features = problem.features;
  Buffer<float> query((rows + kRowPadding) * features);
  std::fill_n(query.get() + rows * features, kRowPadding * features, 0.0f);
  Buffer<double> values(rows * problem.channels);
  RowTrust trust[kProductRows];
  double constant[kProductRows], total[kProductRows], shift[kProductRows];
  int64_t excluded[kProductRows];
  for (int64_t i = 0; i < rows; ++i) {
    float* const packed = query.get() + i * features;
    panels.pack_row(batch.query.get() + some[i] * features, packed);
    trust[i] = panels.trust_of(packed);
    constant[i] = panels.constant(trust[i]);
    excluded[i] = batch.own_place(some[i]);
  }
  ProductRows task;
  task.data = panels.data;
  task.rows = rows;
  task.query = query.get();
  task.constant = constant;
  task.excluded = problem.exclude_self ? excluded : nullptr;
  task.total = total;
  task.shift = shift;
  task.values = values.get();
  product_kernels().rows(task);
  int64_t served = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool serves = panels.serves(trust[i], shift[i]);
    if (!serves) total[i] = 0;  // rows without a sum are left
    served += serves;
  }
  settle(problem, batch, b, some, rows, total, shift, values.get(), left, result);
  return served;
}

// Computes the rows that products serve, and leaves the others in `rows`; all of them where few of a sample are served.
template <typename R>
void forward_products(const Problem& problem, const TiledBatch<float>& batch, int64_t b, bool serial, Rows& rows,
                      const ForwardResult<R>& result) {
  const int64_t count = static_cast<int64_t>(rows.size()), sample = std::min(count, kProductRows);
  if (count < kLeastProductRows || problem.features + problem.channels < kLeastProductColumns) return;
  const auto panels = ProductPanels::of(batch, Values::kForward);
  if (!panels) return;
  for (int64_t i = 0; i < sample; ++i) std::swap(rows[i], rows[i * (count / sample)]);
  std::vector<char> left(rows.size(), true);
  if (2 * product_block(problem, batch, *panels, b, &rows[0], sample, &left[0], result) >= sample) {
    parallel_blocks((count - sample + kProductRows - 1) / kProductRows, serial, [&](int64_t block) {
      const int64_t begin = sample + block * kProductRows;
      product_block(problem, batch, *panels, b, &rows[begin], std::min(kProductRows, count - begin), &left[begin],
                    result);
    });
  }
  keep_left(left, rows);
}

// Computes what of the rows T serves, and leaves the others in it.
template <typename T, typename R>
void forward_in(const Problem& problem, int64_t b, bool serial, SpatialPlan& plan, Rows& rows,
                const ForwardResult<R>& result) {
  if (rows.empty()) return;
  auto batch = std::make_unique<TiledBatch<T>>();
  batch->prepare(problem, b, Values::kForward, true, plan.key_order());
  if (!batch->usable) return;
  std::unique_ptr<NearKeys<T>> near;
  const int64_t all = static_cast<int64_t>(rows.size());
  if (plan.active() && batch->finite()) {
    near = std::make_unique<NearKeys<T>>(problem, *batch, plan, kNegligible<R>, serial);
    const bool pays = near->pays(all, [&](int64_t first, const auto& share) {
      ForwardRows<T> block(problem, *batch, &rows[first], std::min(near->block_of(all), all - first));
      return share(nullptr, block.task);
    });
    if (!pays) near.reset();
  }
  if (plan.active() && !near) {
    plan.give_up();
    std::sort(rows.begin(), rows.end());
    batch = std::make_unique<TiledBatch<T>>();
    batch->prepare(problem, b, Values::kForward, true, nullptr);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (!near) forward_products(problem, *batch, b, serial, rows, result);
  }
  const int64_t count = static_cast<int64_t>(rows.size()), size = near ? near->block_of(all) : kRowTask;
  std::vector<char> left(rows.size());
  Pool<NearData<T>> scratch;
  parallel_blocks((count + size - 1) / size, serial, [&](int64_t block) {
    const int64_t begin = block * size;
    forward_rows(problem, *batch, near.get(), scratch, b, &rows[begin], std::min(size, count - begin), &left[begin],
                 result);
  });
  keep_left(left, rows);
}

template <typename R>
void far_forward(const Problem& problem, int64_t b, bool serial, const Rows& rows, const ForwardResult<R>& result) {
  if (rows.empty()) return;
  const FarBatch batch(problem, b);
  parallel_blocks(static_cast<int64_t>(rows.size()), serial, [&](int64_t i) {
    const FarBatch::Row weighed = batch.weigh(rows[i]);
    const int64_t row = b * problem.queries + rows[i];
    fill_nan(problem, row, result);
    if (weighed.nan) return;
    double shift = 0, total = 0, lse = -INFINITY;
    if (weighed.counts) {
      for (int64_t c = 0; c < problem.channels; ++c) {
        result.out[row * problem.channels + c] = static_cast<R>(weighed.mean[c]);
      }
      constexpr FarBatch::Real kMost = std::numeric_limits<double>::max();
      const FarBatch::Real exact = weighed.nearest_score - weighed.top;
      shift = static_cast<double>(std::fmin(exact, kMost));  // the backward pass needs no more of it
      total = static_cast<double>(weighed.total);
      lse = static_cast<double>(kLn2 * (std::log2(weighed.total) - exact));
    }
    if (result.lse) result.lse[row] = static_cast<R>(lse);
    if (!result.state) return;
    result.state[2 * row] = shift;
    result.state[2 * row + 1] = total;
  });
}

template <typename R>
void forward(const Problem& problem, const ForwardResult<R>& result) {
  const int64_t m = problem.queries;
  over_elements(problem, (m + kRowTask - 1) / kRowTask, [&](int64_t b, bool serial) {
    if (!finite_w(problem, b)) {
      for (int64_t i = 0; i < m; ++i) fill_nan(problem, b * m + i, result);
      return;
    }
    SpatialPlan plan(problem, b, kNegligible<R>, serial);
    Rows rows = plan.rows();
    if (sizeof(R) == 4) forward_in<float>(problem, b, serial, plan, rows, result);
    forward_in<double>(problem, b, serial, plan, rows, result);
    far_forward(problem, b, serial, rows, result);
  });
}

}  // namespace

template <>
void tiled_forward<double>(const Problem& problem, const ForwardResult<double>& result) {
  forward(problem, result);
}
template <>
void tiled_forward<float>(const Problem& problem, const ForwardResult<float>& result) {
  forward(problem, result);
}

}  // namespace nwfast
