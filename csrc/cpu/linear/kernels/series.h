// Series: the moments of a box, their translation to the series of another box, and the series at the points of a box.
// Lanes hold points (moments, evaluation) or terms (translation). All arithmetic is in double, with a fixed order of
// additions.

#pragma once

#include "tasks.h"
#include "vectors.h"

namespace nwfast {
namespace NWFAST_ISA {
namespace linear {

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
void moments(const MomentsTask<T>& task) {
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
void translate_columns(const TranslateTask& task, int column) {
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
void translate_all(const TranslateTask& task) {
  int column = 0;
  for (; column + 2 <= task.columns; column += 2) translate_columns<kVectors, 2>(task, column);
  if (column < task.columns) translate_columns<kVectors, 1>(task, column);
}

inline void translate(const TranslateTask& task) {
  switch ((task.terms + kD - 1) / kD) {
    case 1:
      return translate_all<1>(task);
    case 2:
      return translate_all<2>(task);
    case 3:
      return translate_all<3>(task);
    case 4:
      return translate_all<4>(task);
    case 5:
      return translate_all<5>(task);
    case 6:
      return translate_all<6>(task);
    case 8:
      return translate_all<8>(task);
    case 10:
      return translate_all<10>(task);
    default:
      return translate_all<12>(task);
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
void evaluate(const EvaluateTask<T>& task) {
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

}  // namespace linear
}  // namespace NWFAST_ISA
}  // namespace nwfast
