// Local lines of rows in two and three features: the forward pass with moments of the keys about each row.
//
// With a row's weights, places u of keys and x of the row in bandwidths, and the sums S of weights and T of weights
// times values as functions of x, their derivatives are all moments:
//   E[u_f] - x_f = S_f / S,   Cov(u_f, u_g) = [f = g] + S_fg / S - S_f S_g / S^2,   Cov(u_f, v) = (T_f - m S_f) / S
// with m = T / S. So boxes have charges for weights and values alone, and only those of weights have second
// derivatives. In windows the moments are summed about the row (kernels/moments.h). What line they determine is said in
// nwfast/backends/local_linear.py. Rows for which it would have to weigh whether a variance is rounding are left to the
// caller, as are those that neither boxes nor windows settle.

#include "local_linear.h"

#include <mutex>

#include "crowded.h"
#include "direct.h"
#include "row_moments.h"

namespace nwfast {
namespace grid {
namespace {

constexpr int kPairAxes[kPairSlots][2] = {{0, 0}, {1, 1}, {2, 2}, {0, 1}, {0, 2}, {1, 2}};

// The least eigenvalue of S in bandwidths, about, that is far above the error of sums: of boxes, of windows in the
// precision of the data, and of windows in double, about the mean.
template <typename R>
constexpr double kLeastInBox = sizeof(R) == 4 ? 0.03 : 0.01;
template <typename R>
constexpr double kLeastInWindow = sizeof(R) == 4 ? 0.1 : 0.01;
constexpr double kLeastExact = 1e-3;
// A share of all rows, up to which those that boxes determine badly are summed in windows, however many keys these
// have.
constexpr int64_t kFewRows = 64;
constexpr double kFewPairs = 1e9;        // of rows and keys, up to which rows that no window settles meet all keys
constexpr double kMostPacked = 0x1p40;   // coordinates of such rows, in about bandwidths
constexpr double kNegligibleScore = 52;  // in base 2, below that of the nearest key: others are left out
// Beyond so many times the tolerance of nwfast/backends/local_linear.py no direction is faded.
constexpr double kClear = 1e3;

constexpr int64_t kAhead = 12;  // rows whose results are fetched before they are written

template <typename R>
class LocalLinear {
 public:
  LocalLinear(const Problem& problem, const LocalLinearResult<R>& result, int64_t b, bool serial)
      : problem_(problem), result_(result), b_(b), serial_(serial), features_(static_cast<int>(problem.features)) {}

  bool run(LocalLinearRows& rest) {
    element_.moments = true;
    if (!element_.prepare(problem_, b_, 1, Values::kBackward, true, serial_)) return false;
    double extent = 0;
    for (int f = 0; f < features_; ++f) {
      extent = std::fmax(extent, (element_.key_high[f] / 2 - element_.key_low[f] / 2) * std::fabs(element_.w(f)));
    }
    tolerance_ = 1e-11 + 1e3 * 0x1p-52 * extent;
    const int64_t m = element_.queries.n;
    state_.assign(m, kWaits);
    const int columns = static_cast<int>(problem_.channels) + 1;
    std::vector<int64_t> expanded;
    if (m > 0) expanded = choose_boxes(element_.plan, element_.keys, element_.queries, columns, 1, serial_);
    if (!expanded.empty()) expand(std::move(expanded), columns);
    const bool few = std::count(state_.begin(), state_.end(), kWeak) <= m / kFewRows;
    for (int level = 0; level < kLevels; ++level) {
      std::vector<int64_t> rows;
      for (int64_t i = 0; i < m; ++i) {
        if (state_[i] == kWaits || (few && state_[i] == kWeak)) rows.push_back(i);
      }
      if (rows.empty()) break;
      sum_directly(rows, level);
    }
    std::vector<int64_t> left = element_.outside;
    for (int64_t i = 0; i < m; ++i) {
      if (state_[i] != kDone) left.push_back(element_.queries.order[i]);
    }
    sum_over_all(left);
    for (const int64_t row : left) rest.left.push_back(b_ * problem_.queries + row);
    std::sort(rest.left.begin(), rest.left.end());
    sort_records(rest);
    return true;
  }

 private:
  static constexpr char kWaits = 0, kDone = 1, kWeak = 2;  // kWeak: sums of a box are not good enough

