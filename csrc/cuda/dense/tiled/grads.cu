// The backward pass over tiles of pairs in float32, any number of features and channels. With p_ij recomputed from the
// state that the forward pass saved and u_ij = p_ij (<g_i, v_j - out_i> + g_lse_i):
//
//   query side   sum_j u_ij {x, x^2},  x = (q_if - k_jf) scale_f
//   key side     sum_i p_ij g_ic,  sum_i u_ij x,  sum_i u_ij,  where p and u leave out the key's own weight
//
// A block owns 64 rows (query side) or 64 keys (key side), each of its four warps 16, and walks over tiles of 64 of the
// others: there are no atomic additions, and sums are the same at every run. One file, since both sides are one kernel
// with the roles of rows and keys exchanged: they share its tiles in shared memory and their layout. A lane holds the
// pairs of its own l / 8 + 4 r, r < 4, with the others l % 8 + 8 c, c < 8. Blocks for parts of the others fill the chip
// where the owned are few.

#include "grads.cuh"

namespace nwfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpOwn = 16;                     // rows, or keys, that a warp owns
constexpr int kOwn = 4, kOthers = 8;             // of one lane
constexpr int kVectorPitch = kChannelChunk + 4;  // eight vectors' quads lie in different banks
constexpr int kSlice = 16;                       // others whose weights are handed over at once
constexpr int64_t kBlocksPerMultiprocessor = 8;
constexpr int64_t kLeastPart = 512;     // others
constexpr int64_t kInnerOthers = 4096;  // longer float32 sums would lose digits: these go to a second level
static_assert(kThreads / 32 * kWarpOwn == kTile && kOwn * 4 == kWarpOwn && kOthers * 8 == kTile && kOwn == 4,
              "a lane's pairs are of its warp's own rows and of all others");
static_assert(kThreads >= kTile && kTile % kSlice == 0 && kSlice % 8 == 0 && kChannelChunk == 64,
              "a thread stages a row; a lane sums 2 x 4 channels");
static_assert(kInnerOthers % kTile == 0, "inner sums are of whole tiles");

struct GradShared {
  float own_vector[kTile][kVectorPitch], other_vector[kTile][kVectorPitch];  // values less their centre, or gradients
  float weight[kThreads / kWarp][kSlice][kWarpOwn + 4];
  float own[kGradFeatures][kTile], other[kGradFeatures][kTile];
  float scale[kGradFeatures], log_weight[kTile];
  float exponent[kTile], inverse_total[kTile], offset_grad[kTile];  // of rows
};

// One side's matrix of a batch element: (size, channels or features).
struct Matrix {
  __device__ Matrix(const View& from, const Batch& batch, int64_t b) : view(from), offset(from.offset(batch, b)) {}
  __device__ float read(int64_t i, int64_t c) const {
    return view.read<float>(offset + i * view.row_stride + c * view.column_stride);
  }
  // Whether four channels from a multiple of four on can be read at once.
  __device__ bool has_quads() const {
    return view.dtype == Dtype::kFloat && view.column_stride == 1 && view.row_stride % 4 == 0 &&
           reinterpret_cast<uintptr_t>(static_cast<const float*>(view.data) + offset) % 16 == 0;
  }
  __device__ float4 read_quad(int64_t i, int64_t c) const {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(view.data) + offset + i * view.row_stride + c);
  }
  const View& view;
  int64_t offset;
};

