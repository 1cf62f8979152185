// Sums over rows for one feature and channel in float32: what the gradients of keys, values and key weights need.
//
//   sum_i e_ij g_i,   sum_i e_ij u_ij (x_i - k_j),   sum_i e_ij u_ij,   u_ij = g_i (v_j - out_i) + g_lse_i
//
// with e_ij = 2^(-c (x_i - k_j)^2) and g_i over the row's total. A thread holds several keys, a block of 128 threads
// owns 1024; it walks over tiles of rows in shared memory, each copied while the one before is summed, and skips those
// whose window its keys do not meet. Blocks for parts of the rows fill the chip where there are few keys.

#include "keys.cuh"

namespace nwfast {
namespace {

constexpr int kKeys = 8;  // of one thread
constexpr int64_t kBlocksPerMultiprocessor = 32;
constexpr int64_t kLeastPart = 4;  // tiles

template <bool kFull>
struct Accumulator {
  float key[kKeys], value[kKeys];
  Sums<kKeys> sums[kFull ? 3 : 2];

  template <bool kMasked>
  __device__ __forceinline__ void add(float factor, const SingleKeyRow& row, int64_t first_key, int64_t i) {
#pragma unroll
    for (int r = 0; r < kKeys; ++r) {
      const float d = row.query - key[r];
      float e = exp2_approximate(d * d * factor);
      if (kMasked && first_key + r * kSingleThreads == i) e = 0;
      // The difference of values first: it is 0 where the row's weight is all on this key.
      if constexpr (kFull) {
        sums[kValueSum].inner[r] += e * row.value_grad;
        const float u = e * fmaf(row.value_grad, value[r] - row.mean, row.lse_grad);
        sums[kWeightSum].inner[r] += u;
        sums[kOffsetSum].inner[r] += u * d;
      } else {
        const float pull = e * row.value_grad;
        sums[kValueSum].inner[r] += pull;
        sums[kOffsetSum].inner[r] += pull * (value[r] - row.mean) * d;
      }
    }
  }
};

template <bool kFull>
__global__ void __launch_bounds__(kSingleThreads)
    sum_keys(const __grid_constant__ Problem problem, const KeyPlan plan, const Survey* surveys,
             const SingleKeyRow* rows, const float* windows, float* partial) {
  NWFAST_SHARED(shared);
  SingleKeyRow* const staged = reinterpret_cast<SingleKeyRow*>(shared);
  float* const edges = reinterpret_cast<float*>(staged + 2 * kSingleTile);
  int* const active = reinterpret_cast<int*>(edges + 2 * kSingleThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t part = blockIdx.x % plan.parts, group = blockIdx.x / plan.parts;
  const int64_t b = group / plan.key_blocks, m = problem.queries, n = problem.keys;
  const int64_t first_key = group % plan.key_blocks * plan.block_keys;
  const Survey survey = surveys[b];
  if (!survey.usable) return;
  Accumulator<kFull> sums;
  const int64_t own_key = first_key + thread;
  float low = INFINITY, high = -INFINITY;
  const int64_t key = problem.key.offset(problem.batch, b), value = problem.value.offset(problem.batch, b);
#pragma unroll
  for (int r = 0; r < kKeys; ++r) {
    const int64_t j = own_key + r * kSingleThreads < n ? own_key + r * kSingleThreads : n - 1;
    sums.key[r] = problem.key.read<float>(key + j * problem.key.row_stride);
    sums.value[r] = problem.value.read<float>(value + j * problem.value.row_stride) - survey.centre;
    low = fminf(low, sums.key[r]);
    high = fmaxf(high, sums.key[r]);
  }
#pragma unroll
  for (auto& sum : sums.sums) sum.clear();
  warp_bounds(low, high);
  if (lane_number() == 0) {
    edges[2 * warp_number()] = low;
    edges[2 * warp_number() + 1] = high;
  }
  __syncthreads();
  for (int warp = 0; warp < kSingleThreads / kWarp; ++warp) {
    low = fminf(low, edges[2 * warp]);
    high = fmaxf(high, edges[2 * warp + 1]);
  }

  const Bandwidth bandwidth(problem, b);
  const int64_t part_tiles = (plan.tiles + plan.parts - 1) / plan.parts;
  const int64_t begin = part * part_tiles;
  const int64_t end = begin + part_tiles < plan.tiles ? begin + part_tiles : plan.tiles;
  const auto start = [&](int64_t tile, SingleKeyRow* to) {
    const int64_t i = tile * kSingleTile + thread;
    if (i < m) copy_async<16>(to + thread, rows + b * m + i);
    commit_copies();
  };
  for (int64_t group_begin = begin; group_begin < end; group_begin += kSingleThreads) {
    // Which of the next 128 tiles count.
    const int64_t own = group_begin + thread;
    const float* const window = windows + 2 * (b * plan.tiles + own);
    active[thread] = own < end && window[0] <= high && window[1] >= low;
    __syncthreads();
    const int limit = static_cast<int>(end - group_begin < kSingleThreads ? end - group_begin : kSingleThreads);
    const auto next = [&](int tile) {
      while (tile < limit && !active[tile]) ++tile;
      return tile;
    };
    int tile = next(0), current = 0;
    if (tile < limit) start(group_begin + tile, staged);
    while (tile < limit) {
      const int following = next(tile + 1);
      if (following < limit) {
        start(group_begin + following, staged + (current ^ 1) * kSingleTile);
      } else {
        commit_copies();
      }
      wait_copies<1>();
      __syncthreads();
      const SingleKeyRow* const these = staged + current * kSingleTile;
      const int64_t from = (group_begin + tile) * kSingleTile;
      const int count = static_cast<int>(m - from < kSingleTile ? m - from : kSingleTile);
      if (problem.exclude_self && from < first_key + plan.block_keys && from + count > first_key) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) sums.template add<true>(bandwidth.factor, these[i], own_key, from + i);
      } else {
#pragma unroll 2
        for (int i = 0; i < count; ++i) sums.template add<false>(bandwidth.factor, these[i], own_key, 0);
      }
#pragma unroll
      for (auto& sum : sums.sums) sum.flush();
      __syncthreads();
      tile = following;
      current ^= 1;
    }
    wait_copies<0>();
    __syncthreads();  // before the next tiles' flags are written
  }
#pragma unroll
  for (int s = 0; s < (kFull ? 3 : 2); ++s) {
#pragma unroll
    for (int r = 0; r < kKeys; ++r) {
      const int64_t j = own_key + r * kSingleThreads;
      if (j < n) partial[((b * plan.parts + part) * kKeySums + s) * n + j] = sums.sums[s].outer[r];
    }
  }
}

}  // namespace

KeyPlan plan_keys(const Problem& problem, int multiprocessors, bool full) {
  KeyPlan plan;
  plan.full = full;
  plan.block_keys = kSingleThreads * kKeys;
  plan.key_blocks = blocks_for(problem.keys, plan.block_keys);
  plan.tiles = blocks_for(problem.queries, kSingleTile);
  const int64_t wanted = blocks_for(kBlocksPerMultiprocessor * multiprocessors, problem.batch.count * plan.key_blocks);
  const int64_t most = blocks_for(plan.tiles, kLeastPart);
  plan.parts = wanted < most ? wanted : most;
  return plan;
}

void launch_key_sums(const Problem& problem, const Device& device, const KeyPlan& plan, const Survey* surveys,
                     const SingleKeyRow* rows, const float* windows, float* partial) {
  const size_t shared = 2 * kSingleTile * sizeof(SingleKeyRow) + 2 * kSingleThreads / kWarp * sizeof(float) +
                        kSingleThreads * sizeof(int);
  launch(plan.full ? sum_keys<true> : sum_keys<false>, problem.batch.count * plan.key_blocks * plan.parts,
         kSingleThreads, shared, device.stream, problem, plan, surveys, rows, windows, partial);
}

}  // namespace nwfast
