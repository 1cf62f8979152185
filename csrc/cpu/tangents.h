// The gradients of query and w from the tangents that a forward pass of one channel saved.

#pragma once

#include "drivers.h"

namespace nwfast {

// The gradients of query from the tangents that the forward pass saved, for n rows from the first on; adds to grad_w
// (kFeatures) what they add to the gradient of w. `held` becomes false where T does not hold a tangent that counts: a
// gradient may be small.
template <int kFeatures, typename T>
void apply_tangents(const Problem& problem, const BackwardTask<T>& task, int64_t b, int64_t first, int64_t n,
                    double* grad_w, bool& held) {
  constexpr int64_t kRows = 512;
  T grad[kRows], product[kRows * kFeatures];
  const int64_t stride = task.grad_out.row_stride;
  bool beyond = false;
  for (int64_t begin = first; begin < first + n; begin += kRows) {
    const int64_t rows = std::min(kRows, first + n - begin), row = b * problem.queries + begin;
    read(task.grad_out, task.grad_out.offset(problem.batch, b) + begin * stride, rows, stride, grad);
    // A row without any key has the tangent 0, but its output is NaN, and so may be the gradient of that. A gradient of
    // 0 adds nothing, even where the row and its tangent are NaN.
    const auto multiply = [&](const T* tangent, T* to) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int f = 0; f < kFeatures; ++f) {
          const T by = tangent[i * kFeatures + f];
          const bool nothing = grad[i] == 0 || (by == 0 && std::isnan(task.out[row + i]));
          to[i * kFeatures + f] = nothing ? T(0) : grad[i] * by;
          beyond |= !nothing && std::isinf(by);
        }
      }
    };
    if (task.grad_query) multiply(task.tangent_q + row * kFeatures, task.grad_query + row * kFeatures);
    if (!task.grad_w) continue;
    multiply(task.tangent_w + row * kFeatures, product);
    for (int f = 0; f < kFeatures; ++f) {
      double sums[4] = {};
      for (int64_t i = 0; i < rows; ++i) sums[i % 4] += static_cast<double>(product[i * kFeatures + f]);
      grad_w[f] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
  held = !beyond;
}

// False where the tangents do not serve.
template <int kFeatures, typename T>
bool apply_tangents(const Problem& problem, const BackwardTask<T>& task) {
  constexpr int64_t kPart = 16384;
  const int64_t parts = (problem.queries + kPart - 1) / kPart;
  Buffer<double> sums(problem.batch.count * parts * kFeatures);
  Buffer<bool> held(problem.batch.count * parts);
  const double rows = static_cast<double>(problem.queries) * static_cast<double>(problem.batch.count);
  parallel_blocks(problem.batch.count * parts, rows < kSerialPairs, [&](int64_t i) {
    const int64_t begin = i % parts * kPart;
    double* const part = sums.get() + i * kFeatures;
    std::fill_n(part, kFeatures, 0.0);
    apply_tangents<kFeatures>(problem, task, i / parts, begin, std::min(kPart, problem.queries - begin), part, held[i]);
  });
  for (int64_t i = 0; i < problem.batch.count * parts; ++i) {
    if (!held[i]) return false;
  }
  for (int64_t b = 0; task.grad_w && b < problem.batch.count; ++b) {
    double* const grad_w = task.grad_w + b * kFeatures;
    std::fill_n(grad_w, kFeatures, 0.0);
    for (int64_t i = 0; i < parts * kFeatures; ++i) grad_w[i % kFeatures] += sums[b * parts * kFeatures + i];
  }
  return true;
}

template <typename T>
bool apply_tangents(const Problem& problem, const BackwardTask<T>& task) {
  if (problem.features == 1) return apply_tangents<1>(problem, task);
  return problem.features == 2 ? apply_tangents<2>(problem, task) : apply_tangents<3>(problem, task);
}

}  // namespace nwfast
