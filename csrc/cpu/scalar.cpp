// One feature and one channel: what surrounds the windowed sums of scalar_kernels.h.
//
// Coordinates are scaled by a power of two (exactly) so that neither their squares nor those of the scores overflow.
// Where it pays, keys and queries are sorted: then the nearest key is known by a merge, and blocks of queries visit
// only the keys of a window, outside which all weights together are below the rounding error. Key-side gradients walk
// over the same windows from the other side.

#include <algorithm>
#include <cmath>

#include "drivers.h"
#include "order.h"

namespace nwfast {
namespace {

constexpr int64_t kKeyBlock = 256;     // keys that one key-side task owns
constexpr double kScaledReach = 3;     // float32 coordinates within (-3, 3) units of the score are scaled beforehand
constexpr int64_t kScaledQueries = 8;  // for fewer it does not pay
constexpr int64_t kBatchChunk = 16;    // batch elements of one task, where there are many
constexpr int64_t kWindowQueries = 8;  // from so many queries on, windows are worth a check whether keys are sorted
constexpr int64_t kSortQueries = 128;  // from so many queries on, sorting the keys pays

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double kLow = 0x1p-30, kHigh = 0x1p50;  // of the scale, where coordinates lie within (-2^9, 2^9)
  static constexpr double kNegligible = kNegligibleFloat;
  static constexpr double kWeightRange = 60;  // log2 of the ratio of key weights that fits beside scores
};
template <>
struct Limits<double> {
  static constexpr double kLow = 0x1p-40, kHigh = 0x1p480;
  static constexpr double kNegligible = kNegligibleDouble;
  static constexpr double kWeightRange = 900;
};

// log2 of the ratio between the largest and the smallest positive key weight, over all batch elements.
double weight_range(const Problem& problem) {
  if (!problem.key_weight.data) return 0;
  Buffer<double> weight(problem.keys);
  double low = INFINITY, high = 0;
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    read(problem.key_weight, problem.key_weight.offset(problem.batch, b), problem.keys, problem.key_weight.row_stride,
         weight.get());
    for (int64_t j = 0; j < problem.keys; ++j) {
      if (!(weight[j] > 0 && weight[j] < INFINITY)) continue;
      low = std::fmin(low, weight[j]);
      high = std::fmax(high, weight[j]);
    }
    bool broadcast = true;
    for (int dim = 0; dim < problem.batch.rank; ++dim) broadcast &= problem.key_weight.batch_strides[dim] == 0;
    if (broadcast) break;
  }
  return high > 0 ? std::log2(high) - std::log2(low) : 0;
}

// One batch element in packed form, in the order in which it is computed.
template <typename T>
class ScalarBatch {
 public:
  // With charges: what the forward pass weighs keys with. Without, value holds the centred values alone.
  void prepare(const Problem& problem, int64_t b) {
    queries_ = problem.queries;
    keys_ = problem.keys;
    exclude_ = problem.exclude_self;
    weighted_ = problem.key_weight.data != nullptr;
    key_.allocate(keys_);
    query_.allocate(queries_);
    value_.allocate(keys_);
    read(problem.key, problem.key.offset(problem.batch, b), keys_, problem.key.row_stride, key_.get());
    read(problem.query, problem.query.offset(problem.batch, b), queries_, problem.query.row_stride, query_.get());
    read(problem.value, problem.value.offset(problem.batch, b), keys_, problem.value.row_stride, value_.get());
    read(problem.w, problem.w.offset(problem.batch, b), 1, 0, &w);
    scale_coordinates();
    centre_values();
    if (weighted_) read_weights(problem, b);
    order();
    if (weighted_) {
      value_charge_.allocate(keys_);
      for (int64_t j = 0; j < keys_; ++j) value_charge_[j] = weight_[j] * value_[j];
    }
    if (sorted_ && weighted_) link_positive();
    windowed_ = sorted_ && finite_;
    if (windowed_) {
      negligible_ = Limits<T>::kNegligible + std::log2(static_cast<double>(keys_)) + (weighted_ ? weight_span_ : 0);
    }
  }

