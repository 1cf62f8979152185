// Sums over keys for one feature and channel in float32:
//
//   sum_j a_j p_ij {1, v_j} {1, d_ij^2, d_ij},   d_ij = x_i - k_j,   p_ij = 2^(-c d_ij^2)
//
// A thread holds several queries, a block of 128 threads 1024 or 512 of them; it walks over tiles of keys, which are
// copied to shared memory while the tile before is summed. So a pair costs three multiplications and additions, an
// exponential and one multiply-add a sum. Blocks for parts of the keys fill the chip where there are few queries. See
// single/common.cuh for the scores and the window, forward.cuh for what becomes of the sums.

#include "rows.cuh"

namespace nwfast {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 32;  // several waves, so that uneven windows even out
constexpr int64_t kLeastPart = 4 * kSingleTile;   // keys

template <OffsetSums kOffsetSums>
struct Shape {
  static constexpr int kRows = kOffsetSums == OffsetSums::kNone ? 8 : 4;  // queries of one thread
  static constexpr int kSums = kOffsetSums == OffsetSums::kNone ? 2 : kOffsetSums == OffsetSums::kSquares ? 4 : 6;
};

struct Tile {
  float key[kSingleTile], value[kSingleTile], weight[kSingleTile];
};

// Starts copying one number; what needs a conversion is written at once.
__device__ __forceinline__ void stage(const View& view, int64_t at, float* slot) {
  if (view.dtype == Dtype::kFloat) {
    copy_async<4>(slot, static_cast<const float*>(view.data) + at);
  } else {
    *slot = view.read<float>(at);
  }
}

template <OffsetSums kOffsetSums, bool kCharged>
struct Accumulator {
  static constexpr int kRows = Shape<kOffsetSums>::kRows;
  float query[kRows];
  Sums<kRows> sums[Shape<kOffsetSums>::kSums];

  template <bool kMasked>
  __device__ __forceinline__ void add(const Bandwidth& bandwidth, float key, float value, float weight,
                                      int64_t first_row, int64_t j) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float d = query[r] - key, square = d * d;
      const bool polynomial = kOffsetSums == OffsetSums::kNone && r % kPolynomialShare == kPolynomialShare - 1;
      float p = polynomial ? polynomial_power(square, bandwidth.factor, bandwidth.most)
                           : exp2_approximate(square * bandwidth.factor);
      if (kMasked && first_row + r * kSingleThreads == j) p = 0;
      const float pv = p * value;  // of values times weights
      if (kCharged) p *= weight;
      sums[kTotal].inner[r] += p;
      sums[kValue].inner[r] += pv;
      if constexpr (kOffsetSums != OffsetSums::kNone) {
        sums[kSquare].inner[r] += p * square;
        sums[kSquareValue].inner[r] += pv * square;
      }
      if constexpr (kOffsetSums == OffsetSums::kAll) {
        sums[kOffset].inner[r] += p * d;
        sums[kOffsetValue].inner[r] += pv * d;
      }
    }
  }
};

