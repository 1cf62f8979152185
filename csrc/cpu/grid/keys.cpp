// Gradients of keys, values and key weights: the transposed sums. Rows are the sources, with what reaches them over
// their totals as charges, and keys the targets.
//
//   V_jc = sum_i g_ic K_ij / S_i,   H_j = sum_i (<g_i, out_i> - h_i) K_ij / S_i     (h the gradient of lse)
//   grad value = a_j V_jc,   grad weight = sum_c v_jc V_jc - H_j,   grad key = a_j (sum_c v_jc dV_jc - dH_j)
//
// with derivatives by the place of the key, and values and outputs about the centre of values. Rows whose total is
// small (far from all keys, or next to light ones) take their sums one by one, and what is beyond that goes to the
// dense driver.

#include "crowded.h"
#include "row_gradients.h"

namespace nwfast {
namespace grid {
namespace {

constexpr int64_t kKeyRun = 64;          // keys that are summed for at once
constexpr double kMostOwnGradient = 64;  // times the mean, of what reaches a row that its own key leaves out

template <typename R>
class KeyBackward {
 public:
  KeyBackward(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial)
      : problem_(problem), task_(task), b_(b), serial_(serial) {}

  bool run() {
    const int64_t channels = problem_.channels, features = problem_.features;
    if (problem_.queries == 0) return false;
    const int order = task_.grad_key ? 1 : 0;
    if (!element_.prepare(problem_, b_, order, Values::kBackward, false, serial_)) {
      return false;
    }
    gradients_ = std::make_unique<RowGradients<R>>(element_, problem_, task_, b_, serial_);
    if (weighs_left_out()) return false;
    const int64_t n = element_.keys.n, m = element_.queries.n;
    sum_value_.assign(n * channels, 0);
    sum_weight_.assign(n, 0);
    sum_key_.assign(n * features, 0);
    std::vector<int64_t> heavy, light[kLevels];
    choose_rows(heavy, light);
    std::vector<char> direct(element_.keys.boxes.size(), 1);
    if (!heavy.empty() && m > 0) {
      std::vector<int64_t> boxes =
          choose_boxes(element_.plan, element_.queries, element_.keys, static_cast<int>(channels) + 1, order, serial_);
      for (const int64_t box : boxes) direct[box] = 0;
      if (!boxes.empty()) expand(heavy, std::move(boxes), order);
      sum_directly(heavy, element_.plan.radius, direct);
    }
    std::fill(direct.begin(), direct.end(), 1);
    for (int level = 0; level < kLevels; ++level) {
      sum_directly(light[level], element_.plan.radius_at(kLevelDistance[level]), direct);
    }
    if (!gradients_->left_over.empty()) sum_left_over();
    write();
    return true;
  }

 private:
  // Whether the gradients of weights of left-out keys are asked for, which may lie nearer to rows than all that count.
  bool weighs_left_out() const {
    if (!problem_.key_weight.data || task_.grad_key || task_.grad_value) return false;
    for (int64_t j = 0; j < element_.keys.n; ++j) {
      if (element_.weight(j) == 0) return true;
    }
    return false;
  }

  // Rows that are expanded, and the others by the reach of their sums.
  void choose_rows(std::vector<int64_t>& heavy, std::vector<int64_t> (&light)[kLevels]) {
    const int64_t m = element_.queries.n, channels = problem_.channels;
    const double least = std::log2(kLeastTotal);
    std::vector<double> mean(channels + 1);
    const auto size = [&](int64_t i, int64_t c) {
      return std::fabs(c < channels ? gradients_->out[i * channels + c] : gradients_->lse[i]) * gradients_->total[i];
    };
    double count = 0;
    for (int64_t i = 0; problem_.exclude_self && i < m; ++i) {
      if (gradients_->level[i] > 0 || !(gradients_->log_total[i] >= least)) continue;
      ++count;
      for (int64_t c = 0; c <= channels; ++c) mean[c] += size(i, c);
    }
    for (int64_t i = 0; i < m; ++i) {
      const char level = gradients_->level[i];
      if (level == RowGradients<R>::kIdle) continue;
      bool expands = level == 0 && gradients_->log_total[i] >= least;
      for (int64_t c = 0; expands && problem_.exclude_self && c <= channels; ++c) {
        expands = size(i, c) * count <= kMostOwnGradient * mean[c];
      }
      if (expands) {
        heavy.push_back(i);
      } else if (level < kLevels) {
        light[static_cast<int>(level)].push_back(i);
      } else {
        gradients_->left_over.push_back(element_.queries.order[i]);
      }
    }
  }

