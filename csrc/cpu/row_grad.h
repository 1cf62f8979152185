// What reaches a row in the backward pass: the gradients of its results.

#pragma once

#include <cmath>

#include "drivers.h"
#include "isa/processor.h"

namespace nwfast {

// a * b + c as the kernels that run here round it, fused or not: their sums cancel to the bit against such ones.
template <typename T>
T multiply_add(T a, T b, T c) {
  return processor_level() == Level::kBaseline ? a * b + c : std::fma(a, b, c);
}

// Reads those of out (channels) and of lse, 0 where there is none; returns the size of the largest.
template <typename R>
double read_row_grad(const Problem& problem, const BackwardTask<R>& task, int64_t b, int64_t i, double* out,
                     double& lse) {
  const View &grad = task.grad_out, &grad_lse = task.grad_lse;
  read(grad, grad.offset(problem.batch, b) + i * grad.row_stride, problem.channels, grad.column_stride, out);
  lse = 0;
  if (grad_lse.data) read(grad_lse, grad_lse.offset(problem.batch, b) + i * grad_lse.row_stride, 1, 0, &lse);
  double size = std::fabs(lse);
  for (int64_t c = 0; c < problem.channels; ++c) {
    if (!(std::fabs(out[c]) <= size)) size = std::fabs(out[c]);  // NaN stays
  }
  return size;
}

}  // namespace nwfast
