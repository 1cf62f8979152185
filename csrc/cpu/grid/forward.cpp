// The forward pass of the linear method in two and three features, with tangents of the query for any number of
// channels, and of w for one: with them the gradients of both are a product (../tangents.h), and no second pass.

#include <optional>

#include "crowded.h"
#include "derivatives.h"
#include "far/rows.h"
#include "tangents.h"

namespace nwfast {
namespace grid {
namespace {

template <typename R>
class Forward {
 public:
  Forward(const Problem& problem, const ForwardResult<R>& result, int64_t b, bool serial)
      : problem_(problem), result_(result), b_(b), serial_(serial) {}

  bool run() {
    const int order = result_.tangent_w ? 2 : result_.tangent_q ? 1 : 0;
    // Products are made of values in columns.
    if (!element_.prepare(problem_, b_, order, order > 0 ? Values::kBackward : Values::kForward, true, serial_)) {
      return false;
    }
    const int64_t m = element_.queries.n;
    std::vector<int64_t> left_over = element_.outside;
    left_.assign(m, 1);
    std::vector<int64_t> expanded;
    const Derivatives<R> derivatives(element_, order);
    if (m > 0) {
      expanded =
          choose_boxes(element_.plan, element_.keys, element_.queries, derivatives.columns, derivatives.order, serial_);
    }
    if (!expanded.empty()) {
      const auto all = [](int64_t) { return true; };
      expand_queries(element_, derivatives, std::move(expanded), serial_, all, [&](int64_t i, const double* row) {
        write(i, 0, row[0], row + 1);
        if (order > 0) differentiate(i, derivatives, row);
        left_[i] = 0;
      });
    }
    for (int level = 0; level < kLevels; ++level) {
      std::vector<int64_t> rows = left_rows();
      if (order == 0 && level < 2 && sum_far(rows, level, left_over)) rows = left_rows();
      if (rows.empty()) break;
      sum_directly(rows, level);
    }
    for (int64_t i = 0; i < m; ++i) {
      if (left_[i]) left_over.push_back(element_.queries.order[i]);
    }
    sum_left_over(std::move(left_over));
    return true;
  }

 private:
  // Those without a result, ascending.
  std::vector<int64_t> left_rows() const {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < element_.queries.n; ++i) {
      if (left_[i]) rows.push_back(i);
    }
    return rows;
  }

  // The rows that have no result yet, and those outside of the grid, over the tree of far/tree.h where that is less
  // work than direct sums of this level, as is returned; leaves in `outside` those that it did not settle.
  bool sum_far(const std::vector<int64_t>& rows, int level, std::vector<int64_t>& outside) {
    if (!far_pays(element_, rows, level, outside.size())) return false;
    std::vector<int64_t> numbers;  // by the caller's
    for (const int64_t i : rows) numbers.push_back(element_.queries.order[i]);
    numbers.insert(numbers.end(), outside.begin(), outside.end());
    const int64_t known = static_cast<int64_t>(rows.size());
    std::vector<int64_t> unsettled;
    sum_far_rows(element_, problem_, b_, numbers, serial_, [&](int64_t k, double shift, const double* sums) {
      if (sums[0] > 0 && std::isfinite(sums[0]) && std::isfinite(shift)) {
        write_row(result_, b_ * problem_.queries + numbers[k], problem_.channels, element_.batch.centre.get(),
                  element_.batch.values.get(), shift, sums[0], element_.batch.weight_unit, sums + 1, 1);
        if (k < known) left_[rows[k]] = 0;
      } else if (k >= known) {
        unsettled.push_back(numbers[k]);
      }
    });
    outside.swap(unsettled);
    return true;
  }

  // total and values are sums relative to 2^-shift.
  void write(int64_t i, double shift, double total, const double* values) const {
    const TiledBatch<R>& batch = element_.batch;
    write_row(result_, result_row(i), problem_.channels, batch.centre.get(), batch.values.get(), shift, total,
              batch.weight_unit, values, 1);
  }

