// The forward pass of the linear method in two and three features.

#include "choose.h"
#include "direct.h"

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
    if (!element_.prepare(problem_, b_, 0, Values::kForward, true, serial_)) return false;
    const int64_t m = element_.queries.n;
    std::vector<int64_t> left_over = element_.outside;
    left_.assign(m, 1);
    std::vector<int64_t> expanded;
    if (m > 0) expanded = choose_boxes(element_.plan, element_.keys, element_.queries, columns, 0, serial_);
    if (!expanded.empty()) expand(std::move(expanded), columns);
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

  void expand(std::vector<int64_t> boxes, int columns) {
    fill_matrices(element_.plan);
    const double tail = Plan::beyond(element_.plan.radius) * element_.mass;
    const int64_t channels = problem_.channels;
    Expansion<R> expansion{
        element_.plan,
        element_.keys,
        element_.queries,
        std::move(boxes),
        columns,
        0,
        [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { element_.load(begin, n, charge, pitch); },
        [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound) {
          const double error = error_of(element_.plan, bound) + tail;
          std::vector<double> rest(channels);
          for (int64_t k = 0; k < n; ++k) {
            double total = sums[k];
            const double* values = sums + pitch + k;
            int64_t stride = pitch;
            if (problem_.exclude_self) {
              for (int64_t c = 0; c < channels; ++c) rest[c] = values[c * pitch];
              if (!subtract_own(begin + k, total, rest.data())) continue;
              values = rest.data();
              stride = 1;
            }
            if (!(total * Accuracy<R>::kAccept >= error)) continue;
            write(begin + k, 0, total, values, stride);
            left_[begin + k] = 0;
          }
        }};
    expansion.run(serial_);
  }

  // Takes the row's own key out of its sums. False where that was most of them.
  bool subtract_own(int64_t i, double& total, double* values) const {
    const int64_t j = element_.own[i];
    const double weight = element_.weight(j) * std::exp(-element_.square(i, j) / 2);
    total -= weight;
    bool keeps = total >= kLeastOthers * weight;
    for (int64_t c = 0; c < problem_.channels && keeps; ++c) {
      const double own = weight * element_.value(j, c);
      values[c] -= own;
      keeps = linear::kMostOwnValue * std::fabs(values[c]) >= std::fabs(own) || !element_.stands_out(j, c);
    }
    return keeps;
  }

  void sum_directly(const std::vector<int64_t>& rows, int level) {
    const double most = most_score<R, R>(problem_);
    const int64_t features = problem_.features, channels = problem_.channels;
    over_windows(
        element_, runs_of(element_.queries, rows), level, serial_,
        [&](const Run& run, const TiledData<R>& data, const std::vector<WindowFinder::Range>& ranges, double least) {
          double total[kItemRows], shift[kItemRows];
          int64_t excluded[kItemRows];
          Buffer<double> values(kItemRows * channels);
          Buffer<R> query(kItemRows * features);
          TiledRows<R> task;
          task.data = data;
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
            write(i, shift[k], total[k], values.get() + k * channels, 1);
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
