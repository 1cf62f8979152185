// One row of the op in double, by one warp: any number of features and channels, any data.
//
//   t_j = -kHalfLog2E sum_f w_f^2 ((q_f - k_jf)^2 - (q_f - k*_f)^2),   p_j = a_j 2^t_j
//
// relative to the row's nearest key k* (of positive weight), which a first pass finds. The difference of squares is
// written as (k* - k_j)(q - k_j + q - k*), so that nothing cancels however far the query lies, and no score of a key
// that counts can underflow; far from all keys 2 q - k* is taken with the rest that it rounds off, which tells keys
// apart that lie across a gap from k*. Where all weights that count are tiny, terms are 2^lift times as large, and the
// shift of the row's state as much larger. Values are taken relative to the nearest key's, which makes one-hot rows
// exact.
//
// So go all rows of float64, of small problems and of keys of their own for each query, and of others the far rows,
// which the float32 kernels leave out. Lanes share the keys; every lane ends up with the same sums.

#pragma once

#include "../problem.cuh"
#include "wide.cuh"

namespace nwfast {

constexpr double kMostScore = 1023;       // a key of weight 0 may lie nearer than all that count: 0 * 2^t must stay 0
constexpr double kRoundedScore = 0x1p30;  // from here on the rounding of a squared distance may tell keys apart
constexpr double kTinyWeight = 0x1p-500;  // below it sums of terms may leave the normal numbers
constexpr double kMostLift = 1000;
constexpr int kMostSteps = 8;  // from a key to a nearer one: each is exact to the rounding of the step before
constexpr int kAtOnce = 4;     // channels, or features, whose sums a lane holds at once

class Row {
 public:
  __device__ Row(const Problem& problem, int64_t b, int64_t i)
      : problem_(problem),
        queries_(problem.query.offset(problem.batch, b)),
        key_(problem.key.offset(problem.batch, b)),
        value_(problem.value.offset(problem.batch, b)),
        w_(problem.w.offset(problem.batch, b)),
        key_weight_(problem.key_weight.data ? problem.key_weight.offset(problem.batch, b) : 0),
        first_w_(problem.w.read<double>(w_)) {
    if (i < problem.queries) move_to(i);
  }

  __device__ void move_to(int64_t i) {
    i_ = i;
    query_ = queries_ + i * problem_.query.row_stride;
    first_query_ = problem_.query.read<double>(query_);
  }

  __device__ double query(int64_t f) const {
    return f == 0 ? first_query_ : problem_.query.read<double>(query_ + f * problem_.query.column_stride);
  }
  __device__ double w(int64_t f) const {
    return f == 0 ? first_w_ : problem_.w.read<double>(w_ + f * problem_.w.column_stride);
  }
  __device__ double key(int64_t j, int64_t f) const {
    return problem_.key.read<double>(key_ + j * problem_.key.row_stride + f * problem_.key.column_stride);
  }
  __device__ double value(int64_t j, int64_t c) const {
    return problem_.value.read<double>(value_ + j * problem_.value.row_stride + c * problem_.value.column_stride);
  }
  __device__ bool excluded(int64_t j) const { return problem_.exclude_self && j == i_; }
  // Neither left out by its weight nor the row's own: what other keys hold is not looked at.
  __device__ bool counts(int64_t j) const { return !excluded(j) && weight(j) != 0; }
  __device__ double weight(int64_t j) const {
    if (!problem_.key_weight.data) return 1;
    const double weight = problem_.key_weight.read<double>(key_weight_ + j * problem_.key_weight.row_stride);
    return weight < 0 ? NAN : weight;
  }

  // k*_f; the query itself where there is no key to refer to.
  __device__ double base(int64_t f) const {
    return nearest < 0 ? query(f) : nearest == 0 ? key(0, f) : key(nearest, f);
  }

  // The squared distance of key j beyond that of the base, in units of the score.
  __device__ double excess(int64_t j) const {
    double sum = 0;
    for (int64_t f = 0; f < problem_.features; ++f) {
      const double k = key(j, f), q = query(f), origin = base(f), scale = w(f);
      sum += (scale * (origin - k)) * (scale * (rounded ? both_distances(q, k, origin) : (q - k) + (q - origin)));
    }
    if (!(fabs(sum) < kWide) && finite_places(j)) sum = in_order(wide_sum(j, true));
    return sum * kHalfLog2E;
  }