  int64_t result_row(int64_t i) const { return b_ * problem_.queries + element_.queries.order[i]; }
  // Of a row: tangents of the query (features, channels), and of w (features).
  R* by_query(int64_t i) const { return result_.tangent_q + result_row(i) * problem_.features * problem_.channels; }
  R* by_w(int64_t i) const { return result_.tangent_w + result_row(i) * problem_.features; }

  // row (slots, columns): see GridEvaluate.
  void differentiate(int64_t i, const Derivatives<R>& derivatives, const double* row) const {
    const int64_t channels = problem_.channels;
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0) continue;
      const bool constant = axis.scale == 0;  // out depends on the square of w
      for (int64_t c = 0; c < channels && result_.tangent_q; ++c) {
        const double tangent = constant ? 0 : derivatives.by_query(a, row, c + 1);
        by_query(i)[axis.feature * channels + c] = static_cast<R>(tangent);
      }
      if (!result_.tangent_w) continue;
      by_w(i)[axis.feature] = static_cast<R>(constant ? 0 : derivatives.by_w(a, row, 1, i));
    }
  }

  void sum_directly(const std::vector<int64_t>& rows, int level) {
    const double most = most_score<R, R>(problem_);
    const int64_t features = problem_.features, channels = problem_.channels;
    over_windows(
        element_, runs_of(element_.queries, rows), level, serial_,
        [&](const Run& run, const TiledData<R>& window, const std::vector<WindowFinder::Range>& ranges, double least) {
          double total[kItemRows], shift[kItemRows];
          int64_t excluded[kItemRows];
          std::optional<WindowProducts<R>> products;
          if (result_.tangent_q && !result_.tangent_w) products.emplace(window);
          TiledRows<R> task;
          task.data = products ? products->data : window;
          const int64_t columns = task.data.channels;
          Buffer<double> values(kItemRows * columns), covariance(features * channels);
          Buffer<R> query(kItemRows * features);
          task.rows = run.end - run.begin;
          for (int64_t k = 0; k < task.rows; ++k) {
            const int64_t i = rows[run.begin + k];
            std::copy_n(element_.batch.query.get() + i * features, features, &query[k * features]);
            if (problem_.exclude_self) excluded[k] = place_in(ranges, element_.own[i]);
          }
          task.query = query.get();
          task.excluded = problem_.exclude_self ? excluded : nullptr;
          task.total = total;
          task.shift = shift;
          task.values = values.get();
          kernels<R>().tiled_rows(task);
          for (int64_t k = 0; k < task.rows; ++k) {
            const int64_t i = rows[run.begin + k];
            if (element_.batch.odd[i] || !(total[k] > 0) || !(shift[k] <= most)) continue;
            if (!(std::log2(total[k]) - shift[k] >= least)) continue;
            double* const sums = values.get() + k * columns;
            if (products) {
              products->separate(total[k], sums, covariance.get());
              for (int64_t f = 0; f < features; ++f) {
                const double w = element_.batch.w[f], factor = w * (w / element_.batch.unit[f]);
                for (int64_t c = 0; c < channels; ++c) {
                  by_query(i)[f * channels + c] = static_cast<R>(factor * covariance[f * channels + c]);
                }
              }
            }
            write(i, shift[k], total[k], sums);
            left_[i] = 0;
          }
          if (result_.tangent_w) differentiate_directly(rows.data() + run.begin, task, window);
        });
  }

