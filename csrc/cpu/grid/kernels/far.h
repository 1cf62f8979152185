// Sums of far rows: directly, and by Taylor expansions of exp(d.z) about the centre of a node of keys; see tasks.h.
//
// Rows lie side by side in vectors; for the moments of a node keys do. Terms of degree n are made of those of degree
// n - 1: first those without the last feature, then all of degree n - 1 times the last feature.

#pragma once

#include "../../simd.h"
#include "tasks.h"

namespace nwfast {
namespace NWFAST_ISA {

constexpr double kFarLog2E = 1.4426950408889634;  // exponents of e in base 2

// The terms of one degree, for kVectors vectors of points.
template <int kFeatures, int kVectors>
struct FarTerms {
  static constexpr int kDegrees = far_degrees(kFeatures);
  Vec<double> plane[kDegrees][kVectors];                                          // of the first two features
  Vec<double> all[kFeatures == 3 ? kDegrees * (kDegrees + 1) / 2 : 1][kVectors];  // of three
  int degree = 0;

  NWFAST_INLINE FarTerms() {
    for (int v = 0; v < kVectors; ++v) plane[0][v] = all[0][v] = splat<double>(1);
  }
  NWFAST_INLINE int count() const { return kFeatures == 2 ? degree + 1 : (degree + 1) * (degree + 2) / 2; }
  NWFAST_INLINE const Vec<double>* term(int k) const { return kFeatures == 2 ? plane[k] : all[k]; }

  NWFAST_INLINE void raise_degree(const Vec<double> (*z)[kVectors]) {
    const int before = count();
    ++degree;
    for (int k = degree; k > 0; --k) {
      for (int v = 0; v < kVectors; ++v) plane[k][v] = plane[k - 1][v] * z[1][v];
    }
    for (int v = 0; v < kVectors; ++v) plane[0][v] *= z[0][v];
    if constexpr (kFeatures == 3) {
      const int shift = degree + 1;
      for (int k = before - 1; k >= 0; --k) {
        for (int v = 0; v < kVectors; ++v) all[k + shift][v] = all[k][v] * z[2][v];
      }
      for (int k = 0; k < shift; ++k) {
        for (int v = 0; v < kVectors; ++v) all[k][v] = plane[k][v];
      }
    }
  }
};

// a b - product, rounded once: what rounding took from the product.
NWFAST_INLINE Vec<double> product_rest(Vec<double> a, Vec<double> b, Vec<double> product) {
#if NWFAST_LEVEL == 512
  return _mm512_fmsub_pd(a, b, product);
#elif NWFAST_LEVEL == 256
  return _mm256_fmsub_pd(a, b, product);
#else
  // Upper halves of the digits have exact products.
  const IntVec<double> upper = (IntVec<double>){} - (int64_t{1} << 27);
  const Vec<double> a_high = (Vec<double>)((IntVec<double>)a & upper), a_low = a - a_high;
  const Vec<double> b_high = (Vec<double>)((IntVec<double>)b & upper), b_low = b - b_high;
  return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
}

// A number in two parts, the second what rounding took from the first.
struct FarNumber {
  double high, low;
};
// scale (x - reference).
NWFAST_INLINE FarNumber far_offset(double x, double reference, double scale) {
  const double difference = x - reference, part = difference - x;
  const double rest = (x - (difference - part)) - (reference + part), high = difference * scale;
  return {high, __builtin_fma(difference, scale, -high) + rest * scale};
}

// e.y - |e|^2 / 2 for the offsets e of a key or a centre, in base 2.
template <int kFeatures, bool kExact>
struct FarExponent {
  FarNumber e[kFeatures];
  double constant = 0;  // without kExact

  NWFAST_INLINE FarExponent(const double* point, int64_t stride, const double* reference, const double* scale) {
    for (int f = 0; f < kFeatures; ++f) {
      if constexpr (kExact) {
        e[f] = far_offset(point[f * stride], reference[f], scale[f]);
      } else {
        e[f] = {(point[f * stride] - reference[f]) * scale[f], 0};
        constant += e[f].high * e[f].high * (kFarLog2E / 2);
      }
    }
  }