  void expand(std::vector<int64_t> boxes, int columns) {
    const Plan& plan = element_.plan;
    fill_matrices(element_.plan);
    // What lies beyond the radius counts by its square.
    const double tail = Plan::beyond(plan.radius) * plan.radius * plan.radius * element_.mass;
    const int all = kFirstSlots * columns + kPairSlots;
    Expansion<R> expansion{
        plan,
        element_.keys,
        element_.queries,
        std::move(boxes),
        columns,
        1,
        [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { element_.load(begin, n, charge, pitch); },
        [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound) {
          const double error = (plan.moment_error + 1e-15) * bound + tail;
          std::vector<double> row(all), own(columns);
          for (int64_t k = 0; k < n; ++k) {
            if (k + kAhead < n) prefetch(element_.queries.order[begin + k + kAhead]);
            for (int s = 0; s < all; ++s) row[s] = sums[s * pitch + k];
            if (problem_.exclude_self) {
              element_.load(element_.own[begin + k], 1, own.data(), 1);
              if (!element_.subtract_own(begin + k, own.data(), columns, 1, row.data())) continue;
              subtract_own_pairs(begin + k, own[0], row.data() + kFirstSlots * columns);
            }
            state_[begin + k] = kWeak;
            if (row[0] * Accuracy<R>::kMoments >= error) differentiate(begin + k, row.data(), columns);
          }
        }};
    expansion.pairs = true;
    expansion.run(serial_);
  }

  // Results lie in the caller's order, far from one another.
  void prefetch(int64_t number) const {
    const int64_t row = b_ * problem_.queries + number, channels = problem_.channels;
    __builtin_prefetch(result_.fit + row * channels, 1);
    __builtin_prefetch(result_.slope + row * features_ * channels, 1);
    if (!result_.means) return;
    __builtin_prefetch(result_.means + row * (features_ + channels), 1);
    __builtin_prefetch(result_.inverse + row * features_ * features_, 1);
  }

  void subtract_own_pairs(int64_t i, double charge, double* pairs) const {
    const int64_t j = element_.own[i];
    double z[kAxes] = {}, half[kAxes] = {};
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0) continue;
      const double x = element_.queries.axis(element_.plan, a)[i], u = element_.keys.axis(element_.plan, a)[j];
      z[a] = (x - u) * axis.scale;
      half[a] = axis.half;
    }
    const double kernel = charge * std::exp(-(z[0] * z[0] + z[1] * z[1] + z[2] * z[2]) / 2);
    for (int s = 0; s < kPairSlots; ++s) {
      const int a = kPairAxes[s][0], b = kPairAxes[s][1];
      pairs[s] -= kernel * (z[a] * z[b] - (a == b)) * half[a] * half[b];
    }
  }

  // row: what GridEvaluate gives of a point.
  void differentiate(int64_t i, const double* row, int columns) {
    const double total = row[0], *const pairs = row + kFirstSlots * columns;
    RowMoments moments;
    double to_bandwidths[kAxes] = {};  // by axis, of derivatives
    int slot[kAxes] = {};              // of first derivatives by feature
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = element_.plan.axis[a];
      if (axis.feature < 0) continue;
      to_bandwidths[a] = 1 / (axis.half * total);
      slot[axis.feature] = 1 + a;
      moments.offset[axis.feature] = row[(1 + a) * columns] * to_bandwidths[a];
    }
    for (int s = 0; s < kPairSlots; ++s) {
      const int a = kPairAxes[s][0], b = kPairAxes[s][1];
      const int f = element_.plan.axis[a].feature, g = element_.plan.axis[b].feature;
      if (f < 0 || g < 0) continue;
      const double second = pairs[s] * to_bandwidths[a] * to_bandwidths[b] * total;
      const double spread = (a == b) + second - moments.offset[f] * moments.offset[g];
      moments.spread[f][g] = moments.spread[g][f] = spread;
    }
    const auto of_channel = [&](int64_t c, double* common) {
      const double* const value = row + 1 + c;
      const double mean = value[0] / total;
      for (int f = 0; f < features_; ++f) {
        const double first = (value[slot[f] * columns] - mean * row[slot[f] * columns]);
        common[f] = first * to_bandwidths[slot[f] - 1];
      }
      return mean;
    };
    if (solve(element_.queries.order[i], moments, kLeastInBox<R>, of_channel)) state_[i] = kDone;
  }

  double to_bandwidths(int f) const { return std::fabs(element_.batch.w[f]) / element_.batch.unit[f]; }