// The keys that can matter to queries in [low, high]: all of them, unless they are sorted.
__device__ void find_window(const Problem& problem, const Survey& survey, int64_t b, float low, float high,
                            int64_t* window) {
  const int64_t n = problem.keys;
  window[0] = 0;
  window[1] = n;
  if (!survey.ascending) return;
  const double w = problem.w.read<double>(problem.w.offset(problem.batch, b));
  const double radius =
      sqrt((kFarTotal + kNegligibleScore + log2(static_cast<double>(n))) / kHalfLog2E) / fabs(w) * (1 + 1e-6);
  const int64_t key = problem.key.offset(problem.batch, b);
  for (int side = 0; side < 2; ++side) {
    const double edge = side == 0 ? low - radius : high + radius;  // infinite for w = 0
    int64_t first = 0, last = n;                                   // the first key not below (not at or below) the edge
    while (first < last) {
      const int64_t middle = first + (last - first) / 2;
      const double k = problem.key.read<double>(key + middle * problem.key.row_stride);
      if (side == 0 ? k < edge : k <= edge) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    window[side] = first;
  }
}

template <OffsetSums kOffsetSums, bool kCharged>
__global__ void __launch_bounds__(kSingleThreads)
    sum_rows(const __grid_constant__ Problem problem, const RowPlan plan, const Survey* surveys, float* partial) {
  NWFAST_SHARED(shared);
  Tile* const tiles = reinterpret_cast<Tile*>(shared);
  constexpr int kRows = Shape<kOffsetSums>::kRows;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t part = blockIdx.x % plan.parts, group = blockIdx.x / plan.parts;
  const int64_t b = group / plan.query_blocks, m = problem.queries;
  const int64_t first_row = group % plan.query_blocks * plan.block_rows;
  const Survey survey = surveys[b];
  if (!survey.usable) return;  // all rows will be computed in double
  Accumulator<kOffsetSums, kCharged> sums;
  const int64_t own_row = first_row + thread;
  float low = INFINITY, high = -INFINITY;
  const int64_t query = problem.query.offset(problem.batch, b);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = own_row + r * kSingleThreads < m ? own_row + r * kSingleThreads : m - 1;
    sums.query[r] = problem.query.read<float>(query + row * problem.query.row_stride);
    low = fminf(low, sums.query[r]);  // not of NaN
    high = fmaxf(high, sums.query[r]);
  }
#pragma unroll
  for (auto& sum : sums.sums) sum.clear();

  // The window of the block's queries, and the part of it that this block sums.
  float* const edges = reinterpret_cast<float*>(shared);
  int64_t* const window = reinterpret_cast<int64_t*>(shared + 2 * kSingleThreads / kWarp * sizeof(float));
  warp_bounds(low, high);
  if (lane_number() == 0) {
    edges[2 * warp_number()] = low;
    edges[2 * warp_number() + 1] = high;
  }
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kSingleThreads / kWarp; ++warp) {
      low = fminf(low, edges[2 * warp]);
      high = fmaxf(high, edges[2 * warp + 1]);
    }
    find_window(problem, survey, b, low, high, window);
  }
  __syncthreads();
  const int64_t length = window[1] > window[0] ? window[1] - window[0] : 0;
  const int64_t part_tiles = (length + kSingleTile * plan.parts - 1) / (kSingleTile * plan.parts);
  const int64_t begin = window[0] + part * part_tiles * kSingleTile;
  const int64_t window_end = window[1];
  const int64_t end = begin + part_tiles * kSingleTile < window_end ? begin + part_tiles * kSingleTile : window_end;
  __syncthreads();  // tiles take the place of the window

  const Bandwidth bandwidth(problem, b);
  const int64_t key = problem.key.offset(problem.batch, b), value = problem.value.offset(problem.batch, b);
  const int64_t weight = kCharged ? problem.key_weight.offset(problem.batch, b) : 0;
  const auto start = [&](int64_t from, Tile& tile) {
    const int64_t j = from + thread;
    if (j < end) {
      stage(problem.key, key + j * problem.key.row_stride, &tile.key[thread]);
      stage(problem.value, value + j * problem.value.row_stride, &tile.value[thread]);
      if (kCharged) stage(problem.key_weight, weight + j * problem.key_weight.row_stride, &tile.weight[thread]);
    }
    commit_copies();
  };
  if (begin < end) start(begin, tiles[0]);
  int current = 0;
  for (int64_t from = begin; from < end; from += kSingleTile, current ^= 1) {
    Tile& tile = tiles[current];
    start(from + kSingleTile, tiles[current ^ 1]);
    wait_copies<1>();
    const int count = static_cast<int>(end - from < kSingleTile ? end - from : kSingleTile);
    if (thread < count) {  // each thread has waited for its own copies only
      const float charge = kCharged ? tile.weight[thread] / survey.weight_unit : 1;
      tile.value[thread] = (tile.value[thread] - survey.centre) * charge;
      if (kCharged) {
        tile.weight[thread] = charge;
        if (charge == 0) tile.key[thread] = tile.value[thread] = 0;  // left out, whatever it holds
      }
    }
    __syncthreads();
    const bool masked = problem.exclude_self && from < first_row + plan.block_rows && from + count > first_row;
    const int whole = masked ? 0 : count / 4 * 4;
#pragma unroll 1
    for (int j = 0; j < whole; j += 4) {
      const float4 k = *reinterpret_cast<const float4*>(tile.key + j);
      const float4 v = *reinterpret_cast<const float4*>(tile.value + j);
      float4 a{};
      if (kCharged) a = *reinterpret_cast<const float4*>(tile.weight + j);
      sums.template add<false>(bandwidth, k.x, v.x, a.x, own_row, 0);
      sums.template add<false>(bandwidth, k.y, v.y, a.y, own_row, 0);
      sums.template add<false>(bandwidth, k.z, v.z, a.z, own_row, 0);
      sums.template add<false>(bandwidth, k.w, v.w, a.w, own_row, 0);
    }
#pragma unroll 1
    for (int j = whole; j < count; ++j) {
      sums.template add<true>(bandwidth, tile.key[j], tile.value[j], kCharged ? tile.weight[j] : 0, own_row,
                              problem.exclude_self ? from + j : -1);
    }
#pragma unroll
    for (auto& sum : sums.sums) sum.flush();
    __syncthreads();
  }
  wait_copies<0>();
