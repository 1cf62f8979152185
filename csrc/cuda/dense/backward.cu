// The backward pass: which kernels run, and what becomes of their sums.
//
// Query side: the product with the tangents where the forward pass saved them, else the sums of the forward pass again.
// Key side: a kernel gathers what the keys need of each row, then sums over rows. Each side has float32 sums, finished
// by one lane a row or key, here or in tiled/backward.cu, and computations in double for what they leave out (rows.cuh,
// keys.cuh). The gradient of w is a partial sum for each warp or block, added in a fixed order at the end.

#include "forward.cuh"
#include "keys.cuh"
#include "single/keys.cuh"
#include "tiled/grads.cuh"

namespace nwfast {
namespace {

constexpr int kThreads = 128;
constexpr int kTangentRows = 4;  // of one thread

// Query side ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 3)
    apply_tangents(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                   const Blocks blocks, double* grad_w) {
  NWFAST_SHARED(shared);
  double* const parts = reinterpret_cast<double*>(shared);
  const int64_t b = blocks.element(), m = problem.queries;
  const int64_t grad = task.grad_out.offset(problem.batch, b);
  double sum = 0;
  for (int r = 0; r < kTangentRows; ++r) {
    const int64_t i = (blocks.block() * kTangentRows + r) * blockDim.x + threadIdx.x, place = b * m + i;
    bool beyond = false;  // all numbers, where the product with the cotangent may not be
    if (i < m) {
      const double given = task.grad_out.read<double>(grad + i * task.grad_out.row_stride);
      const double g = task.state[2 * place + 1] == 0 ? 0 : given;  // out is NaN, and so may be its gradient
      const double by_query = task.grad_query.data ? task.tangent_q.read(place) : 0;
      const double by_w = grad_w ? task.tangent_w.read(place) : 0;
      beyond = g != 0 && (isinf(by_query) || isinf(by_w));
      if (!beyond && task.grad_query.data) task.grad_query.write(place, g == 0 ? 0 : g * by_query);
      if (!beyond && g != 0) sum += g * by_w;
    }
    unsigned far = __ballot_sync(kAllLanes, beyond);
    for (; far; far &= far - 1) {
      query_row(problem, task, b, i - lane_number() + __ffs(static_cast<int>(far)) - 1, grad_w ? &sum : nullptr);
    }
  }
  if (!grad_w) return;
  sum = warp_sum(sum);
  if (lane_number() == 0) parts[warp_number()] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += parts[warp];
  grad_w[blockIdx.x] = sum;
}

// A warp owns `each` consecutive rows of a batch element.
__global__ void __launch_bounds__(kThreads, 3)
    queries_in_double(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                      const int64_t element_warps, const int64_t each, double* grad_w) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = warp / element_warps, first = warp % element_warps * each;
  if (b >= problem.batch.count) return;
  double* const own = grad_w ? grad_w + warp * problem.features : nullptr;
  for (int64_t f = 0; own && lane_number() == 0 && f < problem.features; ++f) own[f] = 0;
  for (int64_t i = first; i < first + each && i < problem.queries; ++i) query_row(problem, task, b, i, own);
}

__global__ void __launch_bounds__(kThreads, 3)
    finish_queries(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                   const RowPlan plan, const Survey* surveys, const float* partial, double* grad_w) {
  const int64_t m = problem.queries, warps = (m + kWarp - 1) / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = warp / warps, i = warp % warps * kWarp + lane_number();
  if (b >= problem.batch.count) return;
  const SingleRow row(problem, plan, surveys[b], partial, b, i);
  double by_w = 0;
  if (row.good) {
    const RowGrad grad(problem, task, b, i);
    const double g = grad.out(task, 0);
    if (task.grad_query.data) {
      const double by_lse = task.grad_lse.data ? grad.lse * row.lse_by_query() : 0;
      task.grad_query.write(grad.place, g * row.out_by_query() + by_lse);
    }
    by_w = g * row.out_by_w() + (task.grad_lse.data ? grad.lse * row.lse_by_w() : 0);
  }
  by_w = warp_sum(by_w);
  double* const own = grad_w ? grad_w + warp : nullptr;
  if (own && lane_number() == 0) *own = by_w;
  unsigned far = __ballot_sync(kAllLanes, i < m && !row.good);
  for (; far; far &= far - 1) query_row(problem, task, b, i - lane_number() + __ffs(static_cast<int>(far)) - 1, own);
}

// One block for each element of w: adds what the batch elements that share it have, always in the same order.
__global__ void __launch_bounds__(kThreads, 3)
    reduce_w(const __grid_constant__ Problem problem, const __grid_constant__ View target, const int64_t shared_by,
             const int64_t slots, const double* partial) {
  NWFAST_SHARED(shared);
  double* const parts = reinterpret_cast<double*>(shared);
  const int64_t features = problem.features;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < shared_by; k += kThreads) {
    // k counts what w was broadcast over: slots, batch dimensions, features. All else is the element's own.
    int64_t rest = k / slots, element = blockIdx.x, b = 0, stride = 1;
    int64_t f = 0;
    if (target.column_stride == 0) {
      f = rest % features;
      rest /= features;
    } else {
      f = element % features;
      element /= features;
    }
    for (int dim = problem.batch.rank - 1; dim >= 0; --dim) {
      const int64_t size = problem.batch.sizes[dim];
      if (target.batch_strides[dim] == 0) {
        b += rest % size * stride;
        rest /= size;
      } else {
        b += element % size * stride;
        element /= size;
      }
      stride *= size;
    }
    sum += partial[(b * slots + k % slots) * features + f];
  }
  sum = warp_sum(sum);
  if (lane_number() == 0) parts[warp_number()] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += parts[warp];
  void* const grad_w = const_cast<void*>(target.data);
  switch (target.dtype) {
    case Dtype::kFloat:
      static_cast<float*>(grad_w)[blockIdx.x] = static_cast<float>(sum);
      break;
    case Dtype::kDouble:
      static_cast<double*>(grad_w)[blockIdx.x] = sum;
      break;
    case Dtype::kHalf:
      static_cast<uint16_t*>(grad_w)[blockIdx.x] = float_to_half(static_cast<float>(sum));
      break;
    default:
      static_cast<uint16_t*>(grad_w)[blockIdx.x] =
          static_cast<uint16_t>(pack_halves<true>(static_cast<float>(sum), 0) & 0xffff);
  }
}

