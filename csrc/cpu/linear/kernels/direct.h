// Direct sums, pair by pair in double, where boxes do not pay: rows over keys, and the transpose. Lanes hold what is
// summed for.

#pragma once

#include "tasks.h"
#include "vectors.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

constexpr double kMinusHalfLog2E = -kHalfLog2E;

// 2^t for t within (-infinity, 1000] in double, accurate to what results of type T show: 5e-9 for float, rounding for
// double. Below -1021 the result is 0.
template <typename T>
NWFAST_INLINE DVec weight_of(DVec t) {
  typedef Exp2Round<T> Polynomial;
  const IntVec<double> counts = t >= splat(-1021.0);
  t = select<double>(counts, t, splat(-1021.0));
  const DVec rounded = t + Simd<double>::kRound;
  const DVec fraction = t - (rounded - Simd<double>::kRound);
  DVec p = fraction * Polynomial::coefficient(Polynomial::kDegree) + Polynomial::coefficient(Polynomial::kDegree - 1);
#pragma GCC unroll 16
  for (int i = Polynomial::kDegree - 2; i >= 0; --i) p = p * fraction + Polynomial::coefficient(i);
  return (DVec)((IntVec<double>)raise<double>(p, rounded) & counts);  // p lies in [0.7, 1.5]
}

// Sources as double: where they are not, converted by the block.
constexpr int64_t kSourceBlock = 512;
NWFAST_INLINE const double* as_double(const double* x, int64_t, double*) { return x; }
NWFAST_INLINE const double* as_double(const float* x, int64_t n, double* block) {
  int64_t i = 0;
  for (; i + kD <= n; i += kD) store<double>(block + i, load_double(x + i));
  for (; i < n; ++i) block[i] = static_cast<double>(x[i]);
  return block;
}

template <typename T, int kColumns, bool kOffsets, bool kScores>
NWFAST_INLINE void direct_columns(const DirectTask<T>& task, int column) {
  constexpr int kSlots = 1 + kOffsets + kScores;
  const DVec factor = splat(kMinusHalfLog2E * task.scale * task.scale);
  double block[sizeof(T) == sizeof(double) ? 1 : kSourceBlock];
  const int64_t step = sizeof(T) == sizeof(double) ? task.sources : kSourceBlock;
  const double* const charges = task.charge + column * task.pitch;
  for (int64_t from = 0; from < task.sources || from == 0; from += step) {
    const int64_t sources = task.sources - from < step ? task.sources - from : step;
    const double* const source = as_double(task.source + from, sources, block);
    for (int64_t begin = 0; begin < task.targets; begin += kD) {
      const int64_t left = task.targets - begin;
      const DVec x = load_up_to(task.target + begin, left), reference = load_up_to(task.reference + begin, left);
      // 2 x - reference and what rounding took of it, which counts where a key lies as far on the other side.
      const DVec twice = x + x, mirrored = twice - reference, second = mirrored - twice;
      const DVec rest = (twice - (mirrored - second)) - (reference + second);
      const bool exact = !any_lane(rest != DVec{});
      IntVec<double> excluded = {};
      if (task.excluded) {
        for (int lane = 0; lane < kD; ++lane) excluded[lane] = lane < left ? task.excluded[begin + lane] - from : -1;
      }
      DVec sums[kSlots][kColumns] = {};
      const auto add = [&](int64_t j, DVec offset, DVec score) __attribute__((always_inline)) {
        DVec exponent = score * factor;
        // A source of tiny charge may be nearer than the reference.
        exponent = select<double>(exponent > splat(1000.0), splat(1000.0), exponent);
        DVec weight = weight_of<T>(exponent);
        if (task.excluded) weight = select<double>(excluded == j, DVec{}, weight);
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; ++c) {
          const DVec term = weight * splat(charges[c * task.pitch + from + j]);
          sums[0][c] += term;
          if (kOffsets) sums[1][c] += term * offset;
          if (kScores) sums[kOffsets + 1][c] += term * score;
        }
      };
      for (int64_t j = 0; exact && j < sources; ++j) {
        const DVec u = splat(source[j]), offset = reference - u;
        add(j, offset, offset * (mirrored - u));
      }
      for (int64_t j = 0; !exact && j < sources; ++j) {
        const DVec u = splat(source[j]), offset = reference - u;
        add(j, offset, offset * ((mirrored - u) + rest));
      }
      for (int slot = 0; slot < kSlots; ++slot) {
        for (int c = 0; c < kColumns; ++c) {
          double* const out = task.sums + (slot * task.columns + column + c) * task.sums_pitch + begin;
          store<double>(out, from == 0 ? sums[slot][c] : load(out) + sums[slot][c]);
        }
      }
    }
    if (sources <= 0) break;
  }
}

template <typename T, int kColumns>
void direct_slots(const DirectTask<T>& task, int column) {
  if (task.offsets && task.scores) {
    direct_columns<T, kColumns, true, true>(task, column);
  } else if (task.offsets) {
    direct_columns<T, kColumns, true, false>(task, column);
  } else if (task.scores) {
    direct_columns<T, kColumns, false, true>(task, column);
  } else {
    direct_columns<T, kColumns, false, false>(task, column);
  }
}