// Channels [first, first + channels) of the vectors from `from` on, zeros for those that add nothing.
// `ranges` are those of values, null for gradients; counts(i) tells whether vector from + i is there and counts.
template <typename Counts>
__device__ __forceinline__ void stage_vectors(const Matrix& matrix, int64_t from, int64_t first, int channels,
                                              const ValueRange* ranges, const Counts& counts,
                                              float (*target)[kVectorPitch]) {
  const int thread = static_cast<int>(threadIdx.x);
  if (channels == kChannelChunk && matrix.has_quads()) {
    constexpr int kQuads = kChannelChunk / 4;
    const int c = thread % kQuads * 4;
    float4 centre = {0, 0, 0, 0};
    if (ranges) {
      centre = {ranges[first + c].centre, ranges[first + c + 1].centre, ranges[first + c + 2].centre,
                ranges[first + c + 3].centre};
    }
#pragma unroll 4
    for (int i = thread / kQuads; i < kTile; i += kThreads / kQuads) {
      float4 x = {0, 0, 0, 0};
      if (counts(i)) {
        x = matrix.read_quad(from + i, first + c);
        x = {x.x - centre.x, x.y - centre.y, x.z - centre.z, x.w - centre.w};
      }
      *reinterpret_cast<float4*>(&target[i][c]) = x;
    }
    return;
  }
  const int width = (channels + 3) / 4 * 4;
#pragma unroll 2
  for (int at = thread; at < kTile * width; at += kThreads) {
    const int i = at / width, c = at % width;
    float x = 0;
    if (c < channels && counts(i)) x = matrix.read(from + i, first + c) - (ranges ? ranges[first + c].centre : 0);
    target[i][c] = x;
  }
}

// Squared distances, added feature by feature; unscaled if all features have one scale. As in the forward pass.
// kBlocks: the features at hand are summed apart, so that few roundings are as large as the whole; half of the others
// at a time, which takes fewer registers.
template <bool kScaled, bool kBlocks>
__device__ __forceinline__ void add_distances(const GradShared& shared, int features, int own, int other,
                                              float (&score)[kOwn][kOthers]) {
  constexpr int kAtOnce = kBlocks ? kOthers / 2 : kOthers;
#pragma unroll
  for (int begin = 0; begin < kOthers; begin += kAtOnce) {
    float block[kOwn][kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) block[r][c] = kBlocks ? 0 : score[r][begin + c];
    }
#pragma unroll 1
    for (int f = 0; f < features; ++f) {
      const float scale = kScaled ? shared.scale[f] : 1;
      float x[kOwn];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) x[r] = shared.own[f][own + 4 * r];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const float y = shared.other[f][other + 8 * (begin + c)];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          float d = x[r] - y;
          if (kScaled) d *= scale;
          block[r][c] += d * d;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) score[r][begin + c] = kBlocks ? score[r][begin + c] + block[r][c] : block[r][c];
    }
  }
}

// <g, v - centre>, channel after channel as gather_tiles sums <g, out - centre>: the two cancel where a row's weight is
// all on one key.
__device__ __forceinline__ void add_products(const GradShared& shared, int channels, int own, int other,
                                             float (&product)[kOwn][kOthers]) {
#pragma unroll 1
  for (int first = 0; first < channels; first += 4) {
    float4 x[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) x[r] = *reinterpret_cast<const float4*>(&shared.own_vector[own + 4 * r][first]);
#pragma unroll
    for (int c = 0; c < kOthers; ++c) {
      const float4 y = *reinterpret_cast<const float4*>(&shared.other_vector[other + 8 * c][first]);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        float sum = fmaf(x[r].x, y.x, product[r][c]);
        sum = fmaf(x[r].y, y.y, sum);
        sum = fmaf(x[r].z, y.z, sum);
        product[r][c] = fmaf(x[r].w, y.w, sum);
      }
    }
  }
}

// Sums over the eight lanes that share their own rows or keys, of which lane l gets the sum of number l % kCount.
template <int kCount>
__device__ __forceinline__ float sum_of_lanes(float (&x)[kCount]) {
  const int lane = lane_number();
#pragma unroll
  for (int step = kCount / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const bool upper = (lane & step) != 0;
      const float theirs = upper ? x[i] : x[i + step];
      x[i] = (upper ? x[i + step] : x[i]) + __shfl_xor_sync(kAllLanes, theirs, step);
    }
  }
#pragma unroll
  for (int step = kCount; step < 8; step *= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
  return x[0];
}

// sums += weights (a warp's 16 keys by 64 rows) times gradients; a lane sums keys 4 (l / 8) and on, channels 4 (l % 8)
// and on and, if there are so many, the same 32 further.
__device__ __forceinline__ void add_values(GradShared& shared, bool wide, const float (&weight)[kOwn][kOthers],
                                           float (&sums)[4][8]) {
  const int lane = lane_number();
  float (*const slice)[kWarpOwn + 4] = shared.weight[warp_number()];
#pragma unroll
  for (int s = 0; s < kTile / kSlice; ++s) {
    __syncwarp();  // the slice before was read
#pragma unroll
    for (int c = 0; c < kSlice / 8; ++c) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) slice[lane % 8 + 8 * c][lane / 8 + 4 * r] = weight[r][s * (kSlice / 8) + c];
    }
    __syncwarp();
