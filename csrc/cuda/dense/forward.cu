// The forward pass: which kernels run, and what becomes of their sums.
//
// Every row is either summed in float32 and finished here by one lane, or computed in double by the whole warp
// (rows.cuh): all rows of problems that have no float32 kernel, and of others the far rows.

#include "forward.cuh"

namespace nwfast {
namespace {

constexpr int kThreads = 128;

// A warp for each row.
__global__ void __launch_bounds__(kThreads, 3)
    rows_in_double(const __grid_constant__ Problem problem, const __grid_constant__ ForwardResult result) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  if (row < problem.batch.count * problem.queries)
    forward_row(problem, result, row / problem.queries, row % problem.queries);
}

// A lane for each row; together for those that are far.
__global__ void __launch_bounds__(kThreads, 3)
    finish_rows(const __grid_constant__ Problem problem, const __grid_constant__ ForwardResult result,
                const RowPlan plan, const Survey* surveys, const float* partial) {
  const int64_t m = problem.queries, warps = (m + kWarp - 1) / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = warp / warps, i = warp % warps * kWarp + lane_number(), place = b * m + i;
  if (b >= problem.batch.count) return;
  const SingleRow row(problem, plan, surveys[b], partial, b, i);
  if (row.good) {
    const double out = fmin(fmax(row.centre + row.mean(), static_cast<double>(row.low)), static_cast<double>(row.high));
    const SoftmaxState state{0, row.total * row.weight_unit};
    result.out.write(place, out);
    result.lse.write(place, log_sum(state));
    result.state[2 * place] = state.shift;
    result.state[2 * place + 1] = state.total;
    if (result.tangent_w.data) result.tangent_w.write(place, row.out_by_w());
    if (result.tangent_q.data) result.tangent_q.write(place, row.out_by_query());
  }
  unsigned far = __ballot_sync(kAllLanes, i < m && !row.good);
  for (; far; far &= far - 1) forward_row(problem, result, b, i - lane_number() + __ffs(static_cast<int>(far)) - 1);
}

// A warp for each row: merges its parts, a lane for each channel.
__global__ void __launch_bounds__(kThreads, 3)
    finish_tiles(const __grid_constant__ Problem problem, const __grid_constant__ ForwardResult result,
                 const TilePlan plan, const ValueRange* ranges, const float* states, const float* sums) {
  const int64_t m = problem.queries, channels = problem.channels;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = place / m, i = place % m;
  if (b >= problem.batch.count) return;
  const auto at = [&](int64_t part) { return (b * plan.parts + part) * m + i; };
  SoftmaxState state{0, 0};
  for (int64_t part = 0; part < plan.parts; ++part) {
    double mine, theirs;
    merge(state, {-static_cast<double>(states[2 * at(part)]), states[2 * at(part) + 1]}, mine, theirs);
  }
  if (!(state.total > 0) || !(state.total < HUGE_VAL) || state.shift > kTiledFarScore) {
    forward_row(problem, result, b, i);
    return;
  }
  bool undefined = false;
  for (int64_t c = lane_number(); c < channels; c += kWarp) {
    double sum = 0;
    for (int64_t part = 0; part < plan.parts; ++part) {
      const double total = states[2 * at(part) + 1];
      // A part without keys has a score below all others, and no sums.
      if (total > 0) sum += exp2(state.shift + states[2 * at(part)]) * sums[at(part) * channels + c];
    }
    const ValueRange range = ranges[b * channels + c];
    const double mean = sum / state.total;
    const double centre = has_centre(plan.product) ? range.centre : 0;
    undefined |= isnan(mean);
    const double out = fmin(fmax(centre + mean, static_cast<double>(range.low)), static_cast<double>(range.high));
    result.out.write(place * channels + c, isnan(mean) ? mean : out);
  }
  // A weight of 0 times a value that is not finite: of a key that is left out, perhaps.
  if (__ballot_sync(kAllLanes, undefined)) {
    forward_row(problem, result, b, i);
    return;
  }
  if (lane_number() > 0) return;
  // As the backward pass takes it: a total of powers that are not relative to any key.
  const SoftmaxState unshifted{0, state.total * exp2(-state.shift)};
  result.lse.write(place, log_sum(state));
  result.state[2 * place] = unshifted.shift;
  result.state[2 * place + 1] = unshifted.total;
}

OffsetSums offset_sums_of(const ForwardResult& result) {
  return result.tangent_q.data ? OffsetSums::kAll : result.tangent_w.data ? OffsetSums::kSquares : OffsetSums::kNone;
}

void forward_single(const Problem& problem, const Device& device, const ForwardResult& result, Arena& arena) {
  const RowPlan plan = plan_rows(problem, device.multiprocessors, offset_sums_of(result));
  Survey* const surveys = arena.take<Survey>(problem.batch.count);
  float* const partial = arena.take<float>(problem.batch.count * plan.parts * plan.sums * problem.queries);
  if (arena.counting()) return;
  launch(survey_data, problem.batch.count, kSurveyThreads, kSurveyShared, device.stream, problem, surveys);
  launch_row_sums(problem, device, plan, surveys, partial);
  const int64_t warps = problem.batch.count * blocks_for(problem.queries, kWarp);
  launch(finish_rows, blocks_for(warps, kThreads / kWarp), kThreads, 0, device.stream, problem, result, plan,
         static_cast<const Survey*>(surveys), static_cast<const float*>(partial));
}

void forward_tiled(const Problem& problem, const Device& device, const ForwardResult& result, Arena& arena) {
  const TilePlan plan = plan_tiles(problem, device.multiprocessors);
  const int64_t rows = problem.batch.count * problem.queries;
  ValueRange* const ranges = arena.take<ValueRange>(problem.batch.count * problem.channels);
  float* const states = arena.take<float>(2 * rows * plan.parts);
  float* const sums = arena.take<float>(rows * plan.parts * problem.channels);
  if (arena.counting()) return;
  launch_value_ranges(problem, device, ranges);
  launch_tile_sums(problem, device, plan, ranges, states, sums);
  launch(finish_tiles, blocks_for(rows, kThreads / kWarp), kThreads, 0, device.stream, problem, result, plan,
         static_cast<const ValueRange*>(ranges), static_cast<const float*>(states), static_cast<const float*>(sums));
}

void forward(const Problem& problem, const Device& device, const ForwardResult& result, Arena& arena) {
  if (has_single_kernels(problem)) return forward_single(problem, device, result, arena);
  if (has_tiled_kernels(problem)) return forward_tiled(problem, device, result, arena);
  if (arena.counting()) return;
  launch(rows_in_double, blocks_for(problem.batch.count * problem.queries, kThreads / kWarp), kThreads, 0,
         device.stream, problem, result);
}

}  // namespace

size_t forward_workspace(const Problem& problem, const Device& device, const ForwardResult& result) {
  Arena arena(nullptr);
  forward(problem, device, result, arena);
  return arena.used();
}

void run_forward(const Problem& problem, const Device& device, const ForwardResult& result, void* workspace) {
  Arena arena(workspace);
  forward(problem, device, result, arena);
}

}  // namespace nwfast
