// Sums of the backward pass for any number of features and channels in float32: declarations; see tiled/grads.cu for
// the sums and tiled/backward.cu for what surrounds them.

#pragma once

#include "rows.cuh"

namespace nwfast {

constexpr int kGradFeatures = 8;  // features whose sums a block holds
constexpr float kLeastUnit = 0x1p-40f;

// A row as the tiles see it: p_ij = 2^(t_ij - exponent) inverse_total and u_ij = p_ij (<g, v_j - centre> -
// offset_grad). inverse_total = 0: a row without keys, or one left to the kernels in double.
struct TileRow {
  float exponent, inverse_total, offset_grad;
};

struct GradPlan {
  int64_t own_blocks;  // of one batch element
  int64_t chunks;      // of features, or of channels
  int64_t parts;       // of the keys, or rows, that are summed over, each by blocks of its own
};

// What offsets q_f - k_f are multiplied by in sums: the scale of the scores, but for bandwidths next to 0.
__device__ inline float offset_unit(float scale) { return fmaxf(scale, kLeastUnit); }

GradPlan plan_query_grads(const Problem& problem, int multiprocessors);
GradPlan plan_key_grads(const Problem& problem, const BackwardTask& task, int multiprocessors);

// Sums of a key: gradients by its value's channels, its features' offsets, its weight.
__host__ __device__ inline int64_t key_columns(const Problem& problem) {
  return problem.channels + problem.features + 1;
}

// partial: (*B, parts, D, 2, M), sum_j u_ij {x, x^2} with x = (q_if - k_jf) offset_unit.
void launch_query_grads(const Problem& problem, const Device& device, const BackwardTask& task, const GradPlan& plan,
                        const ValueRange* ranges, const TileRow* rows, float* partial);

// partial: (*B, parts, N, key_columns), sums over i without the key's own weight; of what is wanted.
void launch_key_grads(const Problem& problem, const Device& device, const BackwardTask& task, const GradPlan& plan,
                      const ValueRange* ranges, const TileRow* rows, float* partial);

// The two sides, with all that they need. The query side adds its parts of the gradient of w, one of each feature for
// 32 rows, to grad_w (*B, ceil(M / 32), D).
void tiled_query_side(const Problem& problem, const Device& device, const BackwardTask& task, double* grad_w,
                      Arena& arena);
void tiled_key_side(const Problem& problem, const Device& device, const BackwardTask& task, Arena& arena);

}  // namespace nwfast