#pragma unroll
  for (int s = 0; s < Shape<kOffsetSums>::kSums; ++s) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = own_row + r * kSingleThreads;
      if (row < m) partial[((b * plan.parts + part) * plan.sums + s) * m + row] = sums.sums[s].outer[r];
    }
  }
}

template <OffsetSums kOffsetSums>
void launch_with(const Problem& problem, const Device& device, const RowPlan& plan, const Survey* surveys,
                 float* partial) {
  const int64_t blocks = problem.batch.count * plan.query_blocks * plan.parts;
  const auto kernel = problem.key_weight.data ? sum_rows<kOffsetSums, true> : sum_rows<kOffsetSums, false>;
  launch(kernel, blocks, kSingleThreads, 2 * sizeof(Tile), device.stream, problem, plan, surveys, partial);
}

}  // namespace

RowPlan plan_rows(const Problem& problem, int multiprocessors, OffsetSums offset_sums) {
  RowPlan plan;
  plan.offset_sums = offset_sums;
  const auto shape = [&](auto of) {
    plan.sums = of.kSums;
    plan.block_rows = kSingleThreads * of.kRows;
  };
  switch (offset_sums) {
    case OffsetSums::kNone:
      shape(Shape<OffsetSums::kNone>());
      break;
    case OffsetSums::kSquares:
      shape(Shape<OffsetSums::kSquares>());
      break;
    default:
      shape(Shape<OffsetSums::kAll>());
  }
  plan.query_blocks = blocks_for(problem.queries, plan.block_rows);
  const int64_t wanted =
      blocks_for(kBlocksPerMultiprocessor * multiprocessors, problem.batch.count * plan.query_blocks);
  const int64_t most = blocks_for(problem.keys, kLeastPart);
  plan.parts = wanted < most ? wanted : most;
  return plan;
}

void launch_row_sums(const Problem& problem, const Device& device, const RowPlan& plan, const Survey* surveys,
                     float* partial) {
  switch (plan.offset_sums) {
    case OffsetSums::kNone:
      return launch_with<OffsetSums::kNone>(problem, device, plan, surveys, partial);
    case OffsetSums::kSquares:
      return launch_with<OffsetSums::kSquares>(problem, device, plan, surveys, partial);
    default:
      return launch_with<OffsetSums::kAll>(problem, device, plan, surveys, partial);
  }
}

}  // namespace nwfast