  // What lengths of feature f are multiplied with so that differences do not overflow: exact where that may happen.
  __device__ double half(int64_t f) const { return fabs(w(f)) < 1 ? 0.5 : 1; }
  // (a - b) half(f) in bandwidths.
  __device__ double scaled(double a, double b, int64_t f) const {
    const double factor = half(f);
    return w(f) * (a * factor - b * factor);
  }
  // `from`, a multiple of scaled(k*, k), times ((q - k) + (q - k*)) half(f): a factor of 0 is not multiplied.
  __device__ double scaled_squares(double from, double q, double k, double origin, int64_t f) const {
    const double factor = half(f);
    return from == 0 ? 0 : from * ((q * factor - k * factor) + (q * factor - origin * factor));
  }

  __device__ double exponent(int64_t j) const { return lift - excess(j); }

  // a_j 2^t_j without a_j.
  __device__ double power(int64_t j) const {
    const double t = exponent(j);
    return exp2_of(t > kMostScore ? kMostScore : t);
  }

  // Sets nearest (-1 if no key is left) and distance. Where squared distances are so large that keys with different
  // ones may look the same, differences of squares decide.
  __device__ __forceinline__ void find_nearest() {
    is_nan = !finite_w() || isnan_query();
    if (is_nan) return;
    compare_squares();
    rounded = !(distance < kRoundedScore);
    for (int step = 0; step < kMostSteps && nearest >= 0 && rounded && step_nearer(); ++step) {
    }
    if (nearest >= 0 && !is_nan && weight(nearest) < kTinyWeight) find_lift();
  }

  int64_t nearest = -1;
  double distance = 0;  // of the nearest key, squared, in units of the score
  double lift = 0;
  bool rounded = false;  // whether sums of two distances need the rest that they round off
  bool is_nan = false;   // whether the query, w or some key's score is NaN

 private:
  __device__ bool finite_w() const {
    bool finite = true;
    for (int64_t f = 0; f < problem_.features; ++f) finite &= isfinite(w(f)) != 0;
    return finite;
  }
  // Asked first, since there may be no key whose score it makes NaN.
  __device__ bool isnan_query() const {
    bool undefined = false;
    for (int64_t f = 0; f < problem_.features; ++f) undefined |= isnan(query(f)) != 0;
    return undefined;
  }

  // Takes the least of x over the warp's lanes, and the first of the places that have it.
  __device__ static __forceinline__ void take_least(double& least, int64_t& at) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, least, step);
      const int64_t place = __shfl_xor_sync(kAllLanes, at, step);
      if (other < least || (other == least && place >= 0 && (at < 0 || place < at))) {
        least = other;
        at = place;
      }
    }
  }

  __device__ bool finite_places(int64_t j) const {
    bool finite = true;
    for (int64_t f = 0; f < problem_.features; ++f) {
      finite &= isfinite(key(j, f)) && isfinite(query(f)) && isfinite(base(f));
    }
    return finite;
  }

  // Whatever the terms of the sum are: that of excess(j), if `relative`, or of the squares (w (q - k))^2.
  __device__ Wide wide_sum(int64_t j, bool relative) const {
    const int64_t key = key_ + j * problem_.key.row_stride;
    const bool by_key = relative && nearest >= 0;
    return wide_sum_of(problem_, query_, key, by_key ? key_ + nearest * problem_.key.row_stride : -1, w_, relative);
  }

  // Sets the lift from the largest term of the row.
  __device__ __forceinline__ void find_lift() {
    double least = HUGE_VAL;
    int64_t at = -1;
    for (int64_t j = lane_number(); j < problem_.keys; j += kWarp) {
      if (!counts(j)) continue;
      const double below = excess(j) - log2(weight(j));
      if (below < least) least = below;
    }
    take_least(least, at);
    if (least > -log2(kTinyWeight)) lift = floor(least < kMostLift ? least : kMostLift);
  }

  // Whether a key is nearer than `nearest`, by its excess: the one with the least takes its place.
  __device__ __forceinline__ bool step_nearer() {
    double least = 0;
    int64_t at = -1;
    for (int64_t j = lane_number(); j < problem_.keys; j += kWarp) {
      if (!counts(j)) continue;
      const double beyond = excess(j);
      if (beyond < least) {
        least = beyond;
        at = j;
      }
    }
    take_least(least, at);
    if (at < 0) return false;
    nearest = at;
    return true;
  }

  __device__ __forceinline__ void compare_squares() {
    double least = HUGE_VAL;
    bool undefined = false;
    int64_t at = -1;
    for (int64_t j = lane_number(); j < problem_.keys; j += kWarp) {
      const double own = weight(j);
      if (excluded(j) || own == 0) continue;
      double sum = square(j);
      if (!(sum < kWide) && finite_places(j)) sum = in_order(wide_sum(j, false));
      if (sum < least) {
        least = sum;
        at = j;
      }
      undefined |= isnan(sum) || isnan(own);
    }
    take_least(least, at);
    is_nan = __ballot_sync(kAllLanes, undefined) != 0;
    nearest = at;
    distance = least * kHalfLog2E;
    if (at < 0 || least < kWide) return;
    const Wide all = wide_sum(at, false);
    distance = ldexp(all.x * kHalfLog2E, all.exponent);
  }

  __device__ double square(int64_t j) const {
    double sum = 0;
    for (int64_t f = 0; f < problem_.features; ++f) {
      const double offset = w(f) * (query(f) - key(j, f));
      sum += offset * offset;
    }
    return sum;
  }

  const Problem& problem_;
  int64_t queries_, key_, value_, w_, key_weight_, i_ = -1, query_ = 0;
  double first_w_, first_query_ = 0;
};