  // The nearest keys and the window of the rows of a block; `rows` gets the block's part of each array. Where keys are
  // not sorted, the nearest keys cost a scan.
  void locate(const Kernels<T>& kernels, int64_t block, bool scan, ScalarRows<T>& rows, T* nearest) const {
    const int64_t first = block * kRowBlock;
    rows.key = key_.get();
    rows.total_charge = weighted_ ? weight_.get() : nullptr;
    rows.value_charge = weighted_ ? value_charge_.get() : value_.get();
    rows.n = keys_;
    rows.window_begin = 0;
    rows.window_end = keys_;
    rows.scale = static_cast<T>(scale_);
    rows.rows = std::min(queries_ - first, kRowBlock);
    rows.query = query_.get() + first;
    rows.nearest = nearest;
    rows.excluded = exclude_ ? excluded_.get() + first : nullptr;
    if (scaled_) {
      std::copy(rows.query, rows.query + rows.rows, nearest);  // at no distance: scores are taken as they are
      return;
    }
    if (!sorted_) {
      if (scan) kernels.scalar_nearest(rows, nearest);
      return;
    }
    double low = INFINITY, high = -INFINITY;
    bool regular = windowed_;
    int64_t place = 0;
    for (int64_t i = 0; i < rows.rows; ++i) {
      const T x = rows.query[i];
      place = upper_bound(x, i > 0 ? place : -1);
      nearest[i] = nearest_of(x, place, rows.excluded ? rows.excluded[i] : -2);
      const double distance = (static_cast<double>(x) - nearest[i]) * scale_;
      const double radius = std::sqrt(distance * distance + negligible_) / scale_ * (1 + 1e-6);
      regular &= std::isfinite(x);
      low = std::min(low, x - radius);
      high = std::max(high, x + radius);
    }
    if (!regular) return;
    const T* const begin = key_.get();
    const T* const end = begin + keys_;
    const auto below = [](T k, double x) { return k < x; };
    rows.window_begin = (std::lower_bound(begin, end, low, below) - begin) / kPadding * kPadding;
    rows.window_end = std::min(keys_, padded(std::lower_bound(begin, end, high, below) - begin + 1));
  }

  int64_t original_row(int64_t i) const { return row_order_.get() && rows_moved_ ? row_order_[i] : i; }
  int64_t original_key(int64_t j) const { return keys_moved_ ? key_order_[j] : j; }
  // 1 for all keys where there are no weights; scaled by a power of two, weight_unit.
  double weight(int64_t j) const { return weighted_ ? static_cast<double>(weight_[j]) : 1; }

  const T* key() const { return key_.get(); }
  const T* query() const { return query_.get(); }
  const T* value() const { return value_.get(); }
  const int64_t* excluded() const { return exclude_ ? excluded_.get() : nullptr; }
  double scale() const { return scale_; }

  double w = 0;
  double unit = 1;         // coordinates are multiplied by it
  double weight_unit = 1;  // weights are divided by it
  double centre = 0;       // subtracted from values
  Range values;

 private:
  // By a power of two, which may itself be beyond what T holds.
  static void multiply(T* x, int64_t n, double factor) {
    if (factor == 1) return;
    if (factor > 0x1p-100 && factor < 0x1p100) {
      const T narrow = static_cast<T>(factor);
      for (int64_t i = 0; i < n; ++i) x[i] *= narrow;
    } else {
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(x[i] * factor);
    }
  }

  void scale_coordinates() {
    Range range;
    range.include(key_.get(), keys_);
    finite_ = range.finite;
    range.include(query_.get(), queries_);
    const double magnitude = range.magnitude();
    // Within these bounds no product overflows, and the usual case saves a pass.
    unit = magnitude > 0 && (magnitude < 0x1p-8 || magnitude > 0x1p8) ? std::ldexp(1.0, -std::ilogb(magnitude)) : 1;
    multiply(key_.get(), keys_, unit);
    multiply(query_.get(), queries_, unit);
    scale_ = std::fabs(w) * std::sqrt(kHalfLog2E) / unit;
    // Below, all weights are 1 to rounding and tangents would underflow; above, only the nearest key has weight.
    if (scale_ < Limits<T>::kLow) scale_ = Limits<T>::kLow;
    if (scale_ > Limits<T>::kHigh) scale_ = Limits<T>::kHigh;
    scaled_ = false;
    const double half = (range.high - range.low) / 2 * scale_ * unit;
    if (sizeof(T) == 4 && queries_ >= kScaledQueries && range.finite && half > 0x1p-3 && half < kScaledReach) {
      scale_fully(range);
    }
  }

