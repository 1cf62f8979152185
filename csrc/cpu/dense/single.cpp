// One feature and one channel: what surrounds the windowed sums of single_rows.h.
//
// Rows are summed over the windows of keys that single_batch.h finds; key-side gradients walk over the same windows
// from the other side.

#include <algorithm>
#include <cmath>

#include "single_batch.h"

namespace nwfast {
namespace {

constexpr int64_t kKeyBlock = 256;   // keys that one key-side task owns
constexpr int64_t kBatchChunk = 16;  // batch elements of one task, where there are many

// use(batch) with the batch element in T, or in double where it does not fit.
template <typename T, typename Use>
void with_batch(const Problem& problem, int64_t b, Purpose purpose, SingleBatch<T>& batch, const Use& use) {
  if (batch.prepare(problem, b, purpose)) {
    use(batch);
  } else {
    SingleBatch<double> wider;
    wider.prepare(problem, b, purpose);
    use(wider);
  }
}

// The sums of one block of rows, and what follows from them.
template <typename T>
class RowBlock {
 public:
  RowBlock(const SingleBatch<T>& batch, const Kernels<T>& kernels, int64_t block, bool scores, bool offsets)
      : batch_(batch), first_(block * kRowBlock), step_(batch.scale() * batch.unit) {
    batch.locate(kernels, block, true, rows_, nearest_);
    rows_.scores = scores;
    rows_.offsets = offsets;
    rows_.sums = sums_;
    rows_.shift = shift_;
    kernels.single_rows(rows_);
  }

  int64_t rows() const { return rows_.rows; }
  bool empty(int64_t i) const { return total(i) == 0 || batch_.lost(first_ + i); }
  double total(int64_t i) const { return sum(i, kTotal); }
  double shift(int64_t i) const { return shift_[i]; }
  double mean(int64_t i) const { return sum(i, kValue) / total(i); }  // of the centred values
  // NaN without any key is NaN all the same.
  double empty_lse(int64_t i) const { return std::isnan(rows_.query[i]) ? NAN : -INFINITY; }
  double lse(int64_t i) const {
    const double offset = far_offset(i) * batch_.w;
    return kLn2 * std::log2(total(i) * batch_.weight_unit) - offset * offset / 2;
  }

  // Derivatives of out and of lse by w and by the query, from moments (relative to the nearest key where that is far).
  // Those of average pooling are 0, however large the coordinates are. Those of out come times a cotangent, which may
  // bring back what they are beyond any number.
  double out_by_w(int64_t i, double g = 1) const {
    const double c = covariance(i, kScoreTotal);
    if (batch_.w == 0) return g * (c * 0);
    const double whole = c / step_ * (batch_.w / step_);
    return std::isinf(whole) ? c * g / step_ * (batch_.w / step_) : g * whole;
  }
  double out_by_query(int64_t i, double g = 1) const {
    const double c = covariance(i, kOffsetTotal);
    if (batch_.w == 0) return g * (c * 0);
    const double whole = -c * batch_.w * (batch_.w / step_);
    return std::isinf(whole) ? -c * g * batch_.w * (batch_.w / step_) : g * whole;
  }
  double lse_by_w(int64_t i) const {
    if (batch_.w == 0) return sum(i, kScoreTotal) / total(i) * 0;
    const double offset = far_offset(i);
    return sum(i, kScoreTotal) / total(i) / step_ * (batch_.w / step_) - batch_.w * offset * offset;
  }
  // Of the far row's own square, which may be no number where its product with a small cotangent is one.
  double lse_by_w_times(int64_t i, double grad) const {
    const double slope = lse_by_w(i), offset = far_offset(i);
    if (std::isfinite(slope) || !(std::fabs(grad) < 1)) return grad * slope;
    return grad * (sum(i, kScoreTotal) / total(i)) / step_ * (batch_.w / step_) -
           product_of(batch_.w, grad, offset) * offset;
  }
  double lse_by_query_times(int64_t i, double grad) const {
    if (batch_.w == 0) return grad * (sum(i, kOffsetTotal) / total(i) * 0);
    const double offset = sum(i, kOffsetTotal) / total(i) * (batch_.w / step_) + batch_.w * far_offset(i);
    const double slope = -batch_.w * offset;
    return std::isfinite(slope) ? grad * slope : -batch_.w * (grad * offset);
  }