// Writes all results of row i of batch element b.
__device__ __forceinline__ void forward_row(const Problem& problem, const ForwardResult& result, int64_t b, int64_t i) {
  const int64_t n = problem.keys, channels = problem.channels, place = b * problem.queries + i;
  const int lane = lane_number();
  Row row(problem, b, i);
  row.find_nearest();
  const bool empty = row.nearest < 0;
  const bool tangents = result.tangent_w.data || result.tangent_q.data;
  double total = empty && row.is_nan ? NAN : 0;
  for (int64_t first = 0; first<channels; first += channels> kAtOnce ? kAtOnce * kWarp : kAtOnce) {
    double sums[kAtOnce] = {}, square = 0, square_value = 0, offset = 0, offset_value = 0, centre[kAtOnce];
    const bool wide = channels > kAtOnce;  // lanes own channels
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t c = wide ? first + lane + r * kWarp : first + r;
      const double value = !empty && c < channels ? row.value(row.nearest, c) : 0;
      centre[r] = isfinite(value) ? value : 0;
    }
    if (!empty) {
      total = 0;
      for (int64_t begin = 0; begin < n; begin += kWarp) {
        const int64_t j = begin + lane;
        double p = 0;
        if (j < n && row.counts(j)) p = row.weight(j) * row.power(j);
        total += p;
        if (wide) {
          for (int64_t l = 0; l < kWarp && begin + l < n; ++l) {
            const double other = __shfl_sync(kAllLanes, p, static_cast<int>(l));
#pragma unroll
            for (int r = 0; r < kAtOnce; ++r) {
              const int64_t c = first + lane + r * kWarp;
              if (c < channels && row.counts(begin + l)) sums[r] += other * (row.value(begin + l, c) - centre[r]);
            }
          }
          continue;
        }
        if (j >= n || !row.counts(j)) continue;
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          if (first + r < channels) sums[r] += p * (row.value(j, first + r) - centre[r]);
        }
        if (tangents && p != 0) {  // else the offset may be infinite
          const double value = row.value(j, 0) - centre[0], k = row.key(j, 0), q = row.query(0), origin = row.base(0);
          const double from = p * row.scaled(origin, k, 0), squares = row.scaled_squares(from, q, k, origin, 0);
          square += squares;
          square_value += squares * value;
          offset += from;
          offset_value += from * value;
        }
      }
      total = warp_sum(total);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t c = wide ? first + lane + r * kWarp : first + r;
      if (!wide && c >= channels) continue;
      const double mean = (wide ? sums[r] : warp_sum(sums[r])) / total;
      if (c < channels && (wide || lane == 0)) {
        result.out.write(place * channels + c, empty ? NAN : centre[r] + mean);
      }
    }
    if (tangents) {
      const double w = row.w(0), more = 1 / row.half(0), mean = warp_sum(sums[0]) / total;
      square = warp_sum(square), square_value = warp_sum(square_value);
      offset = warp_sum(offset), offset_value = warp_sum(offset_value);
      if (lane == 0 && result.tangent_w.data) {
        result.tangent_w.write(place, total == 0 ? 0 : more * (more * (-(square_value - mean * square) / total)));
      }
      if (lane == 0 && result.tangent_q.data) {
        result.tangent_q.write(place, total == 0 ? 0 : -w * (more * ((offset_value - mean * offset) / total)));
      }
    }
  }
  if (lane > 0) return;
  const SoftmaxState state{empty ? 0 : row.distance + row.lift, total};
  result.lse.write(place, log_sum(state));
  result.state[2 * place] = state.shift;
  result.state[2 * place + 1] = state.total;
}