  // Wide bandwidths: coordinates in units of the score, about the middle of the data. Rounding them costs as much as
  // rounding the product of w and a difference does, and saves each pair that product. Nor is an order of the keys or
  // the nearest key of use: no window is narrower than the data, and no score is below -(2 kScaledReach)^2.
  void scale_fully(const Range& range) {
    const double factor = scale_, middle = (range.low / 2 + range.high / 2) * unit;
    for (int64_t j = 0; j < keys_; ++j) key_[j] = static_cast<T>((key_[j] - middle) * factor);
    for (int64_t i = 0; i < queries_; ++i) query_[i] = static_cast<T>((query_[i] - middle) * factor);
    unit *= factor;
    scale_ = 1;
    scaled_ = true;
  }

  void centre_values() {
    values = Range();
    values.include(value_.get(), keys_);
    finite_ &= values.finite;
    const T middle = static_cast<T>(values.centre());
    centre = static_cast<double>(middle);
    for (int64_t j = 0; j < keys_; ++j) value_[j] -= middle;
  }

  void read_weights(const Problem& problem, int64_t b) {
    weight_.allocate(keys_);
    read(problem.key_weight, problem.key_weight.offset(problem.batch, b), keys_, problem.key_weight.row_stride,
         weight_.get());
    double low = INFINITY, high = 0;
    for (int64_t j = 0; j < keys_; ++j) {
      if (weight_[j] < 0) weight_[j] = std::numeric_limits<T>::quiet_NaN();
      finite_ &= std::isfinite(weight_[j]);
      if (!(weight_[j] > 0) || !std::isfinite(weight_[j])) continue;
      low = std::fmin(low, weight_[j]);
      high = std::fmax(high, weight_[j]);
    }
    int exponent = 0;
    if (high > 0) std::frexp(high, &exponent);
    weight_unit = std::ldexp(1.0, exponent);
    weight_span_ = high > 0 ? std::log2(high) - std::log2(low) : 0;
    for (int64_t j = 0; j < keys_; ++j) weight_[j] = static_cast<T>(weight_[j] / weight_unit);
  }

  template <typename V>
  static void permute(V* x, const uint32_t* order, int64_t n, Buffer<V>& scratch) {
    scratch.allocate(n);
    for (int64_t i = 0; i < n; ++i) scratch[i] = x[order[i]];
    std::memcpy(x, scratch.get(), static_cast<size_t>(n) * sizeof(V));
  }

  void order() {
    sorted_ = !scaled_ && queries_ >= kWindowQueries && ascending(key_.get(), keys_);
    keys_moved_ = rows_moved_ = false;
    constexpr int64_t kMost = int64_t{1} << 32;
    Buffer<T> scratch;
    if (!sorted_ && !scaled_ && finite_ && queries_ >= kSortQueries && keys_ > kPadding && keys_ < kMost) {
      key_order_.allocate(keys_);
      sort_order(key_.get(), keys_, key_order_.get());
      permute(key_.get(), key_order_.get(), keys_, scratch);
      permute(value_.get(), key_order_.get(), keys_, scratch);
      if (weighted_) permute(weight_.get(), key_order_.get(), keys_, scratch);
      sorted_ = keys_moved_ = true;
    }
    if (sorted_ && queries_ >= kSortQueries && queries_ < kMost && !ascending(query_.get(), queries_)) {
      bool ordered = true;
      for (int64_t i = 0; i < queries_; ++i) ordered &= query_[i] == query_[i];
      if (ordered) {
        row_order_.allocate(queries_);
        sort_order(query_.get(), queries_, row_order_.get());
        permute(query_.get(), row_order_.get(), queries_, scratch);
        rows_moved_ = true;
      }
    }
    if (!exclude_) return;
    excluded_.allocate(queries_);
    Buffer<int64_t> place(keys_);
    for (int64_t j = 0; j < keys_; ++j) place[original_key(j)] = j;
    for (int64_t i = 0; i < queries_; ++i) excluded_[i] = place[original_row(i)];
  }

