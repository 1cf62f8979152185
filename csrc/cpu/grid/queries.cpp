// Gradients of queries and w: derivatives of the same series by the place in a box.
//
// With S and N the total of a row and its sum for a channel, out = N / S and d out / d x = (dN / dx - out dS / dx) / S.
// By w, since z^2 K = d^2 K / dz^2 + K for the kernel K, d out / d w = -(d^2 N / dz^2 - out d^2 S / dz^2) / (w S) with
// z in bandwidths. Where all distances along a feature are small beside the bandwidth, the second derivative is -1 but
// for little: there sum c (s - t)^2 K is what the first derivatives of two sums differ by, that of charges c times s
// and that of charges c t, with places t of the keys.

#include "crowded.h"
#include "row_gradients.h"

namespace nwfast {
namespace grid {
namespace {

constexpr double kFlatHalf = 0.5;  // half width of an axis of one cell, in bandwidths, below which distances are small

template <typename R>
class QueryBackward {
 public:
  QueryBackward(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial)
      : problem_(problem), task_(task), b_(b), serial_(serial) {}

  bool run() {
    const int64_t m = problem_.queries, features = problem_.features, channels = problem_.channels;
    const int order = task_.grad_w ? 2 : 1;
    if (!element_.prepare(problem_, b_, order, Values::kBackward, true, serial_)) {
      return false;
    }
    if (task_.grad_query) std::fill_n(task_.grad_query + b_ * m * features, m * features, R(0));
    gradients_ = std::make_unique<RowGradients<R>>(element_, problem_, task_, b_, serial_);
    const int64_t rows = element_.queries.n;
    by_w_.allocate(task_.grad_w ? rows * features : 0);
    for (int64_t i = 0; task_.grad_w && i < rows * features; ++i) by_w_[i] = 0;
    columns_ = static_cast<int>(channels) + 1;
    order_ = 1;
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      flat_[a] = axis.single && axis.half < kFlatHalf;
      if (axis.feature >= 0 && task_.grad_w && flat_[a]) {
        flat_column_[a] = columns_;
        columns_ += static_cast<int>(channels) + 1;
      }
      if (axis.feature >= 0 && task_.grad_w && !flat_[a]) order_ = 2;
    }
    if (rows > 0) {
      std::vector<int64_t> boxes =
          choose_boxes(element_.plan, element_.keys, element_.queries, columns_, order_, serial_);
      if (!boxes.empty()) expand(std::move(boxes));
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

  void load(int64_t begin, int64_t n, double* charge, int64_t pitch) const {
    element_.load(begin, n, charge, pitch);
    const int channels = static_cast<int>(problem_.channels);
    for (int a = 0; a < kAxes; ++a) {
      if (flat_column_[a] == 0) continue;
      for (int64_t j = 0; j < n; ++j) {
        const double place = key_place(a, begin + j);
        for (int c = 0; c <= channels; ++c) {
          charge[(flat_column_[a] + c) * pitch + j] = charge[c * pitch + j] * place;
        }
      }
    }
  }
  double key_place(int a, int64_t j) const {
    const Axis& axis = element_.plan.axis[a];
    return (static_cast<double>(element_.keys.axis(element_.plan, a)[j]) - axis.middle) * axis.to_local();
  }
  double query_place(int a, int64_t i) const {
    const Axis& axis = element_.plan.axis[a];
    return (static_cast<double>(element_.queries.axis(element_.plan, a)[i]) - axis.middle) * axis.to_local();
  }

  void expand(std::vector<int64_t> boxes) {
    fill_matrices(element_.plan);
    const double tail = Plan::beyond(element_.plan.radius) * element_.mass;
    const int slots = order_ == 1 ? 4 : 7;
    Expansion<R> expansion{
        element_.plan,
        element_.keys,
        element_.queries,
        std::move(boxes),
        columns_,
        order_,
        [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { load(begin, n, charge, pitch); },
        [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound) {
          const double error = error_of(element_.plan, bound) + tail;
          std::vector<double> row(slots * columns_), own(columns_);
          for (int64_t k = 0; k < n; ++k) {
            const int64_t i = begin + k;
            if (gradients_->level[i] == RowGradients<R>::kIdle) continue;
            for (int s = 0; s < slots * columns_; ++s) row[s] = sums[s * pitch + k];
            if (problem_.exclude_self) {
              load(element_.own[i], 1, own.data(), 1);
              if (!element_.subtract_own(i, own.data(), columns_, order_, row.data())) continue;
            }
            if (!(row[0] * Accuracy<R>::kAccept >= error)) continue;
            differentiate(i, row);
            gradients_->level[i] = RowGradients<R>::kIdle;
          }
        }};
    expansion.run(serial_);
  }

  // row (slots, columns): see GridEvaluate.
  void differentiate(int64_t i, const std::vector<double>& row) {
    const int64_t channels = problem_.channels, features = problem_.features;
    const double total = row[0];
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0 || axis.scale == 0) continue;
      const double* const first = row.data() + (1 + a) * columns_;
      const double* const second = order_ == 2 ? row.data() + (4 + a) * columns_ : nullptr;
      const double by_lse = gradients_->lse[i];
      double by_query = by_lse * first[0] / total, by_w = 0;
      // sum c z^2 K; with channels less what cancels in the difference.
      const double place = flat_column_[a] ? query_place(a, i) : 0, square = axis.half * axis.half;
      const auto scores = [&](int64_t c) {
        return flat_column_[a] ? first[flat_column_[a] + c] - place * first[c] : second[c] / square;
      };
      const double all = task_.grad_w ? scores(0) : 0;
      if (task_.grad_w && by_lse != 0) by_w = by_lse * ((all + (flat_column_[a] ? 0 : total)) / total);
      for (int64_t c = 1; c <= channels; ++c) {
        const double grad = gradients_->out[i * channels + c - 1], mean = row[c] / total;
        by_query += grad * ((first[c] - mean * first[0]) / total);
        if (task_.grad_w) by_w += grad * ((scores(c) - mean * all) / total);
      }
      if (task_.grad_query) {
        task_.grad_query[result_row(i) * features + axis.feature] = static_cast<R>(by_query * axis.to_local());
      }
      if (task_.grad_w) by_w_[i * features + axis.feature] = -by_w / element_.w(axis.feature);
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
  int columns_ = 0, order_ = 1;
  bool flat_[kAxes];
  int flat_column_[kAxes] = {};  // the first column of charges times places along an axis, 0 for none
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
