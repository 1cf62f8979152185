// The backward pass in float32 for any number of features and channels: what surrounds the sums of tiled/grads.cu.
//
// A kernel gathers what the tiles need of each row, the sums over tiles follow, and a last one adds their parts in
// order and multiplies what sums have in common. Rows far from all keys, which the forward pass computed in double, add
// nothing to the tiles and are computed in double here as well (rows.cuh, keys.cuh).

#include "../keys.cuh"
#include "grads.cuh"

namespace nwfast {
namespace {

constexpr int kThreads = 128;

// The weights of a batch element's keys.
struct KeyWeights {
  double unit;  // a power of two by which they are divided
  int usable;   // whether float32 sums hold what the key side needs
};

// A block for each batch element.
__global__ void __launch_bounds__(kThreads, 3)
    survey_weights(const __grid_constant__ Problem problem, KeyWeights* weights) {
  NWFAST_SHARED(shared);
  float (*const parts)[kThreads / kWarp] = reinterpret_cast<float (*)[kThreads / kWarp]>(shared);
  const int64_t b = blockIdx.x, weight = problem.key_weight.offset(problem.batch, b);
  float low = INFINITY, high = 0, bad = 0;
  for (int64_t j = threadIdx.x; j < problem.keys; j += kThreads) {
    const float a = problem.key_weight.read<float>(weight + j * problem.key_weight.row_stride);
    if (a > 0) low = fminf(low, a);
    high = fmaxf(high, a);
    if (!isfinite(a) || a < 0) bad = 1;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, step));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
    bad = fmaxf(bad, __shfl_xor_sync(kAllLanes, bad, step));
  }
  if (lane_number() == 0) {
    parts[0][warp_number()] = low;
    parts[1][warp_number()] = high;
    parts[2][warp_number()] = bad;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) {
    low = fminf(low, parts[0][warp]);
    high = fmaxf(high, parts[1][warp]);
    bad = fmaxf(bad, parts[2][warp]);
  }
  weights[b] = {high > 0 ? exp2(floor(log2(static_cast<double>(high)))) : 1,
                bad == 0 && high > 0 && high / kWeightRange <= low};
}

// A lane for each row; together to find the nearest keys of those that are left to the kernels in double. The query
// side wants neither those (key_rows and block_far are null) nor the weights of keys, which are null too where there
// are none.
__global__ void __launch_bounds__(kThreads, 3)
    gather_tiles(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                 const Blocks blocks, const ValueRange* ranges, const KeyWeights* weights, TileRow* rows,
                 KeyRow* key_rows, int* block_far) {
  NWFAST_SHARED(shared);
  unsigned* const votes = reinterpret_cast<unsigned*>(shared);
  const int64_t b = blocks.element(), m = problem.queries, channels = problem.channels;
  const int64_t i = blocks.block() * kThreads + threadIdx.x, place = b * m + i;
  double shift = 0, total = 0;
  if (i < m) {
    shift = task.state[2 * place];
    total = task.state[2 * place + 1];
  }
  KeyRow own{-1, i >= m || total == 0 || RowGrad(problem, task, b, i).unused(problem, task), 0, 0};
  own.far = !own.skip && (shift != 0 || !isfinite(total) || (weights && !weights[b].usable));
  if (i < m) {
    TileRow row{0, 0, 0};
    if (!own.skip && !own.far) {
      const double unit_total = weights ? total / weights[b].unit : total;
      const int exponent = ilogb(unit_total);
      row.exponent = static_cast<float>(exponent);
      row.inverse_total = static_cast<float>(1 / ldexp(unit_total, -exponent));
      const RowGrad grad(problem, task, b, i);
      float dot = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const float mean = static_cast<float>(task.out.read(place * channels + c)) - ranges[b * channels + c].centre;
        dot = fmaf(static_cast<float>(grad.out(task, c)), mean, dot);
      }
      row.offset_grad = dot - static_cast<float>(grad.lse);
    }
    rows[place] = row;
  }
  if (!key_rows) return;
  find_nearest_keys(problem, b, i, own.far && shift != 0, own);
  if (i < m) key_rows[place] = own;
  const unsigned vote = __ballot_sync(kAllLanes, own.far);
  if (lane_number() == 0) votes[warp_number()] = vote;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) votes[0] |= votes[warp];
  block_far[blockIdx.x] = votes[0] != 0;
}