  void expand(const std::vector<int64_t>& heavy, std::vector<int64_t> boxes, int order) {
    fill_matrices(element_.plan);
    const int64_t channels = problem_.channels, features = problem_.features;
    const int columns = static_cast<int>(channels) + 1;
    std::vector<char> counts(element_.queries.n, 0);
    for (const int64_t i : heavy) counts[i] = 1;
    // Column 0 has what is not a channel's.
    const auto load = [&](int64_t begin, int64_t n, double* charge, int64_t pitch) {
      for (int64_t k = 0; k < n; ++k) {
        const int64_t i = begin + k, row = b_ * problem_.queries + element_.queries.order[i];
        const double factor = counts[i] ? gradients_->total[i] : 0;
        double rest = -gradients_->lse[i];
        for (int64_t c = 0; c < channels; ++c) {
          const double grad = counts[i] ? gradients_->out[i * channels + c] : 0;
          charge[(c + 1) * pitch + k] = grad * factor;
          const double mean = static_cast<double>(task_.out[row * channels + c]) - element_.batch.centre[c];
          if (counts[i]) rest += grad * mean;
        }
        charge[k] = counts[i] ? rest * factor : 0;
      }
    };
    std::vector<int64_t> row_of_key;
    if (problem_.exclude_self) {
      row_of_key.assign(element_.keys.n, -1);
      for (const int64_t i : heavy) row_of_key[element_.own[i]] = i;
    }
    const int slots = order == 0 ? 1 : 4;
    Expansion<R> expansion{element_.plan,
                           element_.queries,
                           element_.keys,
                           std::move(boxes),
                           columns,
                           order,
                           load,
                           [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double) {
                             std::vector<double> row(slots * columns), own(columns);
                             for (int64_t k = 0; k < n; ++k) {
                               const int64_t j = begin + k;
                               for (int s = 0; s < slots * columns; ++s) row[s] = sums[s * pitch + k];
                               if (problem_.exclude_self && row_of_key[j] >= 0) {
                                 load(row_of_key[j], 1, own.data(), 1);
                                 subtract_own(row_of_key[j], j, own, order, row);
                               }
                               const double weight = element_.weight(j);
                               double pulled = -row[0];
                               for (int64_t c = 0; c < channels; ++c) {
                                 sum_value_[j * channels + c] += weight * row[c + 1];
                                 pulled += element_.value(j, c) * row[c + 1];
                               }
                               sum_weight_[j] += pulled / element_.batch.weight_unit;
                               for (int a = 0; order > 0 && a < kAxes; ++a) {
                                 const Axis& axis = element_.plan.axis[a];
                                 if (axis.feature < 0) continue;
                                 const double* const slope = row.data() + (1 + a) * columns;
                                 double moved = -slope[0];
                                 for (int64_t c = 0; c < channels; ++c) moved += element_.value(j, c) * slope[c + 1];
                                 sum_key_[j * features + axis.feature] += weight * moved * axis.to_local();
                               }
                             }
                           }};
    expansion.run(serial_);
  }

  void subtract_own(int64_t i, int64_t j, const std::vector<double>& charge, int order,
                    std::vector<double>& row) const {
    const int columns = static_cast<int>(problem_.channels) + 1;
    const double kernel = std::exp(-element_.square(i, j) / 2);
    for (int column = 0; column < columns; ++column) row[column] -= charge[column] * kernel;
    for (int a = 0; order > 0 && a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0) continue;
      const double x = element_.queries.axis(element_.plan, a)[i], u = element_.keys.axis(element_.plan, a)[j];
      const double slope = kernel * (x - u) * axis.scale * axis.half;
      for (int column = 0; column < columns; ++column) row[(1 + a) * columns + column] -= charge[column] * slope;
    }
  }