#pragma unroll 2
    for (int i = 0; i < kSlice; ++i) {
      const float4 p = *reinterpret_cast<const float4*>(&slice[i][lane / 8 * 4]);
      const float* const vector = &shared.other_vector[s * kSlice + i][lane % 8 * 4];
      const float4 near = *reinterpret_cast<const float4*>(vector);
      const float key[4] = {p.x, p.y, p.z, p.w}, low[4] = {near.x, near.y, near.z, near.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] += key[r] * low[c];
      }
      if (!wide) continue;
      const float4 far = *reinterpret_cast<const float4*>(vector + 32);
      const float high[4] = {far.x, far.y, far.z, far.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c + 4] += key[r] * high[c];
      }
    }
  }
}

__device__ int part_of(int64_t size, int64_t first, int most) {
  const int64_t left = size - first;
  return static_cast<int>(left < 0 ? 0 : left < most ? left : most);
}

// kKeys: the key side.
// kBlocks: more features than are staged at once.
template <bool kKeys, bool kBlocks>
__global__ void __launch_bounds__(kThreads, 2)
    sum_grads(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task, const GradPlan plan,
              const ValueRange* all_ranges, const TileRow* all_rows, float* partial) {
  NWFAST_SHARED(memory);
  GradShared& shared = *reinterpret_cast<GradShared*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_number();
  int64_t rest = blockIdx.x;
  const int64_t part = rest % plan.parts;
  rest /= plan.parts;
  const int64_t chunk = rest % plan.chunks;
  rest /= plan.chunks;
  const int64_t b = rest / plan.own_blocks, first_own = rest % plan.own_blocks * kTile;
  const int64_t m = problem.queries, n = problem.keys, features = problem.features, channels = problem.channels;
  const int64_t owns = kKeys ? n : m, others = kKeys ? m : n;
  const int64_t part_tiles = (others + kTile * plan.parts - 1) / (kTile * plan.parts);
  const int64_t begin = part * part_tiles * kTile;
  const int64_t end = begin + part_tiles * kTile < others ? begin + part_tiles * kTile : others;
  const Matrix query(problem.query, problem.batch, b), key(problem.key, problem.batch, b);
  const Matrix value(problem.value, problem.batch, b), grad(task.grad_out, problem.batch, b);
  const int64_t w = problem.w.offset(problem.batch, b);
  const int64_t weight = problem.key_weight.data ? problem.key_weight.offset(problem.batch, b) : 0;
  const ValueRange* const ranges = all_ranges + b * channels;
  const TileRow* const rows = all_rows + b * m;
  const float scale = score_scale(problem, w, 0);
  const bool uniform = has_one_scale(problem, w);
  const float factor = uniform ? -scale * scale : -1;
  // What this block sums.
  const int64_t first_feature = chunk * kGradFeatures, first_channel = chunk * kChannelChunk;
  const int some_features = !kKeys || task.grad_key.data ? part_of(features, first_feature, kGradFeatures) : 0;
  const int some_channels = kKeys && task.grad_value.data ? part_of(channels, first_channel, kChannelChunk) : 0;
  const bool weights = kKeys && chunk == 0 && task.grad_key_weight.data;
  const bool inner = some_features > 0 || weights;
  const int owned = part_of(owns, first_own, kTile);
  const int own = warp_number() * kWarpOwn + lane / 8, other = lane % 8;

  float offset_sums[kGradFeatures] = {}, weight_sum = 0, value_sums[4][8] = {};
  // Lane l has the sums of its own number l % 4: of offsets and, on the query side from lane 4 on, of their squares.
  // The inner sums go to where the block's results are, which are the outer ones.
  bool flushed = false;
  const auto flush = [&] {
    const int64_t mine = first_own + own + lane % 4 * 4, slot = b * plan.parts + part;
    const int64_t columns = key_columns(problem);
    const auto add = [&](int64_t at, float& sum) {
      partial[at] = flushed ? partial[at] + sum : sum;
      sum = 0;
    };
#pragma unroll
    for (int f = 0; f < kGradFeatures; ++f) {
      if (f >= some_features || mine >= owns || (kKeys && lane % 8 >= 4)) break;
      add(kKeys ? (slot * n + mine) * columns + channels + first_feature + f
                : ((slot * features + first_feature + f) * 2 + lane % 8 / 4) * m + mine,
          offset_sums[f]);
    }
    if (kKeys) {
      if (weights && mine < n && lane % 8 < 4) add((slot * n + mine) * columns + channels + features, weight_sum);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t j = first_own + warp_number() * kWarpOwn + lane / 8 * 4 + r;
        if (j >= n) break;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int channel = c / 4 * 32 + lane % 8 * 4 + c % 4;
          if (channel < some_channels) add((slot * n + j) * columns + first_channel + channel, value_sums[r][c]);
        }
      }
    }
    flushed = true;
  };
  for (int64_t from = begin; from < end; from += kTile) {
    const int count = part_of(end, from, kTile);
    // Others that add nothing are staged as zeros: whatever they hold, their products with a weight of 0 are 0.
    const auto counts = [&](int i) {
      return i < count && (kKeys ? rows[from + i].inverse_total != 0 : problem.keeps(weight, from + i));
    };
    const auto is_owned = [&](int i) { return i < owned; };
    const auto stage_features = [&](int64_t first) {
      const int some = part_of(features, first, kGradFeatures);
#pragma unroll 1
      for (int at = thread; at < some * kTile; at += kThreads) {
        const int i = at % kTile, f = at / kTile;
        shared.other[f][i] = counts(i) ? (kKeys ? query : key).read(from + i, first + f) : 0;
        if (from == begin || features > kGradFeatures) {
          shared.own[f][i] = i < owned ? (kKeys ? key : query).read(first_own + i, first + f) : 0;
        }
      }
      if (thread < some) shared.scale[thread] = score_scale(problem, w, first + thread);
    };
    const auto stage_channels = [&](int64_t first) {
      const int some = part_of(channels, first, kChannelChunk);
      stage_vectors(kKeys ? grad : value, from, first, some, kKeys ? nullptr : ranges, counts, shared.other_vector);
      if (from == begin || channels > kChannelChunk) {
        stage_vectors(kKeys ? value : grad, first_own, first, some, kKeys ? ranges : nullptr, is_owned,
                      shared.own_vector);
      }
    };
    float score[kOwn][kOthers] = {}, product[kOwn][kOthers] = {};
    for (int64_t first = 0; first < features; first += kGradFeatures) {
      __syncthreads();  // nobody reads what is there any more
      stage_features(first);
      if (first == 0) {
        stage_channels(0);
        if (thread < kTile) {
          if (kKeys || from == begin) {
            const int64_t i = (kKeys ? from : first_own) + thread;
            const TileRow row = thread < (kKeys ? count : owned) ? rows[i] : TileRow{0, 0, 0};
            shared.exponent[thread] = row.exponent;
            shared.inverse_total[thread] = row.inverse_total;
            shared.offset_grad[thread] = row.offset_grad;
          }
          if (!kKeys) {
            float log_weight = thread < count ? 0 : -INFINITY;
            if (thread < count && problem.key_weight.data) {
              log_weight =
                  log2f(problem.key_weight.read<float>(weight + (from + thread) * problem.key_weight.row_stride));
            }
            shared.log_weight[thread] = log_weight;
          }
        }
      }
      __syncthreads();
      const int some = part_of(features, first, kGradFeatures);
      if (uniform) {
        add_distances<false, kBlocks>(shared, some, own, other, score);
      } else {
        add_distances<true, kBlocks>(shared, some, own, other, score);
      }
    }
    for (int64_t first = 0; inner && first < channels; first += kChannelChunk) {
      if (first > 0) {
        __syncthreads();
        stage_channels(first);
        __syncthreads();
      }
      add_products(shared, part_of(channels, first, kChannelChunk), own, other, product);
    }
    const bool masked = problem.exclude_self && from < first_own + kTile && from + count > first_own;
#pragma unroll
    for (int c = 0; c < kOthers; ++c) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int row = kKeys ? other + 8 * c : own + 4 * r;
        float t = score[r][c] * factor;
        if (!kKeys) t += shared.log_weight[other + 8 * c];
        t -= shared.exponent[row];
        // A key of weight 0, which p leaves out, may lie nearer than all that count: sums of its own that overflow are
        // computed again in double (tiled/backward.cu).
        const bool excluded = masked && from + other + 8 * c == first_own + own + 4 * r;
        const float p = excluded ? 0 : exp2_approximate(t) * shared.inverse_total[row];
        score[r][c] = p;
        product[r][c] = excluded ? 0 : p * (product[r][c] - shared.offset_grad[row]);
      }
    }
    if (inner && features > kGradFeatures) {
      __syncthreads();
      stage_features(first_feature);
      __syncthreads();
    }