// A lane for each row; together for those that are far.
__global__ void __launch_bounds__(kThreads, 3)
    finish_query_grads(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                       const GradPlan plan, const TileRow* rows, const float* partial, double* grad_w) {
  const int64_t m = problem.queries, features = problem.features, warps = (m + kWarp - 1) / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = warp / warps, i = warp % warps * kWarp + lane_number(), place = b * m + i;
  if (b >= problem.batch.count) return;
  bool good = i < m && rows[place].inverse_total != 0;
  // Sums that are not finite hold a weight of 0 times what overflows: the offset of a key that is far away, or what the
  // row's own key holds. Then the row is computed in double as well.
  for (int64_t part = 0; good && part < plan.parts; ++part) {
    for (int64_t f = 0; good && f < 2 * features; ++f) {
      good = isfinite(partial[((b * plan.parts + part) * 2 * features + f) * m + i]) != 0;
    }
  }
  const int64_t w_offset = problem.w.offset(problem.batch, b);
  double* const own = grad_w ? grad_w + warp * features : nullptr;
  for (int64_t f = 0; f < features; ++f) {
    double offset = 0, square = 0;
    for (int64_t part = 0; good && part < plan.parts; ++part) {
      const float* const sums = partial + ((b * plan.parts + part) * features + f) * 2 * m + i;
      offset += static_cast<double>(sums[0]);
      square += static_cast<double>(sums[m]);
    }
    const double w = problem.w.read<double>(w_offset + f * problem.w.column_stride);
    const double unit = offset_unit(score_scale(problem, w_offset, f));
    if (good && task.grad_query.data) task.grad_query.write(place * features + f, -w * (w / unit * offset));
    square = warp_sum(square);
    if (own && lane_number() == 0) own[f] = -(w / unit) / unit * square;
  }
  unsigned left = __ballot_sync(kAllLanes, i < m && !good);
  for (; left; left &= left - 1)
    query_row(problem, task, b, i - lane_number() + __ffs(static_cast<int>(left)) - 1, own);
}

// A thread for each sum of each key.
__global__ void __launch_bounds__(kThreads, 3)
    finish_key_grads(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                     const GradPlan plan, const int64_t columns, const KeyWeights* weights, const float* partial) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, n = problem.keys;
  const int64_t place = at / columns, column = at % columns, b = place / n, j = place % n;
  if (b >= problem.batch.count) return;
  const int64_t channels = problem.channels, f = column - channels;
  const Result& result = f < 0 ? task.grad_value : f < problem.features ? task.grad_key : task.grad_key_weight;
  if (!result.data) return;
  double sum = 0;
  for (int64_t part = 0; part < plan.parts; ++part) {
    sum += static_cast<double>(partial[((b * plan.parts + part) * n + j) * columns + column]);
  }
  sum /= weights ? weights[b].unit : 1;
  const Row row(problem, b, 0);
  if (f == problem.features) {
    result.write(place, weight_gradient(problem, row, j, sum, false));
    return;
  }
  const double weight = row.weight(j);
  if (f < 0) {
    result.write(place * channels + column, weight == 0 ? 0 : weight * sum);
    return;
  }
  const int64_t w_offset = problem.w.offset(problem.batch, b);
  const double w = problem.w.read<double>(w_offset + f * problem.w.column_stride);
  const double unit = offset_unit(score_scale(problem, w_offset, f));
  result.write(place * problem.features + f, weight == 0 ? 0 : w * (w / unit * (weight * sum)));
}

// Whether the warp's lanes find all of `count` results from `first` on finite.
__device__ bool are_finite(const Result& result, int64_t first, int64_t count) {
  bool finite = true;
  for (int64_t at = lane_number(); result.data && at < count; at += kWarp) {
    finite &= isfinite(result.read(first + at)) != 0;
  }
  return __ballot_sync(kAllLanes, !finite) == 0;
}