 private:
  double sum(int64_t i, int which) const { return sums_[i * kSingleSums + which]; }
  double covariance(int64_t i, int which) const { return (sum(i, which + 1) - mean(i) * sum(i, which)) / total(i); }
  // From the nearest key to the query in user units, where the sums are relative to that key.
  double far_offset(int64_t i) const {
    return shift_[i] > 0 ? (static_cast<double>(rows_.query[i]) - nearest_[i]) / batch_.unit : 0;
  }

  const SingleBatch<T>& batch_;
  int64_t first_;
  double step_;  // from user coordinates to those of the scores
  SingleRows<T> rows_;
  T nearest_[kRowBlock];
  double sums_[kRowBlock * kSingleSums], shift_[kRowBlock];
};

template <typename T, typename R>
void forward_block(const Problem& problem, const SingleBatch<T>& batch, int64_t b, int64_t block,
                   const ForwardResult<R>& result) {
  const RowBlock<T> rows(batch, kernels<T>(), block, result.tangent_w != nullptr, result.tangent_q != nullptr);
  for (int64_t i = 0; i < rows.rows(); ++i) {
    const int64_t row = b * problem.queries + batch.original_row(block * kRowBlock + i);
    const double mean = rows.mean(i);
    const bool empty = rows.empty(i);
    double out = batch.centre + mean;
    if (batch.values.finite) out = std::fmin(std::fmax(out, batch.values.low), batch.values.high);
    // fmin and fmax drop NaN.
    result.out[row] = static_cast<R>(empty ? NAN : std::isnan(mean) ? mean : out);
    if (result.lse) result.lse[row] = static_cast<R>(empty ? rows.empty_lse(i) : rows.lse(i));
    if (result.state) {
      result.state[2 * row] = empty ? 0 : rows.shift(i);
      result.state[2 * row + 1] = empty ? 0 : rows.total(i) * batch.weight_unit;
    }
    if (result.tangent_w) result.tangent_w[row] = static_cast<R>(empty ? 0 : rows.out_by_w(i));
    if (result.tangent_q) result.tangent_q[row] = static_cast<R>(empty ? 0 : rows.out_by_query(i));
  }
}

// Adds a block's part of the gradient of w to grad_w.
template <typename T, typename R>
void query_block(const Problem& problem, const BackwardTask<R>& task, const SingleBatch<T>& batch, int64_t b,
                 int64_t block, double* grad_w) {
  const RowBlock<T> rows(batch, kernels<T>(), block, task.grad_w != nullptr, task.grad_query != nullptr);
  const int64_t grad = task.grad_out.offset(problem.batch, b);
  const int64_t grad_lse = task.grad_lse.data ? task.grad_lse.offset(problem.batch, b) : 0;
  for (int64_t i = 0; i < rows.rows(); ++i) {
    const int64_t original = batch.original_row(block * kRowBlock + i), row = b * problem.queries + original;
    double g = 0, g_lse = 0;
    if (!rows.empty(i)) {
      read(task.grad_out, grad + original * task.grad_out.row_stride, 1, 0, &g);
      if (task.grad_lse.data) read(task.grad_lse, grad_lse + original * task.grad_lse.row_stride, 1, 0, &g_lse);
    }
    // A cotangent of 0 adds nothing, even to a row that is NaN.
    double by_query = 0, by_w = 0;
    if (g != 0) {
      if (task.grad_query) by_query += rows.out_by_query(i, g);
      if (task.grad_w) by_w += rows.out_by_w(i, g);
    }
    if (g_lse != 0) {
      if (task.grad_query) by_query += rows.lse_by_query_times(i, g_lse);
      if (task.grad_w) by_w += rows.lse_by_w_times(i, g_lse);
    }
    if (task.grad_query) task.grad_query[row] = static_cast<R>(by_query);
    if (task.grad_w) *grad_w += by_w;
  }
}

// run(batch, b, block) over all row blocks of all batch elements.
template <typename T, typename Run>
void over_row_blocks(const Problem& problem, Purpose purpose, const Run& run) {
  const int64_t blocks = (problem.queries + kRowBlock - 1) / kRowBlock;
  const double pairs = static_cast<double>(problem.queries) * static_cast<double>(problem.keys);
  if (problem.batch.count > blocks) {
    const int64_t chunks = (problem.batch.count + kBatchChunk - 1) / kBatchChunk;
    parallel_blocks(chunks, pairs * static_cast<double>(problem.batch.count) < kSerialPairs, [&](int64_t chunk) {
      SingleBatch<T> batch;  // keeps its memory from one batch element to the next
      const int64_t end = std::min(problem.batch.count, (chunk + 1) * kBatchChunk);
      for (int64_t b = chunk * kBatchChunk; b < end; ++b) {
        with_batch(problem, b, purpose, batch, [&](const auto& rows) {
          for (int64_t block = 0; block < blocks; ++block) run(rows, b, block);
        });
      }
    });
    return;
  }
  SingleBatch<T> batch;
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    with_batch(problem, b, purpose, batch, [&](const auto& rows) {
      parallel_blocks(blocks, pairs < kSerialPairs, [&](int64_t block) { run(rows, b, block); });
    });
  }
}

}  // namespace