template <typename T>
void direct(const DirectTask<T>& task) {
  int column = 0;
  for (; column + 2 <= task.columns; column += 2) direct_slots<T, 2>(task, column);
  if (column < task.columns) direct_slots<T, 1>(task, column);
}

// (x - u)^2 - (x - reference)^2 for each u, to a few roundings of itself.
struct MirroredSource {
  double reference, mirrored, rest;  // 2 x - reference = mirrored + rest, exactly

  MirroredSource(double x, double from) : reference(from), mirrored(2 * x - from) {
    const double second = mirrored - 2 * x;
    rest = (2 * x - (mirrored - second)) - (from + second);
  }
  NWFAST_INLINE DVec score(DVec u) const { return (splat(reference) - u) * ((splat(mirrored) - u) + splat(rest)); }
};

template <typename T, int kColumns, bool kOffsets>
NWFAST_INLINE void gather_columns(const GatherTask<T>& task, int column) {
  const DVec factor = splat(kMinusHalfLog2E * task.scale * task.scale);
  for (int64_t begin = 0; begin < task.targets; begin += kD) {
    const DVec u = load_up_to(task.target + begin, task.targets - begin);
    DVec sums[1 + kOffsets][kColumns] = {};
    for (int64_t i = 0; i < task.sources; ++i) {
      const double x = task.source[i];
      DVec exponent = MirroredSource(x, task.reference[i]).score(u) * factor;
      exponent = select<double>(exponent > splat(1000.0), splat(1000.0), exponent);
      const DVec weight = weight_of<T>(exponent);
      const DVec offset = splat(x) - u;
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) {
        const DVec term = weight * splat(task.charge[(column + c) * task.pitch + i]);
        sums[0][c] += term;
        if (kOffsets) sums[kOffsets][c] += term * offset;
      }
    }
    for (int slot = 0; slot <= kOffsets; ++slot) {
      for (int c = 0; c < kColumns; ++c) {
        double* const out = task.sums + (slot * task.columns + column + c) * task.sums_pitch + begin;
        store<double>(out, load(out) + sums[slot][c]);
      }
    }
  }
}

template <typename T>
void gather(const GatherTask<T>& task) {
  int column = 0;
  for (; column < task.columns; column += 2) {
    const bool pair = column + 2 <= task.columns;
    if (task.offsets) {
      pair ? gather_columns<T, 2, true>(task, column) : gather_columns<T, 1, true>(task, column);
    } else {
      pair ? gather_columns<T, 2, false>(task, column) : gather_columns<T, 1, false>(task, column);
    }
  }
}

// One channel has its sums in registers.
template <typename T, bool kOffsets, bool kSingle>
NWFAST_INLINE void pull_slots(const PullTask<T>& task) {
  const DVec factor = splat(kMinusHalfLog2E * task.scale * task.scale);
  const IntVec<double> lanes = lane_numbers<double>();
  for (int64_t begin = 0; begin < task.targets; begin += kD) {
    const DVec u = load_up_to(task.target + begin, task.targets - begin);
    double* const out = task.sums + begin;
    DVec total = {}, pulled = {}, by_offset = {};
    for (int64_t i = 0; i < task.sources; ++i) {
      const double x = task.source[i];
      DVec exponent = MirroredSource(x, task.reference[i]).score(u) * factor;
      exponent = select<double>(exponent > splat(1000.0), splat(1000.0), exponent);
      DVec weight = weight_of<T>(exponent);
      if (task.excluded) weight = select<double>(lanes == task.excluded[i] - begin, DVec{}, weight);
      DVec pull = splat(task.lse_grad[i]);
      for (int c = 0; c < (kSingle ? 1 : task.channels); ++c) {
        const DVec grad = splat(task.grad[c * task.pitch + i]);
        pull += grad * (load(task.value + c * task.value_pitch + begin) - splat(task.mean[c * task.pitch + i]));
        if (kSingle) {
          total += weight * grad;
        } else {
          store<double>(out + c * task.sums_pitch, load(out + c * task.sums_pitch) + weight * grad);
        }
      }
      pull = pull * weight;
      pulled += pull;
      if (kOffsets) by_offset += pull * (splat(x) - u);
    }
    double* const next = out + task.channels * task.sums_pitch;
    if (kSingle) store<double>(out, load(out) + total);
    store<double>(next, load(next) + pulled);
    if (kOffsets) store<double>(next + task.sums_pitch, load(next + task.sums_pitch) + by_offset);
  }
}

template <typename T>
void pull(const PullTask<T>& task) {
  if (task.channels == 1) {
    task.offsets ? pull_slots<T, true, true>(task) : pull_slots<T, false, true>(task);
  } else {
    task.offsets ? pull_slots<T, true, false>(task) : pull_slots<T, false, false>(task);
  }
}

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
