// Sums over keys for any number of features and channels in float32, flash-attention's online softmax:
//
//   t_ij = -sum_f (w_f (q_if - k_jf))^2 + log2 a_j,   sum_j 2^(t_ij - m_i) {1, v_jc},   m_i = max_j t_ij
//
// A block owns 64 rows, each of its four warps 16, and walks over tiles of 64 keys; where the maximum of a row rises,
// what was summed is scaled down. Scores lie in registers as the tensor cores hold the product of a (16, 64) matrix:
// a lane has rows g and g + 8, columns 8 n + 2 p and the one after, with g = lane / 4 and p = lane % 4. Values are
// copied to shared memory while the scores are computed. Blocks for parts of the keys fill the chip where there are few
// rows.

#include "values.cuh"

namespace nwfast {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 8;
constexpr int64_t kLeastPart = 512;   // keys
constexpr int64_t kInnerKeys = 4096;  // longer float32 sums would lose digits: these go to a second level

// Squared distances, added feature by feature; unscaled if all features have one scale.
template <bool kScaled>
__device__ __forceinline__ void add_distances(const Shared& shared, int features, float (&score)[kGroups][4]) {
  const int lane = lane_number(), row = warp_number() * kWarpRows + lane / 4;
#pragma unroll 1
  for (int f = 0; f < features; ++f) {
    const float upper = shared.query[f][row], lower = shared.query[f][row + 8];
    const float scale = kScaled ? shared.scale[f] : 1;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const float2 k = *reinterpret_cast<const float2*>(&shared.key[f][n * 8 + lane % 4 * 2]);
      float d[4] = {upper - k.x, upper - k.y, lower - k.x, lower - k.y};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kScaled) d[i] *= scale;
        score[n][i] += d[i] * d[i];
      }
    }
  }
}

static_assert(kInnerKeys % kTile == 0, "inner sums are of whole tiles");