#pragma unroll
    for (int f = 0; f < kGradFeatures; ++f) {
      if (f >= some_features) break;
      const float unit = offset_unit(shared.scale[f]);
      float sums[kKeys ? kOwn : 2 * kOwn] = {};
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const float x = shared.own[f][own + 4 * r];
#pragma unroll
        for (int c = 0; c < kOthers; ++c) {
          const float y = shared.other[f][other + 8 * c];
          const float offset = (kKeys ? y - x : x - y) * unit;
          if (kKeys) {
            sums[r] += product[r][c] * offset;
          } else {
            const float term = product[r][c] * offset;
            sums[r] += term;
            sums[kOwn + r] += term * offset;
          }
        }
      }
      offset_sums[f] += sum_of_lanes(sums);
    }
    if (weights) {
      float sums[kOwn] = {};
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kOthers; ++c) sums[r] += product[r][c];
      }
      weight_sum += sum_of_lanes(sums);
    }
    if (some_channels > 0) {
      if (channels > kChannelChunk) {
        __syncthreads();
        stage_channels(first_channel);
        __syncthreads();
      }
      add_values(shared, some_channels > 32, score, value_sums);
    }
    if ((from - begin + kTile) % kInnerOthers == 0) flush();
  }
  flush();
}

GradPlan plan_grads(const Problem& problem, int64_t owns, int64_t others, int64_t chunks, int multiprocessors) {
  GradPlan plan{blocks_for(owns, kTile), chunks, 1};
  const int64_t blocks = problem.batch.count * plan.own_blocks * chunks;
  const int64_t most = blocks_for(others, kLeastPart);
  const int64_t wanted = blocks_for(kBlocksPerMultiprocessor * multiprocessors, blocks);
  plan.parts = wanted < 1 ? 1 : wanted > most ? most : wanted;
  return plan;
}

}  // namespace

