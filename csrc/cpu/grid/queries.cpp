// Gradients of queries and w (derivatives.h), where the forward pass left no tangents.

#include <optional>

#include "crowded.h"
#include "derivatives.h"
#include "row_gradients.h"

namespace nwfast {
namespace grid {
namespace {

template <typename R>
class QueryBackward {
 public:
  QueryBackward(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial)
      : problem_(problem), task_(task), b_(b), serial_(serial) {}

  bool run() {
    const int64_t m = problem_.queries, features = problem_.features;
    const int order = task_.grad_w ? 2 : 1;
    if (!element_.prepare(problem_, b_, order, Values::kBackward, true, serial_)) {
      return false;
    }
    if (task_.grad_query) std::fill_n(task_.grad_query + b_ * m * features, m * features, R(0));
    gradients_ = std::make_unique<RowGradients<R>>(element_, problem_, task_, b_, serial_);
    const int64_t rows = element_.queries.n;
    by_w_.allocate(task_.grad_w ? rows * features : 0);
    for (int64_t i = 0; task_.grad_w && i < rows * features; ++i) by_w_[i] = 0;
    derivatives_.emplace(element_, order);
    if (rows > 0) {
      std::vector<int64_t> boxes = choose_boxes(element_.plan, element_.keys, element_.queries, derivatives_->columns,
                                                derivatives_->order, serial_);
      if (!boxes.empty()) {
        const auto wanted = [&](int64_t i) { return gradients_->level[i] != RowGradients<R>::kIdle; };
        expand_queries(element_, *derivatives_, std::move(boxes), serial_, wanted, [&](int64_t i, const double* row) {
          differentiate(i, row);
          gradients_->level[i] = RowGradients<R>::kIdle;
        });
      }
      for (int level = 0; level < kLevels; ++level) sum_directly(level);
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (gradients_->level[i] == kLevels) gradients_->left_over.push_back(element_.queries.order[i]);
    }
    std::vector<double> grad_w(features, 0);
    for (int64_t i = 0; task_.grad_w && i < rows; ++i) {
      for (int64_t f = 0; f < features; ++f) grad_w[f] += by_w_[i * features + f];
    }
    if (!gradients_->left_over.empty()) sum_left_over(grad_w);
    for (int64_t f = 0; task_.grad_w && f < features; ++f) task_.grad_w[b_ * features + f] = grad_w[f];
    return true;
  }

 private:
  int64_t result_row(int64_t i) const { return b_ * problem_.queries + element_.queries.order[i]; }

  // row (slots, columns): see GridEvaluate.
  void differentiate(int64_t i, const double* row) {
    const int64_t channels = problem_.channels, features = problem_.features;
    const Derivatives<R>& of = *derivatives_;
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0 || axis.scale == 0) continue;
      const double by_lse = gradients_->lse[i];
      double by_query = by_lse * (of.first(a, row, 0) / row[0]) * axis.to_local(), by_w = 0;
      if (task_.grad_w && by_lse != 0) {
        by_w = -by_lse * ((of.squares(a, row, 0, i) + of.left_out(a, row)) / row[0]) / element_.w(axis.feature);
      }
      for (int64_t c = 1; c <= channels; ++c) {
        const double grad = gradients_->out[i * channels + c - 1];
        by_query += grad * of.by_query(a, row, c);
        if (task_.grad_w) by_w += grad * of.by_w(a, row, c, i);
      }
      if (task_.grad_query) task_.grad_query[result_row(i) * features + axis.feature] = static_cast<R>(by_query);
      if (task_.grad_w) by_w_[i * features + axis.feature] = by_w;
    }
  }