bool tangents_suffice(const BackwardTask& task) {
  return !task.grad_lse.data && (task.tangent_q.data || !task.grad_query.data) &&
         (task.tangent_w.data || !task.grad_w.data);
}

void query_side(const Problem& problem, const Device& device, const BackwardTask& task, Arena& arena) {
  const int64_t count = problem.batch.count, m = problem.queries, features = problem.features;
  int64_t slots = 0;  // partial sums of each batch element
  double* partial = nullptr;
  const auto take = [&](int64_t of_element) {
    slots = of_element;
    if (task.grad_w.data) partial = arena.take<double>(count * slots * features);
  };
  if (m == 0 || count == 0) {
    // No partial sums: the gradient of w is 0.
  } else if (tangents_suffice(task)) {
    const int threads = m > 4 * kWarp ? kThreads : kWarp;
    const Blocks blocks{blocks_for(m, threads * kTangentRows)};
    take(blocks.of_element);
    if (!arena.counting()) {
      launch(apply_tangents, count * blocks.of_element, threads, threads / kWarp * sizeof(double), device.stream,
             problem, task, blocks, partial);
    }
  } else if (has_single_kernels(problem)) {
    const RowPlan plan =
        plan_rows(problem, device.multiprocessors, task.grad_query.data ? OffsetSums::kAll : OffsetSums::kSquares);
    const int64_t warps = blocks_for(m, kWarp);
    take(warps);
    Survey* const surveys = arena.take<Survey>(count);
    float* const sums = arena.take<float>(count * plan.parts * plan.sums * m);
    if (!arena.counting()) {
      launch(survey_data, count, kSurveyThreads, kSurveyShared, device.stream, problem, surveys);
      launch_row_sums(problem, device, plan, surveys, sums);
      launch(finish_queries, blocks_for(count * warps, kThreads / kWarp), kThreads, 0, device.stream, problem, task,
             plan, static_cast<const Survey*>(surveys), static_cast<const float*>(sums), partial);
    }
  } else if (has_tiled_kernels(problem)) {
    take(blocks_for(m, kWarp));
    tiled_query_side(problem, device, task, partial, arena);
  } else {
    const int64_t each = m > 4096 ? 16 : 1, warps = blocks_for(m, each);
    take(warps);
    if (!arena.counting()) {
      launch(queries_in_double, blocks_for(count * warps, kThreads / kWarp), kThreads, 0, device.stream, problem, task,
             warps, each, partial);
    }
  }
  if (!task.grad_w.data || task.grad_w_size == 0 || arena.counting()) return;
  const int64_t shared_by = count * slots * features / task.grad_w_size;
  launch(reduce_w, task.grad_w_size, kThreads, kThreads / kWarp * sizeof(double), device.stream, problem, task.grad_w,
         shared_by, slots, static_cast<const double*>(partial));
}

