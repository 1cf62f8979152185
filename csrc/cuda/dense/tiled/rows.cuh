// Sums over keys for any number of features and channels in float32: declarations; see tiled/rows.cu.

#pragma once

#include "../../kernels.h"

namespace nwfast {

constexpr int kTile = 64;               // keys of a tile, and rows of a block
constexpr int kChannelChunk = 64;       // channels that a block sums
constexpr int kFewChannels = 8;         // up to so many are summed where the weights are
constexpr float kLowest = -0x1p100f;    // below all scores that count, and finite: inf - inf never occurs
constexpr double kTiledFarScore = 900;  // float32 scores beyond lose the differences between keys

// How weights are multiplied with values: a few channels in the scores' own registers, many by a tile in shared memory,
// or halves by tensor cores.
enum class Product { kFew, kMany, kHalf, kBFloat16 };

struct TilePlan {
  Product product;
  int64_t row_blocks;  // of one batch element
  int64_t chunks;      // of channels
  int64_t parts;       // of the keys, summed by blocks of their own and merged in order
};

// What is subtracted from values before they are summed: tensor cores take halves as they are.
__host__ __device__ constexpr bool has_centre(Product product) {
  return product == Product::kFew || product == Product::kMany;
}

// One channel's values in a batch element.
struct ValueRange {
  float centre, low, high;
};

// The scores' scale of feature f, with w at w_offset of its view: t = -(scale (q - k))^2.
__device__ inline float score_scale(const Problem& problem, int64_t w_offset, int64_t f) {
  return fabsf(problem.w.read<float>(w_offset + f * problem.w.column_stride)) * sqrtf(static_cast<float>(kHalfLog2E));
}

// Whether it is the same for all features, and no square of a difference that counts leaves float32's range without it.
__device__ inline bool has_one_scale(const Problem& problem, int64_t w_offset) {
  const float scale = score_scale(problem, w_offset, 0);
  bool one = scale < 0x1p40f && scale > 0x1p-40f;
  for (int64_t f = 1; f < problem.features; ++f) one &= score_scale(problem, w_offset, f) == scale;
  return one;
}

// How many features, a multiple of `chunk`, have their squares added up before these sums are: about the root of all.
__device__ inline int64_t features_of_block(int64_t features, int chunk) {
  int64_t block = chunk;
  while (block * block < features) block *= 2;
  return block;
}

TilePlan plan_tiles(const Problem& problem, int multiprocessors);

// ranges: (*B, C).
void launch_value_ranges(const Problem& problem, const Device& device, ValueRange* ranges);

// states (*B, parts, M, 2): the largest score and the total relative to it. sums (*B, parts, M, C), of values less
// their centre, if the product has one.
void launch_tile_sums(const Problem& problem, const Device& device, const TilePlan& plan, const ValueRange* ranges,
                      float* states, float* sums);

}  // namespace nwfast