  void sum_directly(int level) {
    const int64_t features = problem_.features;
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < element_.queries.n; ++i) {
      if (gradients_->level[i] == level) rows.push_back(i);
    }
    if (rows.empty()) return;
    PackedRows<R> packed;
    packed.pack(element_, *gradients_, task_.out, problem_, b_, rows);
    const TiledBatch<R>& batch = element_.batch;
    const auto body = [&](const Run& run, const TiledData<R>& data, const std::vector<WindowFinder::Range>& ranges,
                          double least) {
      Buffer<double> first(kItemRows * features), second(kItemRows * features);
      int64_t excluded[kItemRows];
      TiledQueryGrad<R> task;
      task.data = data;
      task.rows = run.end - run.begin;
      for (int64_t k = 0; problem_.exclude_self && k < task.rows; ++k) {
        excluded[k] = place_in(ranges, packed.own[run.begin + k]);
      }
      task.query = packed.query.get() + run.begin * features;
      task.excluded = problem_.exclude_self ? excluded : nullptr;
      task.shift = packed.shift.get() + run.begin;
      task.inverse_total = packed.inverse.get() + run.begin;
      task.offset_grad = packed.offset_grad.get() + run.begin;
      task.lse_grad = packed.lse_grad.get() + run.begin;
      task.value_grad = packed.value_grad.get() + run.begin * data.channel_pitch;
      task.first = first.get();
      task.second = second.get();
      kernels<R>().tiled_query_grad(task);
      for (int64_t k = 0; k < task.rows; ++k) {
        const int64_t i = rows[run.begin + k];
        if (!(gradients_->log_total[i] >= least)) continue;
        for (int64_t f = 0; f < features; ++f) {
          const double w = batch.w[f], unit = batch.unit[f];
          if (task_.grad_query) {
            task_.grad_query[result_row(i) * features + f] =
                static_cast<R>(-w * ((w / unit) * first[k * features + f]));
          }
          if (task_.grad_w) by_w_[i * features + f] = -(w / unit) * (second[k * features + f] / unit);
        }
        gradients_->level[i] = RowGradients<R>::kIdle;
      }
    };
    over_windows(element_, runs_of(element_.queries, rows), level, serial_, body);
    for (const int64_t i : rows) {
      if (gradients_->level[i] == level) gradients_->level[i] = static_cast<char>(level + 1);
    }
  }

  void sum_left_over(std::vector<double>& grad_w) {
    const int64_t features = problem_.features;
    std::vector<int64_t> rows = gradients_->left_over;
    std::sort(rows.begin(), rows.end());
    LeftOverBackward<R> left_over(element_, problem_, task_, b_, std::move(rows));
    const int64_t count = left_over.rows.problem.queries;
    Buffer<R> grad_query(count * features);
    Buffer<double> by_w(features);
    if (task_.grad_query) left_over.task.grad_query = grad_query.get();
    if (task_.grad_w) left_over.task.grad_w = by_w.get();
    tiled_query_backward<R>(left_over.rows.problem, left_over.task);
    for (int64_t i = 0; task_.grad_query && i < count; ++i) {
      std::copy_n(grad_query.get() + i * features, features,
                  task_.grad_query + (b_ * problem_.queries + left_over.rows.rows[i]) * features);
    }
    for (int64_t f = 0; task_.grad_w && f < features; ++f) grad_w[f] += by_w[f];
  }

  const Problem& problem_;
  const BackwardTask<R>& task_;
  const int64_t b_;
  const bool serial_;
  Element<R> element_;
  std::unique_ptr<RowGradients<R>> gradients_;
  Buffer<double> by_w_;  // (rows, features) what each row adds to the gradient of w
  std::optional<Derivatives<R>> derivatives_;
};

}  // namespace

template <typename R>
bool query_backward(const Problem& problem, const BackwardTask<R>& task) {
  return linear::over_batch(problem,
                            [&](int64_t b, bool serial) { return QueryBackward<R>(problem, task, b, serial).run(); });
}
template bool query_backward<float>(const Problem&, const BackwardTask<float>&);
template bool query_backward<double>(const Problem&, const BackwardTask<double>&);

}  // namespace grid
}  // namespace nwfast
