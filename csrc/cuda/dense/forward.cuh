// What the forward pass and the query side of the backward pass share: rows of float32 sums, and which problems get
// them.

#pragma once

#include "rows.cuh"
#include "single/rows.cuh"
#include "tiled/rows.cuh"

namespace nwfast {

// From so many pairs in a batch element on, and so many keys, float32 sums pay; below, a launch more costs more than
// double arithmetic does.
constexpr int64_t kSinglePairs = 1 << 18, kSingleKeys = 128;

inline bool is_double(const Problem& problem) { return problem.query.dtype == Dtype::kDouble; }

inline bool has_single_kernels(const Problem& problem) {
  return problem.single() && !is_double(problem) && problem.keys >= kSingleKeys &&
         problem.queries * problem.keys >= kSinglePairs;
}

// Any other float32 arithmetic. Smaller problems have no tile to fill.
constexpr int64_t kTiledSide = 32, kTiledPairs = 1 << 14;

inline bool has_tiled_kernels(const Problem& problem) {
  return !problem.single() && !is_double(problem) && problem.queries >= kTiledSide && problem.keys >= kTiledSide &&
         problem.queries * problem.keys >= kTiledPairs;
}

// One row's sums over all parts of the keys, added in order.
struct SingleRow {
  __device__ SingleRow(const Problem& problem, const RowPlan& plan, const Survey& survey, const float* partial,
                       int64_t b, int64_t i)
      : centre(survey.centre), low(survey.low), high(survey.high), weight_unit(survey.weight_unit) {
    const int64_t m = problem.queries;
    if (i >= m || !survey.usable) return;
    for (int64_t part = 0; part < plan.parts; ++part) {
      const float* const from = partial + (b * plan.parts + part) * plan.sums * m + i;
#pragma unroll
      for (int s = 0; s < kRowSums; ++s) {
        if (s < plan.sums) sums[s] += static_cast<double>(from[s * m]);
      }
    }
    total = sums[kTotal];
    w = problem.w.read<double>(problem.w.offset(problem.batch, b));
    const int64_t query = problem.query.offset(problem.batch, b) + i * problem.query.row_stride;
    good = isfinite(problem.query.read<float>(query)) && total >= exp2(-kFarTotal);
  }

  __device__ double mean() const { return sums[kValue] / total; }  // of the centred values
  __device__ double covariance(int which) const { return (sums[which + 1] - mean() * sums[which]) / total; }
  __device__ double out_by_w() const { return -w * covariance(kSquare); }
  __device__ double out_by_query() const { return -w * (w * covariance(kOffset)); }
  __device__ double lse_by_w() const { return -w * (sums[kSquare] / total); }
  __device__ double lse_by_query() const { return -w * (w * (sums[kOffset] / total)); }

  bool good = false;
  double sums[kRowSums] = {}, total = 0, w = 0;
  double centre;
  float low, high, weight_unit;
};

}  // namespace nwfast