  void sum_directly(const std::vector<int64_t>& rows, int level) {
    const double most = most_score<R, R>(problem_);
    over_windows(
        element_, runs_of(element_.queries, rows), level, serial_,
        [&](const Run& run, const TiledData<R>& window, const std::vector<WindowFinder::Range>& ranges, double least) {
          WindowSums<R> task(features_, problem_.channels);
          for (int64_t k = 0; k < run.end - run.begin; ++k) {
            const int64_t i = rows[run.begin + k];
            std::copy_n(element_.batch.query.get() + i * features_, features_, &task.query[k * features_]);
            task.excluded[k] = problem_.exclude_self ? place_in(ranges, element_.own[i]) : -1;
          }
          task.run(window, run.end - run.begin, problem_.exclude_self);
          Records records;
          for (int64_t k = 0; k < run.end - run.begin; ++k) {
            const int64_t i = rows[run.begin + k];
            if (element_.batch.odd[i] || !(task.total[k] > 0) || !(task.shift[k] <= most)) continue;
            if (!(std::log2(task.total[k]) - task.shift[k] >= least)) continue;
            finish_window(element_.queries.order[i], task, k, window, ranges, records);
            state_[i] = kDone;
          }
          keep(records);
        });
  }

  // A row from the sums of its window, or, where these may have too few digits, from sums of their own.
  void finish_window(int64_t row, const WindowSums<R>& task, int64_t k, const TiledData<R>& window,
                     const std::vector<WindowFinder::Range>& ranges, Records& records) const {
    const double* const sums = task.sums.get() + k * task.n;
    const double total = task.total[k];
    RowMoments moments;
    for (int f = 0; f < features_; ++f) moments.offset[f] = sums[f] / total * to_bandwidths(f);
    int geometry = features_;
    for (int f = 0; f < features_; ++f) {
      for (int g = 0; g <= f; ++g, ++geometry) {
        const double second = sums[geometry] / total * to_bandwidths(f) * to_bandwidths(g);
        moments.spread[f][g] = moments.spread[g][f] = second - moments.offset[f] * moments.offset[g];
      }
    }
    const bool solved = solve(row, moments, kLeastInWindow<R>, [&](int64_t c, double* common) {
      const double* const value = sums + geometry + c * (1 + features_);
      const double mean = value[0] / total;
      for (int f = 0; f < features_; ++f) {
        common[f] = value[1 + f] / total * to_bandwidths(f) - mean * moments.offset[f];
      }
      return mean;
    });
    if (!solved)
      sum_exactly(row, &task.query[k * features_], -task.shift[k], task.excluded[k], window, ranges, records);
  }