  // For each key the nearest places, up to and from it, of keys with a weight.
  void link_positive() {
    before_.allocate(keys_);
    after_.allocate(keys_);
    int64_t last = -1;
    for (int64_t j = 0; j < keys_; ++j) before_[j] = last = weight_[j] == 0 ? last : j;
    last = keys_;
    for (int64_t j = keys_ - 1; j >= 0; --j) after_[j] = last = weight_[j] == 0 ? last : j;
  }

  // The first place whose key is greater than x; hint is the answer for a smaller x, or -1.
  int64_t upper_bound(T x, int64_t hint) const {
    const T* const begin = key_.get();
    if (hint >= 0 && (hint == 0 || begin[hint - 1] <= x)) {
      int64_t place = hint;
      for (int step = 0; step < 16; ++step, ++place) {
        if (place == keys_ || begin[place] > x) return place;
      }
    }
    return std::upper_bound(begin, begin + keys_, x) - begin;
  }

  T nearest_of(T x, int64_t place, int64_t excluded) const {
    const auto before = [&](int64_t j) { return weighted_ && j >= 0 ? before_[j] : j; };
    const auto after = [&](int64_t j) { return weighted_ && j < keys_ ? after_[j] : j; };
    int64_t left = before(place - 1), right = after(place);
    if (left == excluded) left = before(left - 1);
    if (right == excluded) right = after(right + 1);
    if (left < 0 && right >= keys_) return key_[0];  // no key is left: all sums will be 0
    if (left < 0) return key_[right];
    if (right >= keys_) return key_[left];
    return x - key_[left] <= key_[right] - x ? key_[left] : key_[right];
  }

  int64_t queries_ = 0, keys_ = 0;
  bool exclude_ = false, weighted_ = false, finite_ = true, sorted_ = false, windowed_ = false;
  bool keys_moved_ = false, rows_moved_ = false, scaled_ = false;
  double scale_ = 1, weight_span_ = 0, negligible_ = 0;
  Buffer<T> key_, query_, value_, value_charge_, weight_;
  Buffer<uint32_t> key_order_, row_order_;
  Buffer<int64_t> excluded_, before_, after_;
};

// The sums of one block of rows, and what follows from them.
template <typename T>
class RowBlock {
 public:
  RowBlock(const ScalarBatch<T>& batch, const Kernels<T>& kernels, int64_t block, bool scores, bool offsets)
      : batch_(batch), step_(batch.scale() * batch.unit) {
    batch.locate(kernels, block, true, rows_, nearest_);
    rows_.scores = scores;
    rows_.offsets = offsets;
    rows_.sums = sums_;
    rows_.shift = shift_;
    kernels.scalar_rows(rows_);
  }

  int64_t rows() const { return rows_.rows; }
  bool empty(int64_t i) const { return total(i) == 0; }
  double total(int64_t i) const { return sum(i, kTotal); }
  double shift(int64_t i) const { return shift_[i]; }
  double mean(int64_t i) const { return sum(i, kValue) / total(i); }  // of the centred values
  double lse(int64_t i) const {
    const double offset = far_offset(i) * batch_.w;
    return kLn2 * std::log2(total(i) * batch_.weight_unit) - offset * offset / 2;
  }

  // Derivatives of out and of lse by w and by the query, from moments (relative to the nearest key where that is far).
  double out_by_w(int64_t i) const { return covariance(i, kScoreTotal) / step_ * (batch_.w / step_); }
  double out_by_query(int64_t i) const { return -covariance(i, kOffsetTotal) * batch_.w * (batch_.w / step_); }
  double lse_by_w(int64_t i) const {
    const double offset = far_offset(i);
    return sum(i, kScoreTotal) / total(i) / step_ * (batch_.w / step_) - batch_.w * offset * offset;
  }
  double lse_by_query(int64_t i) const {
    return -batch_.w * (sum(i, kOffsetTotal) / total(i) * (batch_.w / step_) + batch_.w * far_offset(i));
  }