// Key side -----------------------------------------------------------------------------------------------------------

// A block gathers a tile of rows of one batch element, for the keys in double and, if fast, for those in float32.
__global__ void __launch_bounds__(kSingleTile, 3)
    gather_rows(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task, const Blocks tiles,
                const Survey* surveys, KeyRow* rows, SingleKeyRow* fast_rows, float* windows, int* tile_far) {
  NWFAST_SHARED(shared);
  float* const edges = reinterpret_cast<float*>(shared);
  const int64_t b = tiles.element(), m = problem.queries;
  const int64_t i = tiles.block() * kSingleTile + threadIdx.x, place = b * m + i;
  double shift = 0, total = 0;
  if (i < m) {
    shift = task.state[2 * place];
    total = task.state[2 * place + 1];
  }
  KeyRow own{-1, i >= m || total == 0 || RowGrad(problem, task, b, i).unused(problem, task), 0, 0};
  find_nearest_keys(problem, b, i, i < m && !own.skip && shift != 0, own);
  if (!fast_rows) {
    if (i < m) rows[place] = own;
    return;
  }
  const Survey survey = surveys[b];
  own.far = !own.skip && (!survey.usable || shift != 0 || !isfinite(total));
  float low = INFINITY, high = -INFINITY;
  if (i < m) {
    SingleKeyRow fast{0, 0, 0, 0};
    if (!own.far && !own.skip) {
      const RowGrad grad(problem, task, b, i);
      const double unit_total = total / survey.weight_unit;
      fast.query = problem.query.read<float>(problem.query.offset(problem.batch, b) + i * problem.query.row_stride);
      fast.value_grad = static_cast<float>(grad.out(task, 0) / unit_total);
      fast.mean = static_cast<float>(task.out.read(place) - survey.centre);
      fast.lse_grad = static_cast<float>(grad.lse / unit_total);
      const double w = problem.w.read<double>(problem.w.offset(problem.batch, b));
      const double reach = kNegligibleScore + log2(static_cast<double>(problem.keys)) - log2(unit_total);
      const double radius = sqrt(fmax(reach, 0.0) / kHalfLog2E) / fabs(w) * (1 + 1e-6);
      low = static_cast<float>(fast.query - radius);
      high = static_cast<float>(fast.query + radius);
      low -= fabsf(low) * 0x1p-23f;
      high += fabsf(high) * 0x1p-23f;
    }
    rows[place] = own;
    fast_rows[place] = fast;
  }
  warp_bounds(low, high);
  const unsigned far = __ballot_sync(kAllLanes, own.far);
  if (lane_number() == 0) {
    edges[3 * warp_number()] = low;
    edges[3 * warp_number() + 1] = high;
    edges[3 * warp_number() + 2] = far ? 1 : 0;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  float any = edges[2];
  for (int warp = 1; warp < kSingleTile / kWarp; ++warp) {
    low = fminf(low, edges[3 * warp]);
    high = fmaxf(high, edges[3 * warp + 1]);
    any += edges[3 * warp + 2];
  }
  windows[2 * blockIdx.x] = low;
  windows[2 * blockIdx.x + 1] = high;
  tile_far[blockIdx.x] = any > 0;
}

// A warp, or a thread, for each key.
template <bool kShared>
__global__ void __launch_bounds__(kThreads, 3)
    keys_in_double(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task,
                   const KeyRow* rows) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t key = kShared ? thread / kWarp : thread, n = problem.keys;
  if (key < problem.batch.count * n) key_gradient<kShared>(problem, task, rows, key / n, key % n, false);
}