  // Of some rows, at the keys of some boxes.
  void sum_directly(const std::vector<int64_t>& rows, double radius, const std::vector<char>& boxes) {
    if (rows.empty() || std::find(boxes.begin(), boxes.end(), 1) == boxes.end()) return;
    const int64_t features = problem_.features, channels = problem_.channels;
    const TiledBatch<R>& batch = element_.batch;
    const int64_t pitch = batch.data.channel_pitch;
    PackedRows<R> packed;
    packed.pack(element_, *gradients_, task_.out, problem_, b_, rows);
    std::vector<Run> runs;
    for (size_t i = 0; i < boxes.size(); ++i) {
      const Box& box = element_.keys.boxes[i];
      for (int64_t begin = box.begin; boxes[i] && begin < box.end; begin += kKeyRun) {
        runs.push_back({box.cell, begin, std::min(box.end, begin + kKeyRun)});
      }
    }
    const int64_t count = static_cast<int64_t>(runs.size());
    parallel_blocks((count + kItemTask - 1) / kItemTask, serial_, [&](int64_t block) {
      WindowFinder finder(element_.plan, packed.boxes, radius);
      std::vector<WindowFinder::Range> ranges;
      Buffer<R> query, value_grad, offset_grad, lse_grad, inverse;
      Buffer<double> shift;
      Buffer<int64_t> own;
      Buffer<double> by_value(kKeyRun * channels), by_weight(kKeyRun), by_offset(kKeyRun * features);
      int64_t cell = -1, found = 0;
      for (int64_t r = block * kItemTask; r < std::min(count, (block + 1) * kItemTask); ++r) {
        const Run& run = runs[r];
        if (run.cell != cell) {
          cell = run.cell;
          found = finder.find(cell, ranges);
          collect(packed.query.get(), features, ranges, found, query);
          collect(packed.value_grad.get(), pitch, ranges, found, value_grad);
          collect(packed.offset_grad.get(), 1, ranges, found, offset_grad);
          collect(packed.lse_grad.get(), 1, ranges, found, lse_grad);
          collect(packed.inverse.get(), 1, ranges, found, inverse);
          collect(packed.shift.get(), 1, ranges, found, shift);
          if (problem_.exclude_self) collect(packed.own.get(), 1, ranges, found, own);
        }
        if (found == 0) continue;
        TiledKeyGrad<R> task;
        task.data = batch.data;
        task.key_begin = run.begin;
        task.key_end = run.end;
        task.rows = found;
        task.query = query.get();
        task.excluded = problem_.exclude_self ? own.get() : nullptr;
        task.shift = shift.get();
        task.inverse_total = inverse.get();
        task.offset_grad = offset_grad.get();
        task.lse_grad = lse_grad.get();
        task.value_grad = value_grad.get();
        task.sum_value = by_value.get();
        task.sum_weight = by_weight.get();
        task.sum_offset = by_offset.get();
        kernels<R>().tiled_key_grad(task);
        for (int64_t j = run.begin; j < run.end; ++j) {
          const int64_t i = j - run.begin;
          const double weight = element_.weight(j);
          sum_weight_[j] += by_weight[i] / batch.weight_unit;
          if (weight == 0) continue;  // no product of 0 and an overflow
          for (int64_t c = 0; c < channels; ++c) sum_value_[j * channels + c] += weight * by_value[i * channels + c];
          for (int64_t f = 0; f < features; ++f) {
            const double w = batch.w[f];
            sum_key_[j * features + f] += w * ((w / batch.unit[f]) * (weight * by_offset[i * features + f]));
          }
        }
      }
    });
  }

  template <typename V>
  static void collect(const V* from, int64_t width, const std::vector<WindowFinder::Range>& ranges, int64_t n,
                      Buffer<V>& to) {
    to.allocate(n * width);
    V* place = to.get();
    for (const auto& range : ranges) place = std::copy(from + range.begin * width, from + range.end * width, place);
  }

  void sum_left_over() {
    const int64_t n = element_.keys.n, features = problem_.features, channels = problem_.channels;
    std::vector<int64_t> rows = gradients_->left_over;
    std::sort(rows.begin(), rows.end());
    LeftOverBackward<R> left_over(element_, problem_, task_, b_, std::move(rows));
    Buffer<R> key(n * features), value(n * channels), weight(n);
    left_over.task.grad_key = task_.grad_key ? key.get() : nullptr;
    left_over.task.grad_value = task_.grad_value ? value.get() : nullptr;
    left_over.task.grad_key_weight = task_.grad_key_weight ? weight.get() : nullptr;
    tiled_key_backward<R>(left_over.rows.problem, left_over.task);
    for (int64_t i = 0; task_.grad_key && i < n * features; ++i) sum_key_[i] += key[i];
    for (int64_t i = 0; task_.grad_value && i < n * channels; ++i) sum_value_[i] += value[i];
    for (int64_t i = 0; task_.grad_key_weight && i < n; ++i) sum_weight_[i] += weight[i];
  }

  void write() const {
    const int64_t n = element_.keys.n, features = problem_.features, channels = problem_.channels;
    parallel_blocks((n + kPointTask - 1) / kPointTask, serial_, [&](int64_t part) {
      for (int64_t j = part * kPointTask; j < std::min(n, (part + 1) * kPointTask); ++j) {
        const int64_t to = b_ * n + element_.keys.order[j];
        for (int64_t f = 0; task_.grad_key && f < features; ++f) {
          task_.grad_key[to * features + f] = static_cast<R>(sum_key_[j * features + f]);
        }
        for (int64_t c = 0; task_.grad_value && c < channels; ++c) {
          task_.grad_value[to * channels + c] = static_cast<R>(sum_value_[j * channels + c]);
        }
        if (task_.grad_key_weight) task_.grad_key_weight[to] = static_cast<R>(sum_weight_[j]);
      }
    });
  }

  const Problem& problem_;
  const BackwardTask<R>& task_;
  const int64_t b_;
  const bool serial_;
  Element<R> element_;
  std::unique_ptr<RowGradients<R>> gradients_;
  std::vector<double> sum_value_, sum_weight_, sum_key_;  // by the place of keys
};

}  // namespace

template <typename R>
bool key_backward(const Problem& problem, const BackwardTask<R>& task) {
  return linear::over_batch(problem,
                            [&](int64_t b, bool serial) { return KeyBackward<R>(problem, task, b, serial).run(); });
}
template bool key_backward<float>(const Problem&, const BackwardTask<float>&);
template bool key_backward<double>(const Problem&, const BackwardTask<double>&);

}  // namespace grid
}  // namespace nwfast