  // For a vector of rows, y[f] at f * stride, as is what rounding took from it; without kExact y comes in base 2.
  NWFAST_INLINE Vec<double> at(const Vec<double>* y, const Vec<double>* rest, int stride) const {
    if constexpr (kExact) {
      // e (y - e / 2), each in two parts: where they cancel between features, or in y - e / 2, digits are left.
      Vec<double> sum = {}, small = {};
      for (int f = 0; f < kFeatures; ++f) {
        const Vec<double> half = splat<double>(e[f].high / 2), high = splat<double>(e[f].high);
        const Vec<double> g = y[f * stride] - half, part = g - y[f * stride];
        const Vec<double> g_rest = (y[f * stride] - (g - part)) - (half + part) + rest[f * stride] - e[f].low / 2;
        const Vec<double> product = high * g, next = sum + product, added = next - sum;
        small += product_rest(high, g, product) + g_rest * high + g * e[f].low;
        small += (sum - (next - added)) + (product - added);
        sum = next;
      }
      return (sum + small) * kFarLog2E;
    } else {
      Vec<double> t = y[0] * e[0].high - constant;
      for (int f = 1; f < kFeatures; ++f) t += y[f * stride] * e[f].high;
      return t;
    }
  }
};

// What rows of kVectors vectors are.
template <int kFeatures, int kVectors, bool kExact>
struct FarVectors {
  Vec<double> y[kFeatures][kVectors], rest[kFeatures][kVectors];

  NWFAST_INLINE FarVectors(const FarPlaces& rows, int64_t first) {
    for (int f = 0; f < kFeatures; ++f) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t place = f * kFarRows + first + v * kLanes<double>;
        y[f][v] = load(rows.place + place);
        if constexpr (kExact) {
          rest[f][v] = load(rows.rest + place);
        } else {
          y[f][v] *= kFarLog2E;
        }
      }
    }
  }
  NWFAST_INLINE Vec<double> exponent(const FarExponent<kFeatures, kExact>& e, int v) const {
    return e.at(&y[0][v], &rest[0][v], kVectors);
  }
};