  // The keys near a row (packed) once more, in double: what counts beside the nearest, whose score is `top`. Moments
  // are about the means.
  void sum_exactly(int64_t row, const R* query, double top, int64_t excluded, const TiledData<R>& window,
                   const std::vector<WindowFinder::Range>& ranges, Records& records) const {
    std::vector<uint32_t> places(window.n + kPadding);
    Selection<R> task{};
    task.features = features_;
    task.pitch = window.pitch;
    task.low = task.high = window.key;
    task.charge = window.log_weight;
    task.feature_scale = element_.batch.feature_scale();
    task.block_low = task.block_high = query;
    task.limit = static_cast<R>(top - kNegligibleScore - std::fabs(top) * 0x1p-14);
    task.begin = 0;
    task.end = window.n;
    task.places = places.data();
    const int64_t n = kernels<R>().select_near(task);
    std::vector<double> offset(n * features_), share(n);
    double most = -INFINITY, total = 0;
    size_t range = 0;
    for (int64_t j = 0, before = 0; j < n; ++j) {
      const int64_t place = places[j];
      double score = 0;
      for (int f = 0; f < features_; ++f) {
        const double z = (static_cast<double>(window.key[f * window.pitch + place]) - static_cast<double>(query[f])) *
                         to_bandwidths(f);
        offset[j * features_ + f] = z;
        score -= z * z / 2;
      }
      while (place - before >= ranges[range].end - ranges[range].begin) {
        before += ranges[range].end - ranges[range].begin;
        ++range;
      }
      if (window.log_weight) score += std::log(element_.weight(ranges[range].begin + place - before));
      share[j] = place == excluded ? -INFINITY : score;
      most = std::fmax(most, share[j]);
    }
    for (double& each : share) total += each = std::exp(each - most);
    RowMoments moments;
    for (int64_t j = 0; j < n; ++j) {
      share[j] /= total;
      for (int f = 0; f < features_; ++f) moments.offset[f] += share[j] * offset[j * features_ + f];
    }
    for (int f = 0; f < kAxes; ++f) moments.spread[f][f] = f < features_ ? 0 : 1;
    for (int64_t j = 0; j < n; ++j) {
      for (int f = 0; f < features_; ++f) {
        offset[j * features_ + f] -= moments.offset[f];
        for (int g = 0; g <= f; ++g)
          moments.spread[f][g] += share[j] * offset[j * features_ + f] * offset[j * features_ + g];
      }
    }
    for (int f = 0; f < features_; ++f) {
      for (int g = 0; g < f; ++g) moments.spread[g][f] = moments.spread[f][g];
    }
    const auto of_channel = [&](int64_t c, double* common) {
      const R* const value = window.value_columns + c * window.pitch;
      double mean = 0;
      for (int64_t j = 0; j < n; ++j) mean += share[j] * static_cast<double>(value[places[j]]);
      std::fill_n(common, features_, 0.0);
      for (int64_t j = 0; j < n; ++j) {
        const double height = share[j] * (static_cast<double>(value[places[j]]) - mean);
        for (int f = 0; f < features_; ++f) common[f] += height * offset[j * features_ + f];
      }
      return mean;
    };
    if (solve(row, moments, kLeastExact, of_channel)) return;
    const int64_t channels = problem_.channels;
    records.rows.push_back(row);
    std::vector<double>& to = records.moments;
    const size_t first = to.size();
    to.resize(first + channels + features_ + features_ * features_ + features_ * channels);
    double* const offsets = to.data() + first + channels;
    double *const spread = offsets + features_, *const commons = spread + features_ * features_;
    for (int f = 0; f < features_; ++f) {
      offsets[f] = moments.offset[f] / w(f);
      for (int g = 0; g < features_; ++g) spread[f * features_ + g] = moments.spread[f][g] / w(f) / w(g);
    }
    for (int64_t c = 0; c < channels; ++c) {
      double common[kAxes];
      to[first + c] = of_channel(c, common) + static_cast<double>(element_.batch.centre[c]);
      for (int f = 0; f < features_; ++f) commons[f * channels + c] = common[f] / w(f);
    }
  }

  // Rows that no window settled, where they are few: all keys are their window. Others stay in `left`, by the caller's
  // numbers.
  void sum_over_all(std::vector<int64_t>& left) {
    const double most = most_score<R, R>(problem_);
    const TiledData<R>& all = element_.batch.data;
    if (static_cast<double>(left.size()) * static_cast<double>(all.n) > kFewPairs) return;
    const std::vector<WindowFinder::Range> ranges = {{0, all.n}};
    std::vector<char> done(left.size());
    parallel_blocks(static_cast<int64_t>(left.size()), serial_, [&](int64_t i) {
      WindowSums<R> task(features_, problem_.channels);
      double place[kAxes];
      read_place(left[i], place);
      for (int f = 0; f < features_; ++f) {
        const double packed = place[f] * element_.batch.unit[f];
        if (!(std::fabs(packed) < kMostPacked)) return;
        task.query[f] = static_cast<R>(packed);
      }
      task.excluded[0] = problem_.exclude_self ? element_.key_place[left[i]] : -1;
      task.run(all, 1, problem_.exclude_self);
      if (!(task.total[0] > 0) || !(task.shift[0] <= most)) return;
      Records records;
      sum_exactly(left[i], task.query.get(), -task.shift[0], task.excluded[0], all, ranges, records);
      keep(records);
      done[i] = 1;
    });
    size_t kept = 0;
    for (size_t i = 0; i < left.size(); ++i) {
      if (!done[i]) left[kept++] = left[i];
    }
    left.resize(kept);
  }