// kBlocks: more features than are staged at once, whose sums of blocks take registers.
template <Product kProduct, bool kBlocks>
__global__ void __launch_bounds__(kTileThreads, kBlocks ? 2 : 3)
    sum_tiles(const __grid_constant__ Problem problem, const TilePlan plan, const ValueRange* ranges, float* states,
              float* sums) {
  NWFAST_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  unsigned char* const staged = memory + sizeof(Shared);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_number();
  int64_t rest = blockIdx.x;
  const int64_t part = rest % plan.parts;
  rest /= plan.parts;
  const int64_t first_channel = rest % plan.chunks * kChannelChunk;
  rest /= plan.chunks;
  const int64_t b = rest / plan.row_blocks, first_row = rest % plan.row_blocks * kTile;
  const int64_t m = problem.queries, n = problem.keys, features = problem.features;
  const int channels = static_cast<int>(
      problem.channels - first_channel < kChannelChunk ? problem.channels - first_channel : kChannelChunk);
  const int64_t part_tiles = (n + kTile * plan.parts - 1) / (kTile * plan.parts);
  const int64_t begin = part * part_tiles * kTile;
  const int64_t end = begin + part_tiles * kTile < n ? begin + part_tiles * kTile : n;
  if (thread == 0) {  // read after the next barrier
    shared.query_at = problem.query.offset(problem.batch, b);
    shared.key_at = problem.key.offset(problem.batch, b);
    shared.value_at = problem.value.offset(problem.batch, b);
    shared.w_at = problem.w.offset(problem.batch, b);
    shared.weight_at = problem.key_weight.data ? problem.key_weight.offset(problem.batch, b) : 0;
  }
  const int64_t w = problem.w.offset(problem.batch, b);
  const float scale = score_scale(problem, w, 0);
  const bool uniform = has_one_scale(problem, w);
  const float factor = uniform ? -scale * scale : -1;
  const int64_t block_features = features_of_block(features, kFeatureChunk);

  const int row[2] = {warp_number() * kWarpRows + lane / 4, warp_number() * kWarpRows + lane / 4 + 8};
  float top[2] = {kLowest, kLowest}, total[2] = {};
  bool flushed = false;
  Values<kProduct> values;
  if (lane % 4 == 0) {
    for (const int r : row) shared.outer_top[r] = kLowest, shared.outer_total[r] = 0;
  }
  // Adds the inner sums to the outer ones: totals in shared memory, the others where the block's results go.
  const auto flush = [&] {
    const int64_t place = (b * plan.parts + part) * m + first_row;
    float* const factors = shared.rescale + warp_number() * kWarpRows;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 1);
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
      values.correct(half, total[half]);
      if (lane % 4 == 0) {
        float &outer_top = shared.outer_top[row[half]], &outer_total = shared.outer_total[row[half]];
        const float factor = exp2_approximate(outer_top - top[half]);
        outer_total = outer_total * factor + total[half];
        outer_top = top[half];
        factors[lane / 4 + 8 * half] = factor;
      }
      total[half] = 0;
    }
    __syncwarp();
    values.finish(channels, [&](int r, int c, float sum) {
      const int64_t i = warp_number() * kWarpRows + r;
      if (first_row + i >= m) return;
      float* const to = sums + (place + i) * problem.channels + first_channel + c;
      *to = flushed ? *to * factors[r] + sum : sum;
    });
    values = Values<kProduct>();
    flushed = true;
    __syncwarp();
  };
  for (int64_t from = begin; from < end; from += kTile) {
    const int count = static_cast<int>(end - from < kTile ? end - from : kTile);
    float score[kGroups][4] = {}, block[kGroups][4];
    for (int64_t first = 0; first < features; first += kFeatureChunk) {
      const int some = static_cast<int>(features - first < kFeatureChunk ? features - first : kFeatureChunk);
      __syncthreads();  // nobody reads what is there any more
      for (int at = thread; at < some * kTile; at += kTileThreads) {
        const int j = at % kTile, f = at / kTile;
        const int64_t column = (first + f) * problem.key.column_stride;
        const bool kept = j < count && problem.keeps(shared.weight_at, from + j);
        shared.key[f][j] =
            kept ? problem.key.read<float>(shared.key_at + (from + j) * problem.key.row_stride + column) : 0;
        if (from == begin || features > kFeatureChunk) {
          const int64_t i = first_row + j < m ? first_row + j : m - 1;
          shared.query[f][j] = problem.query.read<float>(shared.query_at + i * problem.query.row_stride +
                                                         (first + f) * problem.query.column_stride);
        }
      }
      if (thread < some) shared.scale[thread] = score_scale(problem, shared.w_at, first + thread);
      if (first == 0) {
        if (thread < kTile) {
          float log_weight = thread < count ? 0 : -INFINITY;
          if (thread < count && problem.key_weight.data) {
            log_weight = log2f(
                problem.key_weight.read<float>(shared.weight_at + (from + thread) * problem.key_weight.row_stride));
          }
          shared.log_weight[thread] = log_weight;
        }
        values.stage(problem, shared.value_at, shared.weight_at, from, count, first_channel, channels,
                     ranges + b * problem.channels, staged);
        commit_copies();
      }
      __syncthreads();
      const auto add = [&](float (&to)[kGroups][4]) {
        if (uniform) {
          add_distances<false>(shared, some, to);
        } else {
          add_distances<true>(shared, some, to);
        }
      };
      if constexpr (!kBlocks) {
        add(score);
        break;
      }
      // Many features: sums of blocks, so that few roundings are as large as the whole.
      const bool starts = first % block_features == 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) block[g][i] = starts ? 0 : block[g][i];
      }
      add(block);
      if ((first + kFeatureChunk) % block_features != 0 && first + kFeatureChunk < features) continue;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[g][i] += block[g][i];
      }
    }
    const bool masked = problem.exclude_self && from < first_row + kTile && from + count > first_row;
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float2 log_weight = *reinterpret_cast<const float2*>(&shared.log_weight[g * 8 + lane % 4 * 2]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[g][i] = score[g][i] * factor + (i % 2 ? log_weight.y : log_weight.x);
        if (masked && from + g * 8 + lane % 4 * 2 + i % 2 == first_row + row[i / 2]) score[g][i] = -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], score[g][i]);  // not of NaN, which the sums keep
      }
    }
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(kAllLanes, highest[half], 1));
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(kAllLanes, highest[half], 2));
      rescale[half] = exp2_approximate(top[half] - highest[half]);
      top[half] = highest[half];
      total[half] *= rescale[half];
      values.lower(half, rescale[half]);
    }
    float sum[2] = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[g][i] = exp2_approximate(score[g][i] - top[i / 2]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i / 2] += score[g][i];
      values.round(score[g], g);
    }
    total[0] += sum[0];
    total[1] += sum[1];
    if (kProduct == Product::kHalf || kProduct == Product::kBFloat16) {
      wait_copies<0>();
      __syncthreads();
    }
    values.add(score, rescale, channels, shared, staged);
    if ((from - begin + kTile) % kInnerKeys == 0) flush();
  }
  flush();
  for (const int r : row) {
    if (first_channel > 0 || lane % 4 > 0 || first_row + r >= m) continue;
    float* const state = states + 2 * ((b * plan.parts + part) * m + first_row + r);
    state[0] = shared.outer_top[r];
    state[1] = shared.outer_total[r];
  }
}