template <int kFeatures, int kVectors, bool kExact>
NWFAST_INLINE void far_direct_rows(const FarDirect& task, int64_t first) {
  const FarVectors<kFeatures, kVectors, kExact> rows(task.rows, first);
  Vec<double> total[kVectors], value[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    total[v] = load(task.sums + first + v * kLanes<double>);
    value[v] = load(task.sums + kFarRows + first + v * kLanes<double>);
  }
  for (int64_t j = 0; j < task.n; ++j) {
    const FarExponent<kFeatures, kExact> e(task.key + j, task.pitch, task.reference, task.scale);
    for (int v = 0; v < kVectors; ++v) {
      const Vec<double> weight = exp2<double>(rows.exponent(e, v));
      total[v] += weight * task.charge[j];
      value[v] += weight * task.charge[task.pitch + j];
      for (int c = 2; c < task.columns; ++c) {
        double* const sum = task.sums + c * kFarRows + first + v * kLanes<double>;
        store<double>(sum, load(sum) + weight * task.charge[c * task.pitch + j]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store<double>(task.sums + first + v * kLanes<double>, total[v]);
    store<double>(task.sums + kFarRows + first + v * kLanes<double>, value[v]);
  }
}

// Of an expansion, at some rows: the Gaussian of its centre, and z in units of its extent.
template <int kFeatures, int kVectors, bool kExact>
NWFAST_INLINE void far_weights(const FarExpansion& task, int64_t first, Vec<double>* weight,
                               Vec<double> (*z)[kVectors]) {
  const FarVectors<kFeatures, kVectors, kExact> rows(task.rows, first);
  const FarExponent<kFeatures, kExact> e(task.centre, 1, task.reference, task.scale);
  for (int v = 0; v < kVectors; ++v) {
    weight[v] = exp2<double>(rows.exponent(e, v));
    for (int f = 0; f < kFeatures; ++f) {
      z[f][v] = (load(task.rows.place + f * kFarRows + first + v * kLanes<double>) - e.e[f].high) * task.half[f];
    }
  }
}

template <int kFeatures, int kVectors>
NWFAST_ONE_COPY void far_expansion_rows(const FarExpansion& task, int64_t first) {
  Vec<double> z[kFeatures][kVectors], weight[kVectors];
  if (task.rows.rest) {
    far_weights<kFeatures, kVectors, true>(task, first, weight, z);
  } else {
    far_weights<kFeatures, kVectors, false>(task, first, weight, z);
  }
  for (int column = 0; column < task.columns; column += 2) {
    const int columns = task.columns - column < 2 ? 1 : 2;  // one is computed twice
    FarTerms<kFeatures, kVectors> terms;
    const double* coefficient[2];
    Vec<double> sum[2][2][kVectors] = {};  // of even and odd places: shorter chains
    for (int c = 0; c < 2; ++c) {
      coefficient[c] = task.coefficients + (c < columns ? column + c : column) * task.pitch;
      for (int v = 0; v < kVectors; ++v) sum[0][c][v] += coefficient[c][0];
      ++coefficient[c];
    }
    const auto add = [&](int k, int parity) {
      for (int c = 0; c < 2; ++c) {
        for (int v = 0; v < kVectors; ++v) sum[parity][c][v] += terms.term(k)[v] * coefficient[c][k];
      }
    };
    for (int degree = 1; degree < task.degrees; ++degree) {
      terms.raise_degree(z);
      const int count = terms.count();
      int k = 0;
      for (; k + 1 < count; k += 2) {
        add(k, 0);
        add(k + 1, 1);
      }
      if (k < count) add(k, 0);
      for (int c = 0; c < 2; ++c) coefficient[c] += count;
    }
    for (int c = 0; c < columns; ++c) {
      for (int v = 0; v < kVectors; ++v) {
        double* const to = task.sums + (column + c) * kFarRows + first + v * kLanes<double>;
        store<double>(to, load(to) + weight[v] * (sum[0][c][v] + sum[1][c][v]));
      }
    }
  }
}

// Two vectors of rows at once, or the one that there is.
template <int kFeatures, bool kExact>
NWFAST_ONE_COPY void far_direct_of(const FarDirect& task) {
  int64_t first = 0;
  for (; first + kLanes<double> < task.rows.rows; first += 2 * kLanes<double>) {
    far_direct_rows<kFeatures, 2, kExact>(task, first);
  }
  if (first < task.rows.rows) far_direct_rows<kFeatures, 1, kExact>(task, first);
}
template <int kFeatures>
void far_expansion_of(const FarExpansion& task) {
  int64_t first = 0;
  for (; first + kLanes<double> < task.rows.rows; first += 2 * kLanes<double>) {
    far_expansion_rows<kFeatures, 2>(task, first);
  }
  if (first < task.rows.rows) far_expansion_rows<kFeatures, 1>(task, first);
}

template <int kFeatures>
NWFAST_ONE_COPY void far_moments_of(const FarMoments& task) {
  const int terms = far_terms(kFeatures, task.degrees);
  double* const sums = task.scratch;
  for (int column = 0; column < task.columns; column += 2) {
    const int columns = task.columns - column < 2 ? 1 : 2;
    for (int i = 0; i < columns * terms * kLanes<double>; ++i) sums[i] = 0;
    for (int64_t begin = 0; begin < task.n; begin += kLanes<double>) {
      const int64_t count = task.n - begin < kLanes<double> ? task.n - begin : kLanes<double>;
      Vec<double> d[kFeatures][1], square = {}, charge[2] = {};
      for (int f = 0; f < kFeatures; ++f) {
        Vec<double> key = splat<double>(task.centre[f]);
        for (int64_t i = 0; i < count; ++i) key[i] = task.key[f * task.key_pitch + begin + i];
        const Vec<double> offset = (key - task.centre[f]) * task.scale[f];
        square += offset * offset;
        d[f][0] = task.half[f] > 0 ? offset / task.half[f] : Vec<double>{};
      }
      const Vec<double> weight = exp2<double>(square * (-kFarLog2E / 2));
      for (int c = 0; c < columns; ++c) {
        const double* const from = task.charge + (column + c) * task.key_pitch + begin;
        for (int64_t i = 0; i < count; ++i) charge[c][i] = from[i];
        charge[c] *= weight;
      }
      FarTerms<kFeatures, 1> powers;
      double* to = sums;
      for (int degree = 0;; ++degree) {
        for (int k = 0; k < powers.count(); ++k) {
          for (int c = 0; c < columns; ++c) {
            double* const sum = to + (c * terms + k) * kLanes<double>;
            store<double>(sum, load(sum) + powers.term(k)[0] * charge[c]);
          }
        }
        to += powers.count() * kLanes<double>;
        if (degree + 1 == task.degrees) break;
        powers.raise_degree(d);
      }
    }
    for (int c = 0; c < columns; ++c) {
      for (int k = 0; k < terms; ++k) {
        task.coefficients[(column + c) * task.pitch + k] =
            horizontal_sum<double>(load(sums + (c * terms + k) * kLanes<double>)) * task.inverse_factorial[k];
      }
    }
  }
}

inline void far_direct(const FarDirect& task) {
  if (task.rows.rest) {
    task.features == 2 ? far_direct_of<2, true>(task) : far_direct_of<3, true>(task);
  } else {
    task.features == 2 ? far_direct_of<2, false>(task) : far_direct_of<3, false>(task);
  }
}
inline void far_expansion(const FarExpansion& task) {
  task.features == 2 ? far_expansion_of<2>(task) : far_expansion_of<3>(task);
}
inline void far_moments(const FarMoments& task) {
  task.features == 2 ? far_moments_of<2>(task) : far_moments_of<3>(task);
}

}  // namespace NWFAST_ISA
}  // namespace nwfast
