// The device memory that the launchers plan for a call, as a function that tests call: nothing runs, no data is there.

#include "../../../../csrc/cuda/kernels.h"

namespace {

using namespace nwfast;

View matrix(int64_t columns, Dtype dtype) {
  View view;
  view.data = &view;  // only told from null
  view.dtype = dtype;
  view.row_stride = columns;
  view.column_stride = 1;
  return view;
}

}  // namespace

// Bytes of the forward pass, or of the backward pass with all gradients, of one batch element in float32, or with
// values of float16.
extern "C" __attribute__((visibility("default"))) int64_t nwfast_workspace(int64_t m, int64_t n, int64_t features,
                                                                           int64_t channels, bool half, bool lse,
                                                                           bool backward, int multiprocessors) {
  Problem problem{};
  problem.queries = m;
  problem.keys = n;
  problem.features = features;
  problem.channels = channels;
  const Dtype dtype = half ? Dtype::kHalf : Dtype::kFloat;
  problem.query = matrix(features, dtype);
  problem.key = matrix(features, dtype);
  problem.value = matrix(channels, dtype);
  problem.w = matrix(1, Dtype::kFloat);
  problem.key_weight = matrix(1, dtype);
  const Device device{multiprocessors, nullptr};
  double anything = 0;
  Result wanted;
  wanted.data = &anything;
  if (!backward) {
    ForwardResult result{};
    result.out = result.lse = wanted;
    result.state = &anything;
    return static_cast<int64_t>(forward_workspace(problem, device, result));
  }
  BackwardTask task{};
  task.grad_out = matrix(channels, Dtype::kFloat);
  if (lse) task.grad_lse = matrix(1, Dtype::kFloat);
  task.grad_query = task.grad_key = task.grad_value = task.grad_key_weight = wanted;
  task.grad_w = matrix(1, Dtype::kFloat);
  task.grad_w_size = 1;
  return static_cast<int64_t>(backward_workspace(problem, device, task));
}
