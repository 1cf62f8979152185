// Kernels of the fast Gauss transform (plan.h): moments of a box, translation between boxes, evaluation at the points
// of a box, and direct sums where boxes do not pay. Lanes hold points (moments, evaluation, direct sums) or terms
// (translation). All arithmetic is in double, with a fixed order of additions; boxes and blocks of points are dealt
// out to threads by the drivers.

#pragma once

#include "../../simd.h"
#include "tasks.h"

namespace nwfast {
namespace NWFAST_ISA {

typedef Vec<double> DVec;
constexpr int kD = kLanes<double>;

// The next vector of coordinates, as double.
NWFAST_INLINE DVec load_double(const double* x) { return load(x); }
NWFAST_INLINE DVec load_double(const float* x) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x));
#elif NWFAST_LEVEL == 256
  return (DVec)_mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  DVec v;
  for (int lane = 0; lane < kD; ++lane) v[lane] = static_cast<double>(x[lane]);
  return v;
#endif
}
// The first `count` numbers, fewer than a vector holds, and zeros.
NWFAST_INLINE DVec load_some(const double* x, int64_t count) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), x);
#elif NWFAST_LEVEL == 256
  return (DVec)_mm256_maskload_pd(x, (__m256i)(lane_numbers<double>() < count));
#else
  DVec v = {};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = x[lane];
  return v;
#endif
}
NWFAST_INLINE DVec load_some(const float* x, int64_t count) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_cvtps_pd(0xff, _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), x));
#elif NWFAST_LEVEL == 256
  const __m128i counts = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count)), _mm_setr_epi32(0, 1, 2, 3));
  return (DVec)_mm256_cvtps_pd(_mm_maskload_ps(x, counts));
#else
  DVec v = {};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<double>(x[lane]);
  return v;
#endif
}
template <typename T>
NWFAST_INLINE DVec load_up_to(const T* x, int64_t count) {
  return count >= kD ? load_double(x) : load_some(x, count);
}

// Whether any lane is set.
NWFAST_INLINE bool any_lane(IntVec<double> mask) {
#if NWFAST_LEVEL == 512
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif NWFAST_LEVEL == 256
  return _mm256_movemask_pd((__m256d)mask) != 0;
#else
  int64_t any = 0;
  for (int lane = 0; lane < kD; ++lane) any |= mask[lane];
  return any != 0;
#endif
}

// out[2 i] = a[i], out[2 i + 1] = b[i].
NWFAST_INLINE void store_interleaved(double* out, DVec a, DVec b) {
#if NWFAST_LEVEL == 256
  const __m256d low = _mm256_unpacklo_pd(a, b), high = _mm256_unpackhi_pd(a, b);
  store<double>(out, (DVec)_mm256_permute2f128_pd(low, high, 0x20));
  store<double>(out + kD, (DVec)_mm256_permute2f128_pd(low, high, 0x31));
#else
  for (int lane = 0; lane < kD; ++lane) {
    out[2 * lane] = a[lane];
    out[2 * lane + 1] = b[lane];
  }
#endif
}

// out[i] += the sum of the lanes of v[i], in a fixed order.
NWFAST_INLINE void add_horizontal_sums(const DVec (&v)[4], double* out) {
#if NWFAST_LEVEL == 256
  const __m256d first = _mm256_hadd_pd(v[0], v[1]), second = _mm256_hadd_pd(v[2], v[3]);
  const DVec low = (DVec)_mm256_permute2f128_pd(first, second, 0x20);
  const DVec high = (DVec)_mm256_permute2f128_pd(first, second, 0x31);
  store<double>(out, load(out) + (low + high));
#else
  for (int i = 0; i < 4; ++i) out[i] += horizontal_sum<double>(v[i]);
#endif
}

template <int kColumns>
NWFAST_INLINE void moments_of_block(const DVec* t, DVec* power, const DVec (*charge)[64], int64_t vectors, int terms,
                                    double* const* out) {
  for (int first = 0; first < terms; first += 4) {
    DVec sums[kColumns][4] = {};
    for (int64_t i = 0; i < vectors; ++i) {
      const DVec point = t[i];
      DVec p = power[i], c[kColumns];
#pragma GCC unroll 2
      for (int column = 0; column < kColumns; ++column) c[column] = charge[column][i];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
#pragma GCC unroll 2
        for (int column = 0; column < kColumns; ++column) sums[column][n] += p * c[column];
        p = p * point;
      }
      power[i] = p;
    }
#pragma GCC unroll 2
    for (int column = 0; column < kColumns; ++column) add_horizontal_sums(sums[column], out[column] + first);
  }
}