 private:
  double sum(int64_t i, int which) const { return sums_[i * kScalarSums + which]; }
  double covariance(int64_t i, int which) const { return (sum(i, which + 1) - mean(i) * sum(i, which)) / total(i); }
  // From the nearest key to the query in user units, where the sums are relative to that key.
  double far_offset(int64_t i) const {
    return shift_[i] > 0 ? (static_cast<double>(rows_.query[i]) - nearest_[i]) / batch_.unit : 0;
  }

  const ScalarBatch<T>& batch_;
  double step_;  // from user coordinates to those of the scores
  ScalarRows<T> rows_;
  T nearest_[kRowBlock];
  double sums_[kRowBlock * kScalarSums], shift_[kRowBlock];
};

template <typename T, typename R>
void forward_block(const Problem& problem, const ScalarBatch<T>& batch, const Kernels<T>& kernels, int64_t b,
                   int64_t block, const ForwardResult<R>& result) {
  const RowBlock<T> rows(batch, kernels, block, result.tangent_w != nullptr, result.tangent_q != nullptr);
  for (int64_t i = 0; i < rows.rows(); ++i) {
    const int64_t row = b * problem.queries + batch.original_row(block * kRowBlock + i);
    const double mean = rows.mean(i);
    const bool empty = rows.empty(i);
    double out = batch.centre + mean;
    if (batch.values.finite) out = std::fmin(std::fmax(out, batch.values.low), batch.values.high);
    // fmin and fmax drop NaN.
    result.out[row] = static_cast<R>(empty ? NAN : std::isnan(mean) ? mean : out);
    if (result.lse) result.lse[row] = static_cast<R>(empty ? -INFINITY : rows.lse(i));
    if (result.state) {
      result.state[2 * row] = rows.shift(i);
      result.state[2 * row + 1] = rows.total(i) * batch.weight_unit;
    }
    if (result.tangent_w) result.tangent_w[row] = static_cast<R>(empty ? 0 : rows.out_by_w(i));
    if (result.tangent_q) result.tangent_q[row] = static_cast<R>(empty ? 0 : rows.out_by_query(i));
  }
}

// Adds a block's part of the gradient of w to grad_w.
template <typename T, typename R>
void query_block(const Problem& problem, const BackwardTask<R>& task, const ScalarBatch<T>& batch,
                 const Kernels<T>& kernels, int64_t b, int64_t block, double* grad_w) {
  const RowBlock<T> rows(batch, kernels, block, task.grad_w != nullptr, task.grad_query != nullptr);
  const int64_t grad = task.grad_out.offset(problem.batch, b);
  const int64_t grad_lse = task.grad_lse.data ? task.grad_lse.offset(problem.batch, b) : 0;
  for (int64_t i = 0; i < rows.rows(); ++i) {
    const int64_t original = batch.original_row(block * kRowBlock + i), row = b * problem.queries + original;
    if (rows.empty(i)) {
      if (task.grad_query) task.grad_query[row] = 0;
      continue;
    }
    double g = 0, g_lse = 0;
    read(task.grad_out, grad + original * task.grad_out.row_stride, 1, 0, &g);
    if (task.grad_lse.data) read(task.grad_lse, grad_lse + original * task.grad_lse.row_stride, 1, 0, &g_lse);
    if (task.grad_query) {
      const double by_lse = task.grad_lse.data ? g_lse * rows.lse_by_query(i) : 0;
      task.grad_query[row] = static_cast<R>(g * rows.out_by_query(i) + by_lse);
    }
    if (task.grad_w) *grad_w += g * rows.out_by_w(i) + (task.grad_lse.data ? g_lse * rows.lse_by_w(i) : 0);
  }
}