GradPlan plan_query_grads(const Problem& problem, int multiprocessors) {
  return plan_grads(problem, problem.queries, problem.keys, blocks_for(problem.features, kGradFeatures),
                    multiprocessors);
}

GradPlan plan_key_grads(const Problem& problem, const BackwardTask& task, int multiprocessors) {
  const int64_t of_features = task.grad_key.data ? blocks_for(problem.features, kGradFeatures) : 1;
  const int64_t of_channels = task.grad_value.data ? blocks_for(problem.channels, kChannelChunk) : 1;
  return plan_grads(problem, problem.keys, problem.queries, of_features > of_channels ? of_features : of_channels,
                    multiprocessors);
}

void launch_query_grads(const Problem& problem, const Device& device, const BackwardTask& task, const GradPlan& plan,
                        const ValueRange* ranges, const TileRow* rows, float* partial) {
  launch(problem.features > kGradFeatures ? sum_grads<false, true> : sum_grads<false, false>,
         problem.batch.count * plan.own_blocks * plan.chunks * plan.parts, kThreads, sizeof(GradShared), device.stream,
         problem, task, plan, ranges, rows, partial);
}

void launch_key_grads(const Problem& problem, const Device& device, const BackwardTask& task, const GradPlan& plan,
                      const ValueRange* ranges, const TileRow* rows, float* partial) {
  launch(problem.features > kGradFeatures ? sum_grads<true, true> : sum_grads<true, false>,
         problem.batch.count * plan.own_blocks * plan.chunks * plan.parts, kThreads, sizeof(GradShared), device.stream,
         problem, task, plan, ranges, rows, partial);
}

}  // namespace nwfast
