// Prepared keys in two and three features: the series of the grid method in all boxes that hold keys, made once for
// many sets of queries, which then cost their own evaluation alone. What these do not settle (queries in cells without
// a key, sums that are too small for the error of a series) is left to the caller.

#include "grid.h"

#include "../grid/element.h"
#include "../grid/translation.h"

namespace nwfast {
namespace grid {
namespace {

constexpr double kMostNumbers = 32;  // of the series of a column, for each key

// Places in PreparedKeys::numbers; axes and channels follow.
enum Number { kFeatures, kChannels, kTruncation, kLogSpan, kRadius, kMass, kUnit, kMesh, kOneMesh, kNumbers };
constexpr int kAxisNumbers = 12, kChannelNumbers = 3;

void write_axis(const Axis& axis, std::vector<double>& numbers) {
  numbers.insert(numbers.end(),
                 {static_cast<double>(axis.feature), axis.scale, axis.side, axis.middle, axis.single ? 1.0 : 0.0,
                  axis.half, static_cast<double>(axis.terms), axis.from, axis.to, static_cast<double>(axis.low),
                  static_cast<double>(axis.cells), static_cast<double>(axis.reach)});
}

void read_axis(const double* from, Axis& axis) {
  axis.feature = static_cast<int>(from[0]);
  axis.scale = from[1];
  axis.side = from[2];
  axis.middle = from[3];
  axis.single = from[4] != 0;
  axis.half = from[5];
  axis.terms = static_cast<int>(from[6]);
  axis.from = from[7];
  axis.to = from[8];
  axis.low = static_cast<int64_t>(from[9]);
  axis.cells = static_cast<int64_t>(from[10]);
  axis.reach = static_cast<int64_t>(from[11]);
}

}  // namespace

template <typename R>
bool compress(const Problem& problem, PreparedKeys& prepared) {
  Element<R> element;
  element.anywhere = true;
  if (!element.prepare(problem, 0, 0, Values::kForward, true, false)) return false;
  const Plan& plan = element.plan;
  const int columns = static_cast<int>(problem.channels) + 1;
  const std::vector<Box>& boxes = element.keys.boxes;
  const int64_t count = static_cast<int64_t>(boxes.size()), size = columns * plan.size();
  if (static_cast<double>(count) * plan.size() > kMostNumbers * static_cast<double>(element.keys.n)) return false;
  fill_matrices(element.plan);
  std::vector<int64_t> all(count);
  for (int64_t i = 0; i < count; ++i) all[i] = i;
  Expansion<R> expansion{
      plan,
      element.keys,
      element.keys,
      std::move(all),
      columns,
      0,
      [&](int64_t begin, int64_t n, double* charge, int64_t pitch) { element.load(begin, n, charge, pitch); },
      nullptr};
  prepared.series.assign(count * size, 0);
  prepared.bound.assign(count, 0);
  expansion.kept_series = prepared.series.data();
  expansion.kept_bound = prepared.bound.data();
  expansion.run(false);
  for (const Box& box : boxes) prepared.cells.push_back(box.cell);
  prepared.numbers = {static_cast<double>(plan.features),
                      static_cast<double>(problem.channels),
                      plan.truncation,
                      plan.log_span,
                      plan.radius,
                      element.mass,
                      element.batch.weight_unit,
                      plan.mesh ? 1.0 : 0.0,
                      plan.one_mesh ? 1.0 : 0.0};
  for (const Axis& axis : plan.axis) write_axis(axis, prepared.numbers);
  for (int64_t c = 0; c < problem.channels; ++c) {
    const Range& range = element.batch.values[c];
    prepared.numbers.insert(prepared.numbers.end(),
                            {static_cast<double>(element.batch.centre[c]), range.low, range.high});
  }
  return true;
}

template <typename R>
std::vector<int64_t> predict(const PreparedKeysView& prepared, const R* query, int64_t rows,
                             const ForwardResult<R>& result) {
  const double* const numbers = prepared.numbers;
  Plan plan;
  plan.features = static_cast<int>(numbers[kFeatures]);
  plan.truncation = numbers[kTruncation];
  plan.log_span = numbers[kLogSpan];
  plan.radius = numbers[kRadius];
  plan.mesh = numbers[kMesh] != 0;
  plan.one_mesh = numbers[kOneMesh] != 0;
  for (int a = 0; a < kAxes; ++a) read_axis(numbers + kNumbers + a * kAxisNumbers, plan.axis[a]);
  const int64_t channels = static_cast<int64_t>(numbers[kChannels]);
  const int columns = static_cast<int>(channels) + 1;
  std::vector<R> centre(channels);
  std::vector<Range> values(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double* const own = numbers + kNumbers + kAxes * kAxisNumbers + c * kChannelNumbers;
    centre[c] = static_cast<R>(own[0]);
    values[c].low = own[1];
    values[c].high = own[2];
  }
  Points<R> queries;
  std::vector<int64_t> left;
  queries.sort(plan, query, rows, true, false, left);
  std::vector<char> done(queries.n, 0);
  const double tail = Plan::beyond(plan.radius) * numbers[kMass];
  const Expansion<R> expansion{plan,
                               queries,
                               queries,
                               {},
                               columns,
                               0,
                               nullptr,
                               [&](int64_t begin, int64_t n, const double* sums, int64_t pitch, double bound) {
                                 const double error = error_of(plan, bound) + tail;
                                 for (int64_t k = 0; k < n; ++k) {
                                   if (!(sums[k] * Accuracy<R>::kAccept >= error)) continue;
                                   write_row(result, queries.order[begin + k], channels, centre.data(), values.data(),
                                             0, sums[k], numbers[kUnit], sums + pitch + k, pitch);
                                   done[begin + k] = 1;
                                 }
                               }};
  // Parts of boxes of queries, with the box of keys in the same cell.
  struct Task {
    const Box* box;
    int64_t begin, end, held;
  };
  std::vector<Task> tasks;
  int64_t held = 0;
  for (const Box& box : queries.boxes) {
    held = std::lower_bound(prepared.cells + held, prepared.cells + prepared.boxes, box.cell) - prepared.cells;
    if (held == prepared.boxes) break;
    if (prepared.cells[held] != box.cell) continue;
    for (int64_t begin = box.begin; begin < box.end; begin += kPointTask) {
      tasks.push_back({&box, begin, std::min(box.end, begin + kPointTask), held});
    }
  }
  parallel_blocks(static_cast<int64_t>(tasks.size()), false, [&](int64_t i) {
    const Task& task = tasks[i];
    expansion.evaluate_box(*task.box, task.begin, task.end, prepared.series + task.held * columns * plan.size(),
                           prepared.bound[task.held]);
  });
  for (int64_t i = 0; i < queries.n; ++i) {
    if (!done[i]) left.push_back(queries.order[i]);
  }
  std::sort(left.begin(), left.end());
  return left;
}

template bool compress<float>(const Problem&, PreparedKeys&);
template bool compress<double>(const Problem&, PreparedKeys&);
template std::vector<int64_t> predict<float>(const PreparedKeysView&, const float*, int64_t,
                                             const ForwardResult<float>&);
template std::vector<int64_t> predict<double>(const PreparedKeysView&, const double*, int64_t,
                                              const ForwardResult<double>&);

}  // namespace grid
}  // namespace nwfast