template <typename T>
void single_forward(const Problem& problem, const ForwardResult<T>& result) {
  const Purpose purpose = result.tangent_w || result.tangent_q ? Purpose::kQueryGradients : Purpose::kValues;
  over_row_blocks<T>(problem, purpose, [&](const auto& batch, int64_t b, int64_t block) {
    forward_block(problem, batch, b, block, result);
  });
}

template <typename T>
void single_query_backward(const Problem& problem, const BackwardTask<T>& task) {
  const int64_t blocks = (problem.queries + kRowBlock - 1) / kRowBlock;
  Buffer<double> partial(problem.batch.count * blocks);  // added in order below
  over_row_blocks<T>(problem, Purpose::kQueryGradients, [&](const auto& batch, int64_t b, int64_t block) {
    partial[b * blocks + block] = 0;
    query_block(problem, task, batch, b, block, &partial[b * blocks + block]);
  });
  for (int64_t b = 0; task.grad_w && b < problem.batch.count; ++b) {
    task.grad_w[b] = 0;
    for (int64_t block = 0; block < blocks; ++block) task.grad_w[b] += partial[b * blocks + block];
  }
}

namespace {

// The rows of a batch element as the key side sees them.
template <typename T>
struct KeySide {
  Buffer<T> nearest, value_grad, mean, lse_grad;
  Buffer<double> shift;
  Buffer<int64_t> windows;
  Buffer<uint8_t> skipped;  // rows whose cotangents are 0
  Buffer<double> largest;   // gradient of each block of rows, by a value or by lse

  void allocate(int64_t rows) {
    for (Buffer<T>* buffer : {&nearest, &value_grad, &mean, &lse_grad}) buffer->allocate(rows);
    shift.allocate(rows);
    skipped.allocate(rows);
    windows.allocate(2 * ((rows + kRowBlock - 1) / kRowBlock));
    largest.allocate((rows + kRowBlock - 1) / kRowBlock);
  }

  // Whether no product with what rows are multiplied by overflows: totals of small key weights make that large.
  bool fits(const SingleBatch<T>& batch, int64_t rows) const {
    double most = 0;
    for (int64_t block = 0; block < (rows + kRowBlock - 1) / kRowBlock; ++block) most = std::fmax(most, largest[block]);
    return sizeof(T) == 8 || most * std::fmax(1, 2 * batch.values.magnitude()) < SingleLimits<T>::kMostValue;
  }