// run(batch, b, block) over all row blocks of all batch elements.
template <typename T, typename Run>
void over_row_blocks(const Problem& problem, const Run& run) {
  const int64_t blocks = (problem.queries + kRowBlock - 1) / kRowBlock;
  const double pairs = static_cast<double>(problem.queries) * static_cast<double>(problem.keys);
  if (problem.batch.count > blocks) {
    const int64_t chunks = (problem.batch.count + kBatchChunk - 1) / kBatchChunk;
    parallel_blocks(chunks, pairs * static_cast<double>(problem.batch.count) < kSerialPairs, [&](int64_t chunk) {
      ScalarBatch<T> batch;  // keeps its memory from one batch element to the next
      const int64_t end = std::min(problem.batch.count, (chunk + 1) * kBatchChunk);
      for (int64_t b = chunk * kBatchChunk; b < end; ++b) {
        batch.prepare(problem, b);
        for (int64_t block = 0; block < blocks; ++block) run(batch, b, block);
      }
    });
    return;
  }
  ScalarBatch<T> batch;
  for (int64_t b = 0; b < problem.batch.count; ++b) {
    batch.prepare(problem, b);
    parallel_blocks(blocks, pairs < kSerialPairs, [&](int64_t block) { run(batch, b, block); });
  }
}

template <typename T, typename R>
void forward_in(const Problem& problem, const ForwardResult<R>& result) {
  const Kernels<T>& table = kernels<T>();
  over_row_blocks<T>(problem, [&](const ScalarBatch<T>& batch, int64_t b, int64_t block) {
    forward_block(problem, batch, table, b, block, result);
  });
}

template <typename T, typename R>
void query_backward_in(const Problem& problem, const BackwardTask<R>& task) {
  const Kernels<T>& table = kernels<T>();
  const int64_t blocks = (problem.queries + kRowBlock - 1) / kRowBlock;
  Buffer<double> partial(problem.batch.count * blocks);  // added in order below
  over_row_blocks<T>(problem, [&](const ScalarBatch<T>& batch, int64_t b, int64_t block) {
    partial[b * blocks + block] = 0;
    query_block(problem, task, batch, table, b, block, &partial[b * blocks + block]);
  });
  for (int64_t b = 0; task.grad_w && b < problem.batch.count; ++b) {
    task.grad_w[b] = 0;
    for (int64_t block = 0; block < blocks; ++block) task.grad_w[b] += partial[b * blocks + block];
  }
}

// The rows of a batch element as the key side sees them.
template <typename T>
struct KeySide {
  Buffer<T> nearest, value_grad, mean, lse_grad;
  Buffer<double> shift;
  Buffer<int64_t> windows;

  template <typename R>
  void gather(const Problem& problem, const BackwardTask<R>& task, const ScalarBatch<T>& batch,
              const Kernels<T>& kernels, int64_t b, int64_t block) {
    const int64_t first = block * kRowBlock;
    const int64_t grad = task.grad_out.offset(problem.batch, b);
    const int64_t grad_lse = task.grad_lse.data ? task.grad_lse.offset(problem.batch, b) : 0;
    ScalarRows<T> rows;
    bool far = false;
    for (int64_t i = first; i < std::min(first + kRowBlock, problem.queries); ++i) {
      far |= task.state[2 * (b * problem.queries + batch.original_row(i))] > 0;
    }
    batch.locate(kernels, block, far, rows, nearest.get() + first);
    windows[2 * block] = rows.window_begin;
    windows[2 * block + 1] = rows.window_end;
    for (int64_t i = first; i < first + rows.rows; ++i) {
      const int64_t original = batch.original_row(i), row = b * problem.queries + original;
      double g = 0, g_lse = 0;
      read(task.grad_out, grad + original * task.grad_out.row_stride, 1, 0, &g);
      if (task.grad_lse.data) read(task.grad_lse, grad_lse + original * task.grad_lse.row_stride, 1, 0, &g_lse);
      const double total = task.state[2 * row + 1] / batch.weight_unit;
      const bool empty = total == 0;
      shift[i] = task.state[2 * row];
      value_grad[i] = static_cast<T>(empty ? 0 : g / total);
      mean[i] = static_cast<T>(empty ? 0 : task.out[row] - batch.centre);
      lse_grad[i] = static_cast<T>(empty ? 0 : g_lse / total);
    }
  }
};

