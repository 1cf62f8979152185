// The gradients of one key in double, by one warp or one thread: any number of features and channels, any data; see
// rows.cuh.
//
//   dv_jc = sum_i p_ij g_ic,   dk_jf = w_f^2 sum_i u_ij (q_if - k_jf),   da_j = sum_i u_ij / a_j
//
// with p_ij = a_j e_ij, and e_ij = 2^t_ij / total_i recomputed relative to the row's base, which a first kernel found
// (gather_rows in backward.cu). a_j is factored out: nothing is divided by it, as it may be 0.

#pragma once

#include "rows.cuh"

namespace nwfast {

// A row as the key side sees it.
struct KeyRow {
  int64_t nearest;  // -1: powers are not relative to any key
  int32_t skip;     // a row without keys, which adds nothing
  int32_t far;      // a row that the float32 kernels leave to the ones in double
};

// Writes the gradients of key j of batch element b; or adds what the far rows have to what is there, where float32 sums
// hold all others. kShared: a warp's lanes share the rows, and lane 0 writes.
template <bool kShared>
__device__ __forceinline__ void key_gradient(const Problem& problem, const BackwardTask& task, const KeyRow* rows,
                                             int64_t b, int64_t j, bool add_far) {
  const int64_t m = problem.queries, features = problem.features, channels = problem.channels;
  const int64_t place = b * problem.keys + j;
  Row row(problem, b, 0);
  const double weight = row.weight(j);
  const bool inner = task.grad_key.data || task.grad_key_weight.data;
  const int lane = kShared ? lane_number() : 0;
  const auto sum = [](double x) { return kShared ? warp_sum(x) : x; };
  const auto give = [&](const Result& result, int64_t at, double x) {
    if (lane > 0) return;
    add_far ? result.add(at, x) : result.write(at, x);
  };
  const int64_t passes = features > channels ? features : channels;
  for (int64_t first = 0; first < passes; first += kChunk) {
    double values[kChunk] = {}, offsets[kChunk] = {}, weights = 0;
    for (int64_t i = lane; i < m; i += kShared ? kWarp : 1) {
      const KeyRow info = rows[b * m + i];
      if (info.skip || (add_far && !info.far)) continue;
      row.move_to(i);
      if (row.excluded(j)) continue;
      row.nearest = info.nearest;
      const RowGrad grad(problem, task, b, i);
      const double e = row.power(j) / grad.total;
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        if (first + r < channels) values[r] += e * grad.out(task, first + r);
      }
      if (!inner || first >= features) continue;
      const double u = e * (grad.pull(problem, task, row, j) + grad.lse);
      weights += u;
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        if (first + r < features) offsets[r] += u * (row.query(first + r) - row.key(j, first + r));
      }
    }
#pragma unroll
    for (int r = 0; r < kChunk; ++r) {
      if (task.grad_value.data && first + r < channels) {
        give(task.grad_value, place * channels + first + r, weight * sum(values[r]));
      }
      if (task.grad_key.data && first + r < features) {
        const double w = row.w(first + r);
        give(task.grad_key, place * features + first + r, w * (w * (weight * sum(offsets[r]))));
      }
    }
    if (task.grad_key_weight.data && first == 0) give(task.grad_key_weight, place, sum(weights));
  }
}

}  // namespace nwfast
