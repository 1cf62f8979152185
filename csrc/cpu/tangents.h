// The gradients of query and w from the tangents that a forward pass of one feature and one channel saved.

#pragma once

#include "drivers.h"

namespace nwfast {

// The gradients of query from the tangents that the forward pass saved, for n rows from the first on; returns what they
// add to the gradient of w. `held` becomes false where T does not hold a tangent that counts: a gradient may be small.
template <typename T>
double apply_tangents(const Problem& problem, const BackwardTask<T>& task, int64_t b, int64_t first, int64_t n,
                      bool& held) {
  constexpr int64_t kRows = 512;
  T grad[kRows], product[kRows];
  const int64_t stride = task.grad_out.row_stride;
  double sum = 0;
  bool beyond = false;
  for (int64_t begin = first; begin < first + n; begin += kRows) {
    const int64_t rows = std::min(kRows, first + n - begin), row = b * problem.queries + begin;
    read(task.grad_out, task.grad_out.offset(problem.batch, b) + begin * stride, rows, stride, grad);
    // A row without any key has the tangent 0, but its output is NaN, and so may be the gradient of that. A gradient of
    // 0 adds nothing, even where the row and its tangent are NaN.
    const auto multiply = [&](const T* tangent, T* to) {
      for (int64_t i = 0; i < rows; ++i) {
        const bool nothing = grad[i] == 0 || (tangent[i] == 0 && std::isnan(task.out[row + i]));
        to[i] = nothing ? T(0) : grad[i] * tangent[i];
        beyond |= !nothing && std::isinf(tangent[i]);
      }
    };
    if (task.grad_query) multiply(task.tangent_q + row, task.grad_query + row);
    if (!task.grad_w) continue;
    multiply(task.tangent_w + row, product);
    double sums[4] = {};
    for (int64_t i = 0; i < rows; ++i) sums[i % 4] += static_cast<double>(product[i]);
    sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  held = !beyond;
  return sum;
}

// False where the tangents do not serve.
template <typename T>
bool apply_tangents(const Problem& problem, const BackwardTask<T>& task) {
  constexpr int64_t kPart = 16384;
  const int64_t parts = (problem.queries + kPart - 1) / kPart;
  Buffer<double> sums(problem.batch.count * parts);
  Buffer<bool> held(problem.batch.count * parts);
  const double rows = static_cast<double>(problem.queries) * static_cast<double>(problem.batch.count);
  parallel_blocks(problem.batch.count * parts, rows < kSerialPairs, [&](int64_t i) {
    const int64_t begin = i % parts * kPart;
    sums[i] = apply_tangents(problem, task, i / parts, begin, std::min(kPart, problem.queries - begin), held[i]);
  });
  for (int64_t i = 0; i < problem.batch.count * parts; ++i) {
    if (!held[i]) return false;
  }
  for (int64_t b = 0; task.grad_w && b < problem.batch.count; ++b) {
    task.grad_w[b] = 0;
    for (int64_t part = 0; part < parts; ++part) task.grad_w[b] += sums[b * parts + part];
  }
  return true;
}

}  // namespace nwfast