template <typename T>
void fgt_moments(const FgtMoments<T>& task) {
  constexpr int64_t kVectors = 64;
  const DVec centre = splat(task.centre), scale = splat(task.scale);
  const DVec one = splat(1.0);
  for (int64_t begin = 0; begin < task.n; begin += kVectors * kD) {
    const int64_t left = task.n - begin, vectors = left < kVectors * kD ? (left + kD - 1) / kD : kVectors;
    DVec t[kVectors], power[kVectors], charge[2][kVectors];
    for (int64_t i = 0; i < vectors; ++i) {
      t[i] = (load_up_to(task.x + begin + i * kD, left - i * kD) - centre) * scale;
    }
    for (int column = 0; column < task.columns; column += 2) {
      const int count = task.columns - column < 2 ? 1 : 2;
      for (int c = 0; c < count; ++c) {
        if (task.unit && column + c == 0) {
          for (int64_t i = 0; i < vectors; ++i) charge[c][i] = one;
        } else {
          const double* const from = task.charge + (column + c) * task.pitch + begin;
          for (int64_t i = 0; i < vectors; ++i) charge[c][i] = load_up_to(from + i * kD, left - i * kD);
        }
      }
      // Lanes beyond the end have no charge.
      for (int64_t i = 0; i < vectors; ++i) power[i] = one;
      if (left < vectors * kD) {
        const IntVec<double> valid = lane_numbers<double>() < left - (vectors - 1) * kD;
        power[vectors - 1] = select<double>(valid, one, DVec{});
      }
      double* const out[2] = {task.moments + column * task.terms, task.moments + (column + 1) * task.terms};
      if (count == 2) {
        moments_of_block<2>(t, power, charge, vectors, task.terms, out);
      } else {
        moments_of_block<1>(t, power, charge, vectors, task.terms, out);
      }
    }
  }
}

// (below_n + s above_n, below_n - s above_n) for each n < terms, s = sign (-1)^n: what the even and the odd terms of a
// target take from a pair of sources.
NWFAST_INLINE void fold(const double* below, const double* above, int64_t terms, double sign, double* out) {
#if NWFAST_LEVEL >= 256
  typedef double Quad __attribute__((vector_size(32)));
  const Quad signs = {sign, -sign, sign, -sign};
  for (int64_t n = 0; n < terms; n += 4) {
    const Quad p = _mm256_loadu_pd(below + n), q = _mm256_loadu_pd(above + n) * signs, even = p + q, odd = p - q;
    const __m256d low = _mm256_unpacklo_pd(even, odd), high = _mm256_unpackhi_pd(even, odd);
    _mm256_storeu_pd(out + 2 * n, _mm256_permute2f128_pd(low, high, 0x20));
    _mm256_storeu_pd(out + 2 * n + 4, _mm256_permute2f128_pd(low, high, 0x31));
  }
#else
  for (int64_t n = 0; n < terms; ++n, sign = -sign) {
    out[2 * n] = below[n] + sign * above[n];
    out[2 * n + 1] = below[n] - sign * above[n];
  }
#endif
}
// A pair of numbers in all lanes.
NWFAST_INLINE DVec splat_pair(const double* pair) {
#if NWFAST_LEVEL == 512
  return (DVec)_mm512_maskz_broadcast_f64x2(0xff, _mm_loadu_pd(pair));
#elif NWFAST_LEVEL == 256
  return (DVec)_mm256_broadcast_pd(reinterpret_cast<const __m128d*>(pair));
#else
  return load(pair);
#endif
}

template <int kVectors, int kColumns>
void translate(const FgtTranslate& task, int column) {
  // All loops over sums are unrolled: an array that is indexed by a variable stays in memory.
  DVec sums[kColumns][kVectors];
#pragma GCC unroll 2
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) sums[c][v] = load(task.local + (column + c) * task.pitch + v * kD);
  }
  alignas(kVectorBytes) double moments[kColumns][2 * kMostTerms];
  for (int64_t i = 0; i < task.pairs; ++i) {
    for (int c = 0; c < kColumns; ++c) {
      const int64_t place = static_cast<int64_t>(column + c) * task.terms;
      fold(task.below[i] + place, task.above[i] + place, task.terms, task.sign, moments[c]);
    }
    const double *matrix = task.matrix[i], *pair = moments[0];
    for (int n = 0; n < task.terms; ++n, matrix += task.pitch, pair += 2) {
      DVec moment[kColumns];
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) moment[c] = splat_pair(pair + c * 2 * kMostTerms);
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) {
        const DVec row = load(matrix + v * kD);
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; ++c) sums[c][v] += row * moment[c];
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) store<double>(task.local + (column + c) * task.pitch + v * kD, sums[c][v]);
  }
}