  // A row, by the caller's number, from its moments, where S is not nearer than `most_singular` to a singular one:
  // `of_channel` writes Cov(u, v) and returns the mean of v from `centre`.
  template <typename OfChannel>
  bool solve(int64_t number, const RowMoments& moments, double most_singular, const OfChannel& of_channel) const {
    return features_ == 2 ? solve_in<2>(number, moments, most_singular, of_channel)
                          : solve_in<3>(number, moments, most_singular, of_channel);
  }
  template <int kFeatures, typename OfChannel>
  bool solve_in(int64_t number, const RowMoments& moments, double most_singular, const OfChannel& of_channel) const {
    double inverse[kAxes][kAxes], common[kAxes], distance = 0;
    const double least = invert<kFeatures>(moments.spread, inverse);
    for (int f = 0; f < kFeatures; ++f) distance = std::fmax(distance, std::fabs(moments.offset[f]));
    if (!(least >= std::fmax(most_singular, kClear * tolerance_ * (1 + distance)))) return false;
    const int64_t channels = problem_.channels, row = b_ * problem_.queries + number;
    R* const slopes = result_.slope + row * kFeatures * channels;
    R* const means = result_.means ? result_.means + row * (channels + kFeatures) : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = of_channel(c, common), middle = static_cast<double>(element_.batch.centre[c]) + mean;
      double fit = middle;
      for (int f = 0; f < kFeatures; ++f) {
        double slope = 0;
        for (int g = 0; g < kFeatures; ++g) slope += inverse[f][g] * common[g];
        fit -= moments.offset[f] * slope;
        slopes[f * channels + c] = static_cast<R>(slope * w(f));
      }
      result_.fit[row * channels + c] = static_cast<R>(fit);
      if (means) means[c] = static_cast<R>(middle);
    }
    if (!means) return true;
    R* const inverses = result_.inverse + row * kFeatures * kFeatures;
    double place[kAxes];
    read_place(number, place);
    for (int f = 0; f < kFeatures; ++f) {
      const double all = element_.key_low[f] / 2 + element_.key_high[f] / 2;
      means[channels + f] = static_cast<R>(place[f] - all + moments.offset[f] / w(f));
      for (int g = 0; g < kFeatures; ++g) inverses[f * kFeatures + g] = static_cast<R>(inverse[f][g] * w(f) * w(g));
    }
    return true;
  }

  double w(int f) const { return std::fabs(element_.w(f)); }
  void read_place(int64_t number, double* place) const {
    const View& query = problem_.query;
    read(query, query.offset(problem_.batch, b_) + number * query.row_stride, features_, query.column_stride, place);
  }

  void keep(const Records& records) {
    if (records.rows.empty()) return;
    const std::lock_guard<std::mutex> lock(guard_);
    records_.rows.insert(records_.rows.end(), records.rows.begin(), records.rows.end());
    records_.moments.insert(records_.moments.end(), records.moments.begin(), records.moments.end());
  }

  // Threads kept them in any order.
  void sort_records(LocalLinearRows& rest) const {
    const size_t n = records_.rows.size(), size = n > 0 ? records_.moments.size() / n : 0;
    std::vector<std::pair<int64_t, size_t>> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = {records_.rows[i], i};
    std::sort(order.begin(), order.end());
    rest.moments.reserve(n * size);
    for (const auto& [row, i] : order) {
      rest.weak.push_back(b_ * problem_.queries + row);
      const auto from = records_.moments.begin() + static_cast<std::ptrdiff_t>(i * size);
      rest.moments.insert(rest.moments.end(), from, from + static_cast<std::ptrdiff_t>(size));
    }
  }

  const Problem& problem_;
  const LocalLinearResult<R>& result_;
  const int64_t b_;
  const bool serial_;
  const int features_;
  Element<R> element_;
  double tolerance_ = 0;     // as nwfast/backends/local_linear.py has it, but for a row's distance
  std::vector<char> state_;  // (sorted queries)
  std::mutex guard_;
  Records records_;
};

}  // namespace

template <typename R>
bool local_linear(const Problem& problem, const LocalLinearResult<R>& result, LocalLinearRows& rest) {
  std::vector<LocalLinearRows> of_elements(problem.batch.count);
  const bool served = linear::over_batch(
      problem, [&](int64_t b, bool serial) { return LocalLinear<R>(problem, result, b, serial).run(of_elements[b]); });
  for (const LocalLinearRows& element : of_elements) {
    rest.left.insert(rest.left.end(), element.left.begin(), element.left.end());
    rest.weak.insert(rest.weak.end(), element.weak.begin(), element.weak.end());
    rest.moments.insert(rest.moments.end(), element.moments.begin(), element.moments.end());
  }
  return served;
}
template bool local_linear<float>(const Problem&, const LocalLinearResult<float>&, LocalLinearRows&);
template bool local_linear<double>(const Problem&, const LocalLinearResult<double>&, LocalLinearRows&);

}  // namespace grid
}  // namespace nwfast
