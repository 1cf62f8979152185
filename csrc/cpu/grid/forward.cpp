// The forward pass of the linear method in two and three features, with tangents of the query for any number of
// channels.

#include <optional>

#include "crowded.h"
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
    const int columns = static_cast<int>(problem_.channels) + 1;
    const int order = result_.tangent_q ? 1 : 0;
    // Products are made of values in columns.
    if (!element_.prepare(problem_, b_, order, order > 0 ? Values::kBackward : Values::kForward, true, serial_)) {
      return false;
    }
    const int64_t m = element_.queries.n;
    std::vector<int64_t> left_over = element_.outside;
    left_.assign(m, 1);
    std::vector<int64_t> expanded;
    if (m > 0) expanded = choose_boxes(element_.plan, element_.keys, element_.queries, columns, order, serial_);
    if (!expanded.empty()) expand(std::move(expanded), columns, order);
    for (int level = 0; level < kLevels; ++level) {
      std::vector<int64_t> rows;
      for (int64_t i = 0; i < m; ++i) {
        if (left_[i]) rows.push_back(i);
      }
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
  // total and values (with `stride`) are sums relative to 2^-shift.
  void write(int64_t i, double shift, double total, const double* values, int64_t stride) const {
    const TiledBatch<R>& batch = element_.batch;
    write_row(result_, b_ * problem_.queries + element_.queries.order[i], problem_.channels, batch.centre.get(),
              batch.values.get(), shift, total, batch.weight_unit, values, stride);
  }

  // (features, channels) of a row.
  R* tangent_of(int64_t i) const {
    const int64_t row = b_ * problem_.queries + element_.queries.order[i];
    return result_.tangent_q + row * problem_.features * problem_.channels;
  }

  void expand(std::vector<int64_t> boxes, int columns, int order) {
    fill_matrices(element_.plan);
    const double tail = Plan::beyond(element_.plan.radius) * element_.mass;
    const int slots = order > 0 ? 4 : 1;
    Expansion<R> expansion{
        element_.plan,
        element_.keys,
        element_.queries,
        std::move(boxes),
        columns,
        order,
        [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { element_.load(begin, n, charge, pitch); },
        [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound) {
          const double error = error_of(element_.plan, bound) + tail;
          std::vector<double> row(slots * columns), own(columns);
          for (int64_t k = 0; k < n; ++k) {
            const double* from = sums + k;
            int64_t stride = pitch;
            if (problem_.exclude_self) {
              for (int s = 0; s < slots * columns; ++s) row[s] = sums[s * pitch + k];
              element_.load(element_.own[begin + k], 1, own.data(), 1);
              if (!element_.subtract_own(begin + k, own.data(), columns, order, row.data())) continue;
              from = row.data();
              stride = 1;
            }
            if (!(from[0] * Accuracy<R>::kAccept >= error)) continue;
            write(begin + k, 0, from[0], from + stride, stride);
            if (order > 0) differentiate(begin + k, from, columns, stride);
            left_[begin + k] = 0;
          }
        }};
    expansion.run(serial_);
  }

  // sums (slots, columns) with a stride: see GridEvaluate.
  void differentiate(int64_t i, const double* sums, int columns, int64_t stride) const {
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0) continue;
      R* const tangent = tangent_of(i) + axis.feature * problem_.channels;
      const double* const first = sums + (1 + a) * columns * stride;
      const double factor = axis.scale == 0 ? 0 : axis.to_local() / sums[0];
      for (int c = 1; c < columns; ++c) {
        const double mean = sums[c * stride] / sums[0];
        tangent[c - 1] = static_cast<R>((first[c * stride] - mean * first[0]) * factor);
      }
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
          if (result_.tangent_q) products.emplace(window);
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
                  tangent_of(i)[f * channels + c] = static_cast<R>(factor * covariance[f * channels + c]);
                }
              }
            }
            write(i, shift[k], total[k], sums, 1);
            left_[i] = 0;
          }
        });
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
    if (!result_.tangent_q) return;
    // Channel by channel: the gradient of the query is the derivative of what its cotangent picks.
    const int64_t features = problem_.features;
    Buffer<double> picked(channels);
    Buffer<R> grad(count * features);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t other = 0; other < channels; ++other) picked[other] = other == c;
      BackwardTask<R> task{};
      task.grad_out.data = picked.get();
      task.grad_out.dtype = Dtype::kDouble;
      task.grad_out.column_stride = 1;
      task.out = out.get();
      task.state = state.get();
      task.grad_query = grad.get();
      tiled_query_backward<R>(left_over.problem, task);
      for (int64_t i = 0; i < count; ++i) {
        R* const tangent = result_.tangent_q + (b_ * problem_.queries + left_over.rows[i]) * features * channels;
        for (int64_t f = 0; f < features; ++f) tangent[f * channels + c] = grad[i * features + f];
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