template <typename T, typename R>
void key_block(const Problem& problem, const BackwardTask<R>& task, const ScalarBatch<T>& batch, const KeySide<T>& side,
               const Kernels<T>& kernels, int64_t b, int64_t block) {
  double sum_value[kKeyBlock], sum_weight[kKeyBlock], sum_offset[kKeyBlock];
  ScalarKeys<T> keys;
  keys.key = batch.key();
  keys.value = batch.value();
  keys.n = problem.keys;
  keys.key_begin = block * kKeyBlock;
  keys.key_end = std::min(problem.keys, keys.key_begin + kKeyBlock);
  keys.scale = static_cast<T>(batch.scale());
  keys.rows = problem.queries;
  keys.query = batch.query();
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
  kernels.scalar_keys(keys);
  for (int64_t j = keys.key_begin; j < keys.key_end; ++j) {
    const int64_t i = j - keys.key_begin, place = b * problem.keys + batch.original_key(j);
    const double weight = batch.weight(j);
    if (task.grad_value) task.grad_value[place] = static_cast<R>(weight * sum_value[i]);
    if (task.grad_key) {
      task.grad_key[place] = static_cast<R>(batch.w * (batch.w / batch.unit) * weight * sum_offset[i]);
    }
    if (task.grad_key_weight) task.grad_key_weight[place] = static_cast<R>(sum_weight[i] / batch.weight_unit);
  }
}

template <typename T, typename R>
void key_backward_in(const Problem& problem, const BackwardTask<R>& task) {
  const Kernels<T>& table = kernels<T>();
  const int64_t row_blocks = (problem.queries + kRowBlock - 1) / kRowBlock;
  const int64_t key_blocks = (problem.keys + kKeyBlock - 1) / kKeyBlock;
  const double pairs = static_cast<double>(problem.queries) * static_cast<double>(problem.keys);
  const auto run = [&](ScalarBatch<T>& batch, KeySide<T>& side, int64_t b, bool serial) {
    batch.prepare(problem, b);
    for (Buffer<T>* buffer : {&side.nearest, &side.value_grad, &side.mean, &side.lse_grad}) {
      buffer->allocate(problem.queries);
    }
    side.shift.allocate(problem.queries);
    side.windows.allocate(2 * row_blocks);
    parallel_blocks(row_blocks, serial, [&](int64_t block) { side.gather(problem, task, batch, table, b, block); });
    parallel_blocks(key_blocks, serial, [&](int64_t block) { key_block(problem, task, batch, side, table, b, block); });
  };
  if (problem.batch.count > key_blocks) {
    const int64_t chunks = (problem.batch.count + kBatchChunk - 1) / kBatchChunk;
    parallel_blocks(chunks, pairs * static_cast<double>(problem.batch.count) < kSerialPairs, [&](int64_t chunk) {
      ScalarBatch<T> batch;
      KeySide<T> side;
      const int64_t end = std::min(problem.batch.count, (chunk + 1) * kBatchChunk);
      for (int64_t b = chunk * kBatchChunk; b < end; ++b) run(batch, side, b, true);
    });
  } else {
    ScalarBatch<T> batch;
    KeySide<T> side;
    for (int64_t b = 0; b < problem.batch.count; ++b) run(batch, side, b, pairs < kSerialPairs);
  }
}

}  // namespace

template <>
void scalar_forward<double>(const Problem& problem, const ForwardResult<double>& result) {
  forward_in<double>(problem, result);
}

template <>
void scalar_forward<float>(const Problem& problem, const ForwardResult<float>& result) {
  if (weight_range(problem) > Limits<float>::kWeightRange) {
    forward_in<double>(problem, result);
  } else {
    forward_in<float>(problem, result);
  }
}

template <>
void scalar_query_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  query_backward_in<double>(problem, task);
}

template <>
void scalar_query_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  if (weight_range(problem) > Limits<float>::kWeightRange) {
    query_backward_in<double>(problem, task);
  } else {
    query_backward_in<float>(problem, task);
  }
}

template <>
void scalar_key_backward<double>(const Problem& problem, const BackwardTask<double>& task) {
  key_backward_in<double>(problem, task);
}

template <>
void scalar_key_backward<float>(const Problem& problem, const BackwardTask<float>& task) {
  if (weight_range(problem) > Limits<float>::kWeightRange) {
    key_backward_in<double>(problem, task);
  } else {
    key_backward_in<float>(problem, task);
  }
}

}  // namespace nwfast