// A lane for each key; together to add the far rows, where there are any.
__global__ void __launch_bounds__(kThreads, 3)
    finish_keys(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTask task, const KeyPlan plan,
                const Survey* surveys, const KeyRow* rows, const int* tile_far, const float* partial) {
  const int64_t n = problem.keys, warps = (n + kWarp - 1) / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_number();
  const int64_t b = warp / warps, first = warp % warps * kWarp, j = first + lane_number();
  if (b >= problem.batch.count) return;
  double sums[kKeySums] = {};
  if (j < n && surveys[b].usable) {
    for (int64_t part = 0; part < plan.parts; ++part) {
      const float* const from = partial + (b * plan.parts + part) * kKeySums * n + j;
#pragma unroll
      for (int s = 0; s < kKeySums; ++s) {
        if (s != kWeightSum || plan.full) sums[s] += static_cast<double>(from[s * n]);
      }
    }
#pragma unroll
    for (int s = 0; s < kKeySums; ++s) sums[s] /= surveys[b].weight_unit;
  }
  bool far = false;
  for (int64_t tile = lane_number(); tile < plan.tiles; tile += kWarp) far |= tile_far[b * plan.tiles + tile] != 0;
  if (j < n) {
    const int64_t place = b * n + j;
    const Row row(problem, b, 0);
    const double weight = row.weight(j), w = row.w(0);
    const bool left_out = weight == 0;
    if (task.grad_value.data) task.grad_value.write(place, left_out ? 0 : weight * sums[kValueSum]);
    if (task.grad_key.data) task.grad_key.write(place, left_out ? 0 : w * (w * (weight * sums[kOffsetSum])));
    if (task.grad_key_weight.data) {
      task.grad_key_weight.write(place, weight_gradient(problem, row, j, sums[kWeightSum], false));
    }
  }
  if (__ballot_sync(kAllLanes, far) == 0) return;
  __syncwarp();  // lane 0 adds to what the others have written
  for (int lane = 0; lane < kWarp && first + lane < n; ++lane) {
    key_gradient<true>(problem, task, rows, b, first + lane, true);
  }
}

void key_side(const Problem& problem, const Device& device, const BackwardTask& task, Arena& arena) {
  const int64_t count = problem.batch.count, m = problem.queries, n = problem.keys;
  if (count == 0) return;
  if (has_tiled_kernels(problem)) return tiled_key_side(problem, device, task, arena);
  const bool fast = has_single_kernels(problem);
  const Blocks tiles{blocks_for(m, kSingleTile)};
  KeyRow* const rows = arena.take<KeyRow>(count * m);
  Survey* const surveys = fast ? arena.take<Survey>(count) : nullptr;
  SingleKeyRow* const fast_rows = fast ? arena.take<SingleKeyRow>(count * m) : nullptr;
  float* const windows = fast ? arena.take<float>(2 * count * tiles.of_element) : nullptr;
  int* const tile_far = fast ? arena.take<int>(count * tiles.of_element) : nullptr;
  const KeyPlan plan = plan_keys(problem, device.multiprocessors, task.grad_lse.data || task.grad_key_weight.data);
  float* const partial = fast ? arena.take<float>(count * plan.parts * kKeySums * n) : nullptr;
  if (arena.counting()) return;
  if (fast) launch(survey_data, count, kSurveyThreads, kSurveyShared, device.stream, problem, surveys);
  if (m > 0) {
    launch(gather_rows, count * tiles.of_element, kSingleTile, 3 * kSingleTile / kWarp * sizeof(float), device.stream,
           problem, task, tiles, static_cast<const Survey*>(surveys), rows, fast_rows, windows, tile_far);
  }
  if (fast) {
    launch_key_sums(problem, device, plan, surveys, fast_rows, windows, partial);
    launch(finish_keys, blocks_for(count * blocks_for(n, kWarp), kThreads / kWarp), kThreads, 0, device.stream, problem,
           task, plan, static_cast<const Survey*>(surveys), static_cast<const KeyRow*>(rows),
           static_cast<const int*>(tile_far), static_cast<const float*>(partial));
  } else if (m < kWarp / 2 || count * n >= int64_t{1} << 17) {
    launch(keys_in_double<false>, blocks_for(count * n, kThreads), kThreads, 0, device.stream, problem, task,
           static_cast<const KeyRow*>(rows));
  } else {
    launch(keys_in_double<true>, blocks_for(count * n, kThreads / kWarp), kThreads, 0, device.stream, problem, task,
           static_cast<const KeyRow*>(rows));
  }
}

void backward(const Problem& problem, const Device& device, const BackwardTask& task, Arena& arena) {
  if (task.grad_query.data || task.grad_w.data) query_side(problem, device, task, arena);
  if (task.grad_key.data || task.grad_value.data || task.grad_key_weight.data) {
    key_side(problem, device, task, arena);
  }
}

}  // namespace

size_t backward_workspace(const Problem& problem, const Device& device, const BackwardTask& task) {
  Arena arena(nullptr);
  backward(problem, device, task, arena);
  return arena.used();
}

void run_backward(const Problem& problem, const Device& device, const BackwardTask& task, void* workspace) {
  Arena arena(workspace);
  backward(problem, device, task, arena);
}

}  // namespace nwfast