// A warp for each key: adds the far rows, if the batch element has any; computes the key in double, if its sums are not
// finite: an offset too large for float32 times a weight of 0, or the power of a key that is left out.
__global__ void __launch_bounds__(kThreads, 3)
    add_far_rows(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                 const int64_t row_blocks, const KeyRow* rows, const int* block_far) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = place / problem.keys;
  if (b >= problem.batch.count) return;
  bool far = false;
  for (int64_t block = lane_number(); block < row_blocks; block += kWarp) far |= block_far[b * row_blocks + block] != 0;
  const bool finite = are_finite(task.grad_value, place * problem.channels, problem.channels) &&
                      are_finite(task.grad_key, place * problem.features, problem.features) &&
                      are_finite(task.grad_key_weight, place, 1);
  if (__ballot_sync(kAllLanes, far) || !finite) {
    key_gradient<true>(problem, task, rows, b, place % problem.keys, finite);
  }
}

}  // namespace

void tiled_query_side(const Problem& problem, const Device& device, const BackwardTask& task, double* grad_w,
                      Arena& arena) {
  const GradPlan plan = plan_query_grads(problem, device.multiprocessors);
  const int64_t count = problem.batch.count, m = problem.queries;
  ValueRange* const ranges = arena.take<ValueRange>(count * problem.channels);
  TileRow* const rows = arena.take<TileRow>(count * m);
  float* const partial = arena.take<float>(count * plan.parts * problem.features * 2 * m);
  if (arena.counting()) return;
  const Blocks blocks{blocks_for(m, kThreads)};
  launch_value_ranges(problem, device, ranges);
  launch(gather_tiles, count * blocks.of_element, kThreads, 0, device.stream, problem, task, blocks,
         static_cast<const ValueRange*>(ranges), static_cast<const KeyWeights*>(nullptr), rows,
         static_cast<KeyRow*>(nullptr), static_cast<int*>(nullptr));
  launch_query_grads(problem, device, task, plan, ranges, rows, partial);
  launch(finish_query_grads, blocks_for(count * blocks_for(m, kWarp), kThreads / kWarp), kThreads, 0, device.stream,
         problem, task, plan, static_cast<const TileRow*>(rows), static_cast<const float*>(partial), grad_w);
}

void tiled_key_side(const Problem& problem, const Device& device, const BackwardTask& task, Arena& arena) {
  const GradPlan plan = plan_key_grads(problem, task, device.multiprocessors);
  const int64_t count = problem.batch.count, m = problem.queries, n = problem.keys, columns = key_columns(problem);
  const Blocks blocks{blocks_for(m, kThreads)};
  ValueRange* const ranges = arena.take<ValueRange>(count * problem.channels);
  KeyWeights* const weights = problem.key_weight.data ? arena.take<KeyWeights>(count) : nullptr;
  TileRow* const rows = arena.take<TileRow>(count * m);
  KeyRow* const key_rows = arena.take<KeyRow>(count * m);
  int* const block_far = arena.take<int>(count * blocks.of_element);
  float* const partial = arena.take<float>(count * plan.parts * n * columns);
  if (arena.counting()) return;
  launch_value_ranges(problem, device, ranges);
  if (weights) {
    launch(survey_weights, count, kThreads, 3 * kThreads / kWarp * sizeof(float), device.stream, problem, weights);
  }
  launch(gather_tiles, count * blocks.of_element, kThreads, kThreads / kWarp * sizeof(unsigned), device.stream, problem,
         task, blocks, static_cast<const ValueRange*>(ranges), static_cast<const KeyWeights*>(weights), rows, key_rows,
         block_far);
  launch_key_grads(problem, device, task, plan, ranges, rows, partial);
  launch(finish_key_grads, blocks_for(count * n * columns, kThreads), kThreads, 0, device.stream, problem, task, plan,
         columns, static_cast<const KeyWeights*>(weights), static_cast<const float*>(partial));
  launch(add_far_rows, blocks_for(count * n, kThreads / kWarp), kThreads, 0, device.stream, problem, task,
         blocks.of_element, static_cast<const KeyRow*>(key_rows), static_cast<const int*>(block_far));
}

}  // namespace nwfast
