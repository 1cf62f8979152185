// One call of the op on a GPU: views go to the kernels as they are.

#pragma once

#include "../common/problem.h"
#include "intrinsics.cuh"

namespace nwfast {

constexpr float kWeightRange = 0x1p60f;  // of key weights; beyond, float32 does not hold the powers that leave them out

constexpr int kMaxDims = 12;  // of the batch, after dimensions that go together were merged

using Batch = BatchOf<kMaxDims>;

struct View : ViewOf<kMaxDims> {
  template <typename T>
  __device__ T read(int64_t at) const {
    switch (dtype) {
      case Dtype::kFloat:
        return static_cast<T>(static_cast<const float*>(data)[at]);
      case Dtype::kDouble:
        return static_cast<T>(static_cast<const double*>(data)[at]);
      case Dtype::kHalf:
        return static_cast<T>(half_to_float(static_cast<const uint16_t*>(data)[at]));
      default:
        return static_cast<T>(__uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16));
    }
  }
};

struct Problem : ProblemOf<View, kMaxDims> {
  // Whether key j counts, with the batch element's weights at `weights`: one of weight 0 does not, whatever it holds.
  __device__ bool keeps(int64_t weights, int64_t j) const {
    return !key_weight.data || key_weight.read<float>(weights + j * key_weight.row_stride) != 0;
  }
};

// A contiguous result in the arithmetic dtype; data may be null where it is not wanted.
struct Result {
  void* data = nullptr;
  bool wide = false;  // float64

  __device__ void write(int64_t at, double x) const {
    if (wide) {
      static_cast<double*>(data)[at] = x;
    } else {
      static_cast<float*>(data)[at] = static_cast<float>(x);
    }
  }
  __device__ double read(int64_t at) const {
    return wide ? static_cast<const double*>(data)[at] : static_cast<double>(static_cast<const float*>(data)[at]);
  }
  __device__ void add(int64_t at, double x) const { write(at, read(at) + x); }
};

struct ForwardResult {
  Result out, lse;
  double* state;  // (*B, M, 2)
  Result tangent_w, tangent_q;
};

// What the backward pass is given beside the problem, and its results.
struct BackwardTask {
  View grad_out, grad_lse;  // grad_lse.data may be null
  Result out;
  const double* state;
  Result tangent_w, tangent_q;  // null where not saved
  Result grad_query, grad_key, grad_value, grad_key_weight;
  View grad_w;  // contiguous, in the shape and dtype of w: only dimensions of size 1 have stride 0; null if not wanted
  int64_t grad_w_size;
};

// Where the elements of a launch lie: batch elements times blocks of one, in one dimension of the grid.
struct Blocks {
  int64_t of_element;

  __device__ int64_t element() const { return blockIdx.x / of_element; }
  __device__ int64_t block() const { return blockIdx.x % of_element; }
};

}  // namespace nwfast