  template <typename R>
  void gather(const Problem& problem, const BackwardTask<R>& task, const SingleBatch<T>& batch, int64_t b,
              int64_t block) {
    const int64_t first = block * kRowBlock;
    const int64_t grad = task.grad_out.offset(problem.batch, b);
    const int64_t grad_lse = task.grad_lse.data ? task.grad_lse.offset(problem.batch, b) : 0;
    SingleRows<T> rows;
    bool far = false;
    double most = 0;
    for (int64_t i = first; i < std::min(first + kRowBlock, problem.queries); ++i) {
      far |= task.state[2 * (b * problem.queries + batch.original_row(i))] > 0;
    }
    batch.locate(kernels<T>(), block, far, rows, nearest.get() + first);
    windows[2 * block] = rows.window_begin;
    windows[2 * block + 1] = rows.window_end;
    for (int64_t i = first; i < first + rows.rows; ++i) {
      const int64_t original = batch.original_row(i), row = b * problem.queries + original;
      double g = 0, g_lse = 0;
      read(task.grad_out, grad + original * task.grad_out.row_stride, 1, 0, &g);
      if (task.grad_lse.data) read(task.grad_lse, grad_lse + original * task.grad_lse.row_stride, 1, 0, &g_lse);
      double total = task.state[2 * row + 1] / batch.weight_unit;
      shift[i] = task.state[2 * row];
      if (batch.scaled() && shift[i] > 0) {  // the forward pass had other purposes and took another way
        total *= std::exp2(-shift[i]);
        shift[i] = 0;
      }
      if (batch.wide() && shift[i] == 0) nearest[i] = batch.query()[i];
      skipped[i] = total == 0 || (g == 0 && g_lse == 0);
      value_grad[i] = static_cast<T>(skipped[i] ? 0 : g / total);
      mean[i] = static_cast<T>(skipped[i] ? 0 : task.out[row] - batch.centre);
      lse_grad[i] = static_cast<T>(skipped[i] ? 0 : g_lse / total);
      if (!skipped[i]) most = std::fmax(most, std::fmax(std::fabs(g / total), std::fabs(g_lse / total)));
    }
    largest[block] = most;
  }

  // The derivative by the weight of a key that has none and lies so near to rows that it overflows on the way: relative
  // to the largest weight that a row gives it.
  double weight_gradient(const SingleBatch<T>& batch, int64_t rows, int64_t j) const {
    const double key = batch.key()[j], scale = batch.scale();
    double most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (skipped[i] || (batch.excluded() && batch.excluded()[i] == j)) continue;
      const double u =
          static_cast<double>(value_grad[i]) * (static_cast<double>(batch.value()[j]) - mean[i]) + lse_grad[i];
      if (u == 0) continue;
      const double x = batch.query()[i], near = shift[i] > 0 ? static_cast<double>(nearest[i]) : x;
      double score = ((key - near) * scale) * (((x - key) + (x - near)) * scale);
      if (shift[i] == 0) score = -((x - key) * scale) * ((x - key) * scale);
      constexpr double kMost = std::numeric_limits<double>::max();
      score = std::fmax(-kMost, std::fmin(score, kMost));  // differences of scores are numbers
      if (score > most) {
        sum *= std::exp2(most - score);
        most = score;
      }
      sum += u * std::exp2(score - most);
    }
    if (sum == 0 || !(sum * 0 == 0)) return sum;
    most = std::fmax(-0x1p20, std::fmin(most, 0x1p20));  // beyond, any number of double is 0 or infinite
    const double whole = std::floor(most);
    return std::ldexp(sum * std::exp2(most - whole), static_cast<int>(whole) - std::ilogb(batch.weight_unit));
  }
};

