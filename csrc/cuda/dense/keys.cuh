// The gradients of one key in double, by one warp or one thread: any number of features and channels, any data; see
// rows.cuh. Those of most data are in float32, in single/keys.cu and tiled/grads.cu.
//
//   dv_jc = sum_i p_ij g_ic,   dk_jf = w_f^2 sum_i u_ij (q_if - k_jf),   da_j = sum_i u_ij / a_j
//
// with p_ij = a_j e_ij, and e_ij = 2^t_ij / total_i recomputed relative to the row's base, which a first kernel found
// (gather_rows in backward.cu). a_j is factored out: nothing is divided by it, as it may be 0. Where it is tiny, e_ij
// is 2^-kKeyLift times as large.

#pragma once

#include <cfloat>

#include "rows.cuh"

namespace nwfast {

// A row as the key side sees it.
struct KeyRow {
  int64_t nearest;  // -1: powers are not relative to any key
  int32_t skip;     // a row without keys, which adds nothing
  int32_t far;      // a row that the float32 kernels leave to the ones in double
  double lift;      // see rows.cuh
};

// Fills in the nearest keys of those rows of a warp, a lane for each, that are relative to them: all lanes for each.
__device__ __forceinline__ void find_nearest_keys(const Problem& problem, int64_t b, int64_t i, bool relative,
                                                  KeyRow& own) {
  for (unsigned left = __ballot_sync(kAllLanes, relative); left; left &= left - 1) {
    const int lane = __ffs(static_cast<int>(left)) - 1;
    Row row(problem, b, i - lane_number() + lane);
    row.find_nearest();
    if (lane == lane_number()) {
      own.nearest = row.nearest;
      own.lift = row.lift;
    }
  }
}

constexpr double kLargestTerm = 0x1p980;  // sums of so many stay finite
constexpr double kKeyLift = 512, kLargestExponent = 1e300;
// A sum of terms x 2^exponent, each of which may be beyond all numbers: relative to the largest exponent.
struct PowerSum {
  double sum = 0, top = -HUGE_VAL;

  __device__ void add(double x, double exponent) {
    if (x == 0) return;
    if (exponent > kLargestExponent) exponent = kLargestExponent;  // differences of exponents are numbers
    const double before = top;
    if (exponent > top) top = exponent;
    sum = (before == top ? sum : sum * exp2_of(before - top)) + x * exp2_of(exponent - top);
    if (isinf(sum)) sum = copysign(DBL_MAX, sum);  // 0 times it is 0
  }
  // Of one thread, or of all lanes; infinite where it is beyond the largest number.
  __device__ double total(bool of_lanes) const {
    double all = sum, most = top;
    if (of_lanes) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) most = fmax(most, __shfl_xor_sync(kAllLanes, most, step));
      all = warp_sum(top == most ? sum : sum * exp2_of(top - most));
    }
    if (most == -HUGE_VAL) return all;
    int step = 0;
    do {
      all *= exp2_of(most < kMostScore ? most : kMostScore);
      most -= kMostScore;
    } while (most > 0 && ++step < 3);
    return all;
  }
};

// The gradient of a key's weight as it is written: that of a key which is left out may be too large for its dtype, and
// is 0 where the key itself is not finite.
__device__ inline double weight_gradient(const Problem& problem, const Row& row, int64_t j, double gradient,
                                         bool wide) {
  if (row.weight(j) != 0) return gradient;
  bool finite = true;
  for (int64_t f = 0; f < problem.features; ++f) finite &= isfinite(row.key(j, f)) != 0;
  for (int64_t c = 0; c < problem.channels; ++c) finite &= isfinite(row.value(j, c)) != 0;
  const double most = wide ? DBL_MAX : static_cast<double>(FLT_MAX);
  return !finite ? 0 : gradient > most ? most : gradient < -most ? -most : gradient;  // NaN stays
}

// Writes the gradients of key j of batch element b; or adds what the far rows have to what is there, where float32 sums
// hold all others. kShared: a warp's lanes share the rows, and lane 0 writes.
template <bool kShared>
__device__ __forceinline__ void key_gradient(const Problem& problem, const BackwardTask& task, const KeyRow* rows,
                                             int64_t b, int64_t j, bool add_far) {
  const int64_t m = problem.queries, features = problem.features, channels = problem.channels;
  const int64_t place = b * problem.keys + j;
  Row row(problem, b, 0);
  const double weight = row.weight(j);
  const bool left_out = weight == 0, tiny = weight > 0 && weight < kTinyWeight;
  const double lifted = tiny ? weight * exp2_of(kKeyLift) : weight;
  const bool inner = task.grad_key.data || task.grad_key_weight.data;
  const int lane = kShared ? lane_number() : 0;
  const auto sum = [](double x) { return kShared ? warp_sum(x) : x; };
  const auto give = [&](const Result& result, int64_t at, double x) {
    if (lane > 0) return;
    add_far ? result.add(at, x) : result.write(at, x);
  };
  const int64_t passes = features > channels ? features : channels;
  for (int64_t first = 0; first < passes; first += kAtOnce) {
    double values[kAtOnce] = {}, offsets[kAtOnce] = {}, weights = 0;
    PowerSum steep;
    for (int64_t i = lane; i < m; i += kShared ? kWarp : 1) {
      const KeyRow info = rows[b * m + i];
      if (info.skip || (add_far && !info.far)) continue;
      row.move_to(i);
      if (row.excluded(j)) continue;
      row.nearest = info.nearest;
      row.lift = tiny ? info.lift - kKeyLift : info.lift;
      const RowGrad grad(problem, task, b, i);
      row.rounded = !(grad.shift < kRoundedScore);
      if (left_out) {
        if (!task.grad_key_weight.data || first > 0) continue;
        const double exponent = row.exponent(j);
        if (exponent <= -1022) continue;  // what it holds may be infinite
        steep.add((grad.pull(problem, task, row, j) + grad.lse) / grad.total, exponent);
        continue;
      }
      double e = row.power(j) / grad.total;
      if (e == 0) continue;  // the key's offset may be infinite
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (first + r < channels) values[r] += e * grad.out(task, first + r);
      }
      if (!inner || first >= features) continue;
      double u = e * (grad.pull(problem, task, row, j) + grad.lse);
      if (fabs(u) > kLargestTerm) u = copysign(kLargestTerm, u);
      weights += u;
      if (u == 0) continue;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int64_t f = first + r;
        if (f < features) offsets[r] += u * row.scaled(row.query(f), row.key(j, f), f);
      }
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (task.grad_value.data && first + r < channels) {
        const double total = sum(values[r]);
        give(task.grad_value, place * channels + first + r, left_out ? 0 : lifted * total);
      }
      if (task.grad_key.data && first + r < features) {
        const double w = row.w(first + r), more = 1 / row.half(first + r), total = sum(offsets[r]);
        give(task.grad_key, place * features + first + r, left_out ? 0 : w * (more * (lifted * total)));
      }
    }
    if (task.grad_key_weight.data && first == 0) {
      double total = left_out ? steep.total(kShared) : sum(weights);
      if (tiny) total *= exp2_of(kKeyLift);
      if (add_far) total += task.grad_key_weight.read(place);
      if (lane == 0) {
        const bool wide = task.grad_key_weight.wide;
        task.grad_key_weight.write(place, weight_gradient(problem, row, j, total, wide));
      }
    }
  }
}

}  // namespace nwfast