// A block for 32 channels of a batch element, eight rows of keys at a time.
__global__ void __launch_bounds__(kTileThreads)
    range_values(const __grid_constant__ Problem problem, const Blocks blocks, ValueRange* ranges) {
  NWFAST_SHARED(memory);
  constexpr int kSlices = kTileThreads / kWarp;
  float (*const parts)[kWarp][2] = reinterpret_cast<float (*)[kWarp][2]>(memory);
  const int64_t b = blocks.element(), c = blocks.block() * kWarp + lane_number();
  float low = INFINITY, high = -INFINITY, undefined = 0;
  if (c < problem.channels) {
    const int64_t value = problem.value.offset(problem.batch, b) + c * problem.value.column_stride;
    const int64_t weight = problem.key_weight.data ? problem.key_weight.offset(problem.batch, b) : 0;
#pragma unroll 2
    for (int64_t j = warp_number(); j < problem.keys; j += kSlices) {
      if (!problem.keeps(weight, j)) continue;
      const float v = problem.value.read<float>(value + j * problem.value.row_stride);
      low = fminf(low, v);
      high = fmaxf(high, v);
      undefined += v * 0;  // NaN where a value is infinite or NaN
    }
  }
  parts[warp_number()][lane_number()][0] = undefined == 0 ? low : -INFINITY;
  parts[warp_number()][lane_number()][1] = undefined == 0 ? high : INFINITY;
  __syncthreads();
  if (warp_number() > 0 || c >= problem.channels) return;
  for (int slice = 0; slice < kSlices; ++slice) {
    low = fminf(low, parts[slice][lane_number()][0]);
    high = fmaxf(high, parts[slice][lane_number()][1]);
  }
  // Numbers within a factor of two of each other have no rounding error in their difference.
  const float least = fminf(fabsf(low), fabsf(high)), most = fmaxf(fabsf(low), fabsf(high));
  const bool close = (low < 0) == (high < 0) && 3 * least >= most && most < INFINITY;
  ranges[b * problem.channels + c] = {close ? low / 2 + high / 2 : 0, low, high};
}

template <Product kProduct>
void launch_with(const Problem& problem, const Device& device, const TilePlan& plan, const ValueRange* ranges,
                 float* states, float* sums) {
  const auto kernel = problem.features > kFeatureChunk ? sum_tiles<kProduct, true> : sum_tiles<kProduct, false>;
  launch(kernel, problem.batch.count * plan.row_blocks * plan.chunks * plan.parts, kTileThreads,
         shared_bytes<kProduct>(), device.stream, problem, plan, ranges, states, sums);
}

}  // namespace

TilePlan plan_tiles(const Problem& problem, int multiprocessors) {
  TilePlan plan;
  plan.product = problem.channels <= kFewChannels          ? Product::kFew
                 : problem.value.dtype == Dtype::kHalf     ? Product::kHalf
                 : problem.value.dtype == Dtype::kBFloat16 ? Product::kBFloat16
                                                           : Product::kMany;
  plan.row_blocks = blocks_for(problem.queries, kTile);
  plan.chunks = blocks_for(problem.channels, kChannelChunk);
  const int64_t blocks = problem.batch.count * plan.row_blocks * plan.chunks;
  const int64_t most = blocks_for(problem.keys, kLeastPart);
  const int64_t wanted = blocks_for(kBlocksPerMultiprocessor * multiprocessors, blocks);
  plan.parts = wanted > most ? most : wanted;
  return plan;
}

void launch_value_ranges(const Problem& problem, const Device& device, ValueRange* ranges) {
  const Blocks blocks{blocks_for(problem.channels, kWarp)};
  launch(range_values, problem.batch.count * blocks.of_element, kTileThreads, 2 * kTileThreads * sizeof(float),
         device.stream, problem, blocks, ranges);
}

void launch_tile_sums(const Problem& problem, const Device& device, const TilePlan& plan, const ValueRange* ranges,
                      float* states, float* sums) {
  switch (plan.product) {
    case Product::kFew:
      return launch_with<Product::kFew>(problem, device, plan, ranges, states, sums);
    case Product::kMany:
      return launch_with<Product::kMany>(problem, device, plan, ranges, states, sums);
    case Product::kHalf:
      return launch_with<Product::kHalf>(problem, device, plan, ranges, states, sums);
    default:
      return launch_with<Product::kBFloat16>(problem, device, plan, ranges, states, sums);
  }
}

}  // namespace nwfast
