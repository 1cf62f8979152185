// Evaluation at points of floats by the kernels for doubles.

#pragma once

#include "../../simd.h"
#include "tasks.h"

namespace nwfast {
namespace NWFAST_ISA {

// Places of floats become doubles by the block: `run` is long, and one copy of it serves both.
template <typename Run>
NWFAST_INLINE void at_doubles(const GridEvaluate<double>& task, const Run& run) {
  run(task);
}
template <typename Run>
NWFAST_INLINE void at_doubles(const GridEvaluate<float>& task, const Run& run) {
  constexpr int64_t kBlock = 8 * kEvaluatedPoints;
  double x[3][kBlock];
  GridEvaluate<double> part = {};
  for (int f = 0; f < 3; ++f) {
    part.x[f] = task.x[f] ? x[f] : nullptr;
    part.centre[f] = task.centre[f];
    part.scale[f] = task.scale[f];
    part.terms[f] = task.terms[f];
  }
  part.window = task.window;
  part.order = task.order;
  part.pairs = task.pairs;
  part.series = task.series;
  part.columns = task.columns;
  part.sums_pitch = task.sums_pitch;
  for (int64_t begin = 0; begin < task.n; begin += kBlock) {
    part.n = task.n - begin < kBlock ? task.n - begin : kBlock;
    for (int f = 0; f < 3; ++f) {
      for (int64_t i = 0; task.x[f] && i < part.n; ++i) x[f][i] = static_cast<double>(task.x[f][begin + i]);
    }
    part.sums = task.sums + begin;
    run(part);
  }
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