template <int kVectors>
void translate_columns(const FgtTranslate& task) {
  int column = 0;
  for (; column + 2 <= task.columns; column += 2) translate<kVectors, 2>(task, column);
  if (column < task.columns) translate<kVectors, 1>(task, column);
}

inline void fgt_translate(const FgtTranslate& task) {
  switch ((task.terms + kD - 1) / kD) {
    case 1:
      return translate_columns<1>(task);
    case 2:
      return translate_columns<2>(task);
    case 3:
      return translate_columns<3>(task);
    case 4:
      return translate_columns<4>(task);
    case 5:
      return translate_columns<5>(task);
    case 6:
      return translate_columns<6>(task);
    case 8:
      return translate_columns<8>(task);
    case 10:
      return translate_columns<10>(task);
    default:
      return translate_columns<12>(task);
  }
}

// Horner's scheme at kVectors vectors of points for kSeries series, of which the sums are stored.
template <int kSeries, int kVectors>
NWFAST_INLINE void horner(const double* local, int pitch, int terms, const DVec* s, double* out, int64_t out_pitch) {
  DVec sums[kSeries][kVectors];
#pragma GCC unroll 2
  for (int c = 0; c < kSeries; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[c][v] = splat(local[c * pitch + terms - 1]);
  }
  for (int m = terms - 2; m >= 0; --m) {
#pragma GCC unroll 2
    for (int c = 0; c < kSeries; ++c) {
      const DVec term = splat(local[c * pitch + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[c][v] = sums[c][v] * s[v] + term;
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < kSeries; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store<double>(out + c * out_pitch + v * kD, sums[c][v]);
  }
}

template <typename T>
void fgt_evaluate(const FgtEvaluate<T>& task) {
  constexpr int kVectors = 4;
  const DVec centre = splat(task.centre), scale = splat(task.scale);
  for (int64_t begin = 0; begin < task.n; begin += kVectors * kD) {
    const int64_t left = task.n - begin;
    DVec s[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      s[v] = left > v * kD ? (load_up_to(task.x + begin + v * kD, left - v * kD) - centre) * scale : DVec{};
    }
    for (int series = 0; series < task.series; series += 2) {
      const double* const local = task.local + series * task.pitch;
      double* const out = task.sums + series * task.sums_pitch + begin;
      if (task.series - series >= 2) {
        horner<2, kVectors>(local, task.pitch, task.terms, s, out, task.sums_pitch);
      } else {
        horner<1, kVectors>(local, task.pitch, task.terms, s, out, task.sums_pitch);
      }
    }
  }
}

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
  return (DVec)(((IntVec<double>)p + ((IntVec<double>)rounded << 52)) & counts);  // p lies in [0.7, 1.5]
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
NWFAST_INLINE void direct_columns(const FgtDirect<T>& task, int column) {
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
void direct_moments(const FgtDirect<T>& task, int column) {
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
void fgt_direct(const FgtDirect<T>& task) {
  int column = 0;
  for (; column + 2 <= task.columns; column += 2) direct_moments<T, 2>(task, column);
  if (column < task.columns) direct_moments<T, 1>(task, column);
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
NWFAST_INLINE void gather_columns(const FgtGather<T>& task, int column) {
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
void fgt_gather(const FgtGather<T>& task) {
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
NWFAST_INLINE void pull(const FgtPull<T>& task) {
  const DVec factor = splat(kMinusHalfLog2E * task.scale * task.scale);
  const IntVec<double> lanes = lane_numbers<double>();
  for (int64_t begin = 0; begin < task.targets; begin += kD) {
    const DVec u = load_up_to(task.target + begin, task.targets - begin);
    double* const out = task.sums + begin;
    DVec total = {}, pulled = {}, moment = {};
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
      if (kOffsets) moment += pull * (splat(x) - u);
    }
    double* const next = out + task.channels * task.sums_pitch;
    if (kSingle) store<double>(out, load(out) + total);
    store<double>(next, load(next) + pulled);
    if (kOffsets) store<double>(next + task.sums_pitch, load(next + task.sums_pitch) + moment);
  }
}

template <typename T>
void fgt_pull(const FgtPull<T>& task) {
  if (task.channels == 1) {
    task.offsets ? pull<T, true, true>(task) : pull<T, false, true>(task);
  } else {
    task.offsets ? pull<T, true, false>(task) : pull<T, false, false>(task);
  }
}

typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
NWFAST_INLINE void store_as(double* p, DVec v, int64_t count) {
  if (count >= kD) return store<double>(p, v);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = v[lane];
}
NWFAST_INLINE void store_as(float* p, DVec v, int64_t count) {
  const HalfVec narrow = __builtin_convertvector(v, HalfVec);
  if (count >= kD) {
    std::memcpy(p, &narrow, sizeof narrow);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) p[lane] = narrow[lane];
  }
}

// Natural logarithm of positive normal numbers: log(2^e m) = e ln 2 + 2 atanh((m - 1) / (m + 1)), m within sqrt(2)
// of 1.
template <int kTerms>
NWFAST_INLINE DVec logarithm(DVec x) {
  typedef IntVec<double> Int;
  const Int bits = (Int)x, half = (Int)splat(0.70710678118654752440);
  const Int shifted = bits - half;
  const Int exponent = shifted >> 52;
  const DVec m = (DVec)(bits - (exponent << 52));
  const DVec s = (m - 1.0) / (m + 1.0), square = s * s;
  DVec p = splat(1.0 / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 1; --k) p = p * square + 1.0 / (2 * k + 1);
  // The integer as a double, by the bits of 1.5 * 2^52.
  const DVec e = (DVec)((Int)splat(Simd<double>::kRound) + exponent) - Simd<double>::kRound;
  return e * kLn2 + (s * (square * p) + s) * 2.0;
}

template <typename T>
void fgt_finish(const FgtFinish<T>& task) {
  constexpr int kTerms = sizeof(T) == 4 ? 6 : 11;
  const DVec not_a_number = splat(static_cast<double>(std::numeric_limits<double>::quiet_NaN()));
  const DVec low = splat(task.low), high = splat(task.high);
  for (int64_t i = 0; i < task.rows; i += kD) {
    const int64_t left = task.rows - i;
    const DVec sum = load_up_to(task.total + i, left), value = load_up_to(task.value + i, left);
    const IntVec<double> any = sum > DVec{};
    const DVec total = select<double>(any, sum, splat(1.0)), inverse = splat(1.0) / total;
    const DVec mean = value * inverse;
    DVec out = mean + task.centre;
    out = select<double>(out < low, low, out);
    out = select<double>(out > high, high, out);
    store_as(task.out + i, select<double>(any, out, not_a_number), left);
    const DVec true_total = select<double>(any, total * task.unit, DVec{});
    DVec shift = {};
    if (task.apart) {
      const DVec offset = load_up_to(task.apart + i, left) * task.w;
      shift = offset * offset;
    }
    if (task.lse) {
      DVec lse = logarithm<kTerms>(true_total);
      const IntVec<double> odd = (true_total < 1e-300) | (true_total > 1e300);
      for (int lane = 0; any_lane(odd) && lane < kD; ++lane) {
        if (odd[lane]) lse[lane] = __builtin_log(true_total[lane]);  // of 0: -infinity
      }
      store_as(task.lse + i, lse - shift * 0.5, left);
    }
    shift = select<double>(any, shift * -kMinusHalfLog2E, DVec{});
    if (task.state && left >= kD) {
      store_interleaved(task.state + 2 * i, shift, true_total);
    } else {
      for (int lane = 0; task.state && lane < left; ++lane) {
        task.state[2 * (i + lane)] = shift[lane];
        task.state[2 * (i + lane) + 1] = true_total[lane];
      }
    }
    if (task.tangent_w) {
      const DVec s0 = load_up_to(task.score_total + i, left), s1 = load_up_to(task.score_value + i, left);
      store_as(task.tangent_w + i, select<double>(any, (s1 - mean * s0) * inverse * -task.w, DVec{}), left);
    }
    if (task.tangent_q) {
      const DVec s0 = load_up_to(task.offset_total + i, left), s1 = load_up_to(task.offset_value + i, left);
      store_as(task.tangent_q + i, select<double>(any, (s1 - mean * s0) * inverse * -task.w * task.w, DVec{}), left);
    }
  }
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