  // Tangents of the rows that a window has served, by a second look at it: the gradients for a cotangent of 1.
  void differentiate_directly(const int64_t* rows, const TiledRows<R>& sums, const TiledData<R>& window) const {
    const int64_t features = problem_.features;
    Buffer<double> first(kItemRows * features), second(kItemRows * features);
    Buffer<R> one(kItemRows * window.channel_pitch), query(kItemRows * features);
    R inverse[kItemRows], mean[kItemRows], zero[kItemRows] = {};
    double shift[kItemRows];
    int64_t excluded[kItemRows], served[kItemRows], n = 0;
    for (int64_t k = 0; k < sums.rows; ++k) {
      if (left_[rows[k]]) continue;
      inverse[n] = static_cast<R>(1 / sums.total[k]);
      shift[n] = sums.shift[k];
      mean[n] = result_.out[result_row(rows[k])] - element_.batch.centre[0];
      if (sums.excluded) excluded[n] = sums.excluded[k];
      std::copy_n(sums.query + k * features, features, &query[n * features]);
      std::fill_n(&one[n * window.channel_pitch], window.channel_pitch, R(0));
      one[n * window.channel_pitch] = 1;
      served[n++] = rows[k];
    }
    if (n == 0) return;
    TiledQueryGrad<R> task;
    task.data = window;
    task.rows = n;
    task.query = query.get();
    task.excluded = sums.excluded ? excluded : nullptr;
    task.shift = shift;
    task.inverse_total = inverse;
    task.offset_grad = mean;
    task.lse_grad = zero;
    task.value_grad = one.get();
    task.first = first.get();
    task.second = second.get();
    kernels<R>().tiled_query_grad(task);
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t f = 0; f < features; ++f) {
        const double w = element_.batch.w[f], unit = element_.batch.unit[f];
        if (result_.tangent_q) by_query(served[k])[f] = static_cast<R>(-w * ((w / unit) * first[k * features + f]));
        by_w(served[k])[f] = static_cast<R>(-(w / unit) * (second[k * features + f] / unit));
      }
    }
  }

  void sum_left_over(std::vector<int64_t> rows) {
    if (rows.empty()) return;
    std::sort(rows.begin(), rows.end());
    const LeftOverRows<R> left_over(element_, problem_, b_, std::move(rows));
    const int64_t count = left_over.problem.queries, channels = problem_.channels;
    Buffer<R> out(count * channels), lse(count);
    Buffer<double> state(2 * count);
    tiled_forward<R>(left_over.problem, {out.get(), lse.get(), state.get(), nullptr, nullptr});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = b_ * problem_.queries + left_over.rows[i];
      std::copy_n(out.get() + i * channels, channels, result_.out + row * channels);
      if (result_.lse) result_.lse[row] = lse[i];
      if (result_.state) std::copy_n(state.get() + 2 * i, 2, result_.state + 2 * row);
    }
    if (!result_.tangent_q && !result_.tangent_w) return;
    // Channel by channel: the gradient of the query is the derivative of what its cotangent picks.
    const int64_t features = problem_.features;
    Buffer<double> picked(channels);
    Buffer<R> by_query(count * features), by_w(count * features);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t other = 0; other < channels; ++other) picked[other] = other == c;
      BackwardTask<R> task{};
      task.grad_out = array_view(picked.get(), 0, 1);
      task.out = out.get();
      task.state = state.get();
      task.grad_query = by_query.get();
      if (result_.tangent_w) task.rows_grad_w = by_w.get();
      tiled_query_backward<R>(left_over.problem, task);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = b_ * problem_.queries + left_over.rows[i];
        for (int64_t f = 0; f < features; ++f) {
          const int64_t from = i * features + f, to = row * features + f;
          if (result_.tangent_q) result_.tangent_q[to * channels + c] = by_query[from];
          if (result_.tangent_w) result_.tangent_w[to] = by_w[from];
        }
      }
    }
  }

  const Problem& problem_;
  const ForwardResult<R>& result_;
  const int64_t b_;
  const bool serial_;
  Element<R> element_;
  std::vector<char> left_;  // (sorted queries) that have no result yet
};

}  // namespace

template <typename R>
bool forward(const Problem& problem, const ForwardResult<R>& result) {
  return linear::over_batch(problem,
                            [&](int64_t b, bool serial) { return Forward<R>(problem, result, b, serial).run(); });
}
template bool forward<float>(const Problem&, const ForwardResult<float>&);
template bool forward<double>(const Problem&, const ForwardResult<double>&);

}  // namespace grid
}  // namespace nwfast