// What the backward pass reads of a row, beside the row itself.
struct RowGrad {
  __device__ __forceinline__ RowGrad(const Problem& problem, const BackwardTask& task, int64_t b, int64_t i)
      : place(b * problem.queries + i),
        shift(task.state[2 * place]),
        total(task.state[2 * place + 1]),
        grad_(task.grad_out.offset(problem.batch, b) + i * task.grad_out.row_stride) {
    if (task.grad_lse.data) {
      lse = task.grad_lse.read<double>(task.grad_lse.offset(problem.batch, b) + i * task.grad_lse.row_stride);
    }
  }
  // Whether nothing comes back to the row: then it adds nothing to any gradient, not even where it is NaN.
  __device__ bool unused(const Problem& problem, const BackwardTask& task) const {
    bool zero = lse == 0;
    for (int64_t c = 0; zero && c < problem.channels; ++c) zero = out(task, c) == 0;
    return zero;
  }
  __device__ double out(const BackwardTask& task, int64_t c) const {
    return task.grad_out.read<double>(grad_ + c * task.grad_out.column_stride);
  }
  // <g, v_j - out>: the difference first, which is 0 where the row's weight is all on this key.
  __device__ __forceinline__ double pull(const Problem& problem, const BackwardTask& task, const Row& row,
                                         int64_t j) const {
    double sum = 0;
    for (int64_t c = 0; c < problem.channels; ++c) {
      sum += out(task, c) * (row.value(j, c) - task.out.read(place * problem.channels + c));
    }
    return sum;
  }

  int64_t place;
  double shift, total, lse = 0;

 private:
  int64_t grad_;
};

// The gradient of one query, and the row's part of the gradient of w: added to grad_w (features) if not null.
//
//   u_j = p_j (<g, v_j - out> + g_lse),   dq_f = -w_f^2 sum_j u_j (q_f - k_jf),   dw_f = -w_f sum_j u_j (q_f - k_jf)^2
//
// about k*, with sum_j u_j = g_lse.
__device__ __forceinline__ void query_row(const Problem& problem, const BackwardTask& task, int64_t b, int64_t i,
                                          double* grad_w) {
  const int64_t features = problem.features;
  const RowGrad grad(problem, task, b, i);
  if (grad.total == 0 || grad.unused(problem, task)) {
    for (int64_t f = lane_number(); task.grad_query.data && f < features; f += kWarp) {
      task.grad_query.write(grad.place * features + f, 0);
    }
    return;
  }
  Row row(problem, b, i);
  if (grad.shift != 0) row.find_nearest();  // else the total is of powers that are not relative to any key
  for (int64_t first = 0; first < features; first += kAtOnce) {
    double offset[kAtOnce] = {}, square[kAtOnce] = {};
    for (int64_t j = lane_number(); j < problem.keys; j += kWarp) {
      if (!row.counts(j)) continue;
      const double p = row.weight(j) * row.power(j) / grad.total;
      if (p == 0) continue;  // its offset may be infinite
      const double u = p * (grad.pull(problem, task, row, j) + grad.lse);
      if (u == 0) continue;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int64_t f = first + r;
        if (f >= features) continue;
        const double k = row.key(j, f), q = row.query(f), origin = row.base(f);
        // In bandwidths first: squares of lengths may be beyond all numbers, or below.
        const double from = row.scaled(origin, k, f);
        offset[r] += u * from;
        square[r] += row.scaled_squares(u * from, q, k, origin, f);
      }
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t f = first + r;
      if (f >= features) continue;
      const double w = row.w(f), q = row.query(f), origin = row.base(f), factor = row.half(f), more = 1 / factor;
      double offsets = warp_sum(offset[r]), squares = warp_sum(square[r]);
      if (grad.lse != 0) {
        const double from = grad.lse * row.scaled(q, origin, f);
        offsets += from;
        squares += from == 0 ? 0 : from * (q * factor - origin * factor);
      }
      if (lane_number() > 0) continue;
      if (task.grad_query.data) task.grad_query.write(grad.place * features + f, -w * (more * offsets));
      if (grad_w) grad_w[f] -= more * (more * squares);
    }
  }
}

}  // namespace nwfast