template <typename T, typename R>
void key_block(const Problem& problem, const BackwardTask<R>& task, const SingleBatch<T>& batch, const KeySide<T>& side,
               int64_t b, int64_t block) {
  double sum_value[kKeyBlock], sum_weight[kKeyBlock], sum_offset[kKeyBlock];
  SingleKeys<T> keys;
  keys.key = batch.key();
  keys.value = batch.value();
  keys.n = problem.keys;
  keys.key_begin = block * kKeyBlock;
  keys.key_end = std::min(problem.keys, keys.key_begin + kKeyBlock);
  keys.scale = static_cast<T>(batch.scale());
  keys.wide = batch.wide();
  keys.rows = problem.queries;
  keys.query = batch.query();
  keys.skipped = batch.finite() ? nullptr : side.skipped.get();
  keys.nearest = side.nearest.get();
  keys.shift = side.shift.get();
  keys.value_grad = side.value_grad.get();
  keys.mean = side.mean.get();
  keys.lse_grad = side.lse_grad.get();
  keys.excluded = batch.excluded();
  keys.windows = side.windows.get();
  keys.sum_value = sum_value;
  keys.sum_weight = sum_weight;
  keys.sum_offset = sum_offset;
  kernels<T>().single_keys(keys);
  constexpr double most = std::numeric_limits<R>::max();
  const auto within = [](double x, double most) { return x > most ? most : x < -most ? -most : x; };
  for (int64_t j = keys.key_begin; j < keys.key_end; ++j) {
    const int64_t i = j - keys.key_begin, place = b * problem.keys + batch.original_key(j);
    const double weight = batch.weight(j);
    // Nothing but the derivative by its weight comes from a key without one, however near it lies to a row.
    const bool counts = weight != 0;
    if (task.grad_value) task.grad_value[place] = static_cast<R>(counts ? weight * sum_value[i] : 0);
    if (task.grad_key) {
      // In this order the product is 0 where the sum is.
      const double by_scale =
          batch.wide() ? sum_offset[i] / batch.unit * batch.w : sum_offset[i] * (batch.w / batch.unit);
      const double by_key = product_of(by_scale, batch.w, weight);
      task.grad_key[place] = static_cast<R>(counts ? by_key : 0);
    }
    if (!task.grad_key_weight) continue;
    if (counts) {
      task.grad_key_weight[place] = static_cast<R>(sum_weight[i] / batch.weight_unit);
      continue;
    }
    const double gradient = std::isfinite(sum_weight[i]) ? sum_weight[i] / batch.weight_unit
                                                         : side.weight_gradient(batch, problem.queries, j);
    task.grad_key_weight[place] = batch.absent(j) ? R(0) : static_cast<R>(within(gradient, most));
  }
}

}  // namespace

template <typename T>
void single_key_backward(const Problem& problem, const BackwardTask<T>& task) {
  const int64_t row_blocks = (problem.queries + kRowBlock - 1) / kRowBlock;
  const int64_t key_blocks = (problem.keys + kKeyBlock - 1) / kKeyBlock;
  const double pairs = static_cast<double>(problem.queries) * static_cast<double>(problem.keys);
  const auto run = [&](const auto& batch, auto& side, int64_t b, bool serial) {
    side.allocate(problem.queries);
    parallel_blocks(row_blocks, serial, [&](int64_t block) { side.gather(problem, task, batch, b, block); });
    if (!side.fits(batch, problem.queries)) return false;
    parallel_blocks(key_blocks, serial, [&](int64_t block) { key_block(problem, task, batch, side, b, block); });
    return true;
  };
  const auto run_element = [&](SingleBatch<T>& batch, KeySide<T>& side, int64_t b, bool serial) {
    if (batch.prepare(problem, b, Purpose::kKeyGradients) && run(batch, side, b, serial)) return;
    SingleBatch<double> wider;
    KeySide<double> wider_side;
    wider.prepare(problem, b, Purpose::kKeyGradients);
    run(wider, wider_side, b, serial);
  };
  if (problem.batch.count > key_blocks) {
    const int64_t chunks = (problem.batch.count + kBatchChunk - 1) / kBatchChunk;
    parallel_blocks(chunks, pairs * static_cast<double>(problem.batch.count) < kSerialPairs, [&](int64_t chunk) {
      SingleBatch<T> batch;
      KeySide<T> side;
      const int64_t end = std::min(problem.batch.count, (chunk + 1) * kBatchChunk);
      for (int64_t b = chunk * kBatchChunk; b < end; ++b) run_element(batch, side, b, true);
    });
  } else {
    SingleBatch<T> batch;
    KeySide<T> side;
    for (int64_t b = 0; b < problem.batch.count; ++b) run_element(batch, side, b, pairs < kSerialPairs);
  }
}

template void single_forward<float>(const Problem&, const ForwardResult<float>&);
template void single_forward<double>(const Problem&, const ForwardResult<double>&);
template void single_query_backward<float>(const Problem&, const BackwardTask<float>&);
template void single_query_backward<double>(const Problem&, const BackwardTask<double>&);
template void single_key_backward<float>(const Problem&, const BackwardTask<float>&);
template void single_key_backward<double>(const Problem&, const BackwardTask<double>&);

}  // namespace nwfast
