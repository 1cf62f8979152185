// The vectorised kernels of the linear method (plan.h): one table for each instruction set, and the plain
// structures that they take. Coordinates are read as T, arithmetic is in double unless said. A point of a box has the
// local coordinate (x - centre) * scale, within [-1, 1].

#pragma once

#include "../../../common/host_device.h"
#include "../../dense/kernels.h"

namespace nwfast {

// Adds to the power moments of a box, sum_j charge_j t_j^n for n < terms, for each column of charges.
template <typename T>
struct MomentsTask {
  const T* x;
  int64_t n;
  double centre, scale;
  const double* charge;  // (columns, pitch)
  int64_t pitch;
  int columns;
  bool unit;  // the charges of column 0 are all 1 (and not read)
  int terms;
  double* moments;  // (columns, terms)
};

constexpr int kMostTerms = 24;     // of an expansion
constexpr double kNearAlways = 3;  // bandwidths from the nearest key up to which rounded differences do (windows.h)

// Whether differences of coordinates between these are exact, so that scores are exact enough in T (windows.h).
template <typename T>
NWFAST_HOST_DEVICE bool exact_differences(T bottom, T top) {
  return (bottom > 0 && top <= 2 * bottom) || (top < 0 && bottom >= 2 * top);
}

// Adds to the local expansion of a box what boxes below and above it send, for each column. Boxes that lie equally far
// on either side share a matrix K: from above the entry for terms n and m is sign (-1)^(n + m) K[n][m], so that even
// m take K[n][m] (below_n + s above_n) and odd m K[n][m] (below_n - s above_n), s = sign (-1)^n.
struct TranslateTask {
  int terms, pitch;  // matrices are (terms of the source, pitch of the target); terms is a multiple of 4
  int columns;
  double sign;  // 1 for an even kernel, -1 for an odd one
  int64_t pairs;
  const double* const* matrix;                // (pairs)
  const double *const *below, *const *above;  // (pairs), moments (columns, terms) each
  double* local;                              // (columns, pitch)
};

// Power series at the points of a box: sum_m local_m s_i^m.
template <typename T>
struct EvaluateTask {
  const T* x;
  int64_t n;
  double centre, scale;
  const double* local;  // (series, pitch)
  int series, terms, pitch;
  double* sums;  // (series, sums_pitch), padded
  int64_t sums_pitch;
};

// For each target x_i, over the sources u_j, with reference r_i and z = (r_i - u_j)(2 x_i - u_j - r_i), which is
// (x_i - u_j)^2 - (x_i - r_i)^2: sum_j charge_j exp(-scale^2 z / 2), and, if asked for, the same with factors
// (r_i - u_j) and z. With r_i = x_i these are plain distances.
template <typename T>
struct DirectTask {
  const T* target;
  const double* reference;
  const int64_t* excluded;  // (targets) place among the sources that is left out, or null
  int64_t targets;
  const T* source;
  int64_t sources;
  const double* charge;  // (columns, pitch)
  int64_t pitch;
  int columns;
  double scale;
  bool offsets, scores;
  double* sums;  // (1 + offsets + scores, columns, sums_pitch), padded
  int64_t sums_pitch;
};

// The same sums for ascending rows with few keys in their windows, in T, of one channel. The rows of a vector are taken
// together, or singly where more than `spread` keys lie between them, until a window holds more than `most` (or
// `most_alone`) keys, or T is not precise enough.
template <typename T>
struct NearTask {
  const T* x;
  int64_t rows, first_row;  // the number of x[0] among all rows
  const T* key;             // ascending
  int64_t keys, place;      // key[i] < x[0] for i < place
  const T* value;
  int64_t value_stride;
  T centre;
  const T* weight;  // null where all are 1
  T weight_factor;
  bool exclude;
  const int64_t* excluded;  // (rows) places of the excluded keys; null where row i leaves out key i
  double scale, log_span, near_span, level_zero;
  int64_t most, most_alone, spread, few;
  bool offsets, scores;
  double *sums, *apart;  // as in DirectTask, padded; x - r
  int64_t sums_pitch;
};

// The transpose: for each target u_j, over sources x_i with references r_i and the same z:
// sum_i charge_i exp(-scale^2 z / 2), and, if asked for, the same with factor (x_i - u_j).
template <typename T>
struct GatherTask {
  const T* target;
  int64_t targets;
  const double *source, *reference;
  int64_t sources;
  const double* charge;  // (columns, pitch)
  int64_t pitch;
  int columns;
  double scale;
  bool offsets;
  double* sums;  // (1 + offsets, columns, sums_pitch), padded; added to
  int64_t sums_pitch;
};

// The same for the gradients of keys, with e = exp(-scale^2 z / 2) and u = <grad_i, value_j - mean_i> + lse_grad_i:
// sum_i e grad_i for each channel, sum_i e u, and, if asked for, sum_i e u (x_i - u_j). Differences are taken first: a
// row whose output is the value of its nearest key adds exactly nothing.
template <typename T>
struct PullTask {
  const T* target;
  int64_t targets;
  const double* value;  // (channels, value_pitch)
  int64_t value_pitch;
  const double *source, *reference;
  const int64_t* excluded;  // (sources) place of the target that a source leaves out, or null
  int64_t sources;
  const double *grad, *mean;  // (channels, pitch)
  const double* lse_grad;     // (sources)
  int64_t pitch;
  int channels;
  double scale;
  bool offsets;
  double* sums;  // (channels + 1 + offsets, sums_pitch), padded; added to
  int64_t sums_pitch;
};

constexpr int64_t kNearTargets = 8;

// The same for one channel with few sources around each target, in T, written and not added. Each kNearTargets targets
// have a range of sources.
template <typename T>
struct NearPullTask {
  const T* target;
  int64_t targets;
  const T* value;
  int64_t value_stride;
  T centre;
  const T *source, *reference;
  const int64_t* excluded;  // (sources) place of the target that a source leaves out, or null
  int64_t first_target;     // place of the first target
  const T *grad, *mean, *lse_grad;
  const int64_t* ranges;  // (targets / kNearTargets, 2)
  double scale;
  bool offsets;
  double* sums;  // (2 + offsets, sums_pitch), padded
  int64_t sums_pitch;
};

// Results of rows of one channel from their sums (DirectTask): with total S_0 and value S_1,
//   out = centre + S_1 / S_0, within [low, high],   lse = log(unit S_0) - (w apart)^2 / 2,
//   state = ((w apart)^2 log2(e) / 2, unit S_0),   tangents as asked for. A row with S_0 = 0 gets NaN, -infinity, 0.
template <typename T>
struct FinishTask {
  int64_t rows;
  const double *total, *value;
  const double *offset_total, *offset_value, *score_total, *score_value;  // null where there is no tangent
  const double* apart;                                                    // (rows) x - r, or null for all 0
  double centre, low, high, unit, w;
  T *out, *lse, *tangent_w, *tangent_q;  // may be null, but for out
  double* state;                         // (rows, 2), may be null
};

template <typename T>
struct LinearKernels {
  void (*moments)(const MomentsTask<T>&);
  void (*translate)(const TranslateTask&);
  void (*evaluate)(const EvaluateTask<T>&);
  void (*direct)(const DirectTask<T>&);
  int64_t (*near)(const NearTask<T>&);  // returns how many rows it summed
  void (*gather)(const GatherTask<T>&);
  void (*pull)(const PullTask<T>&);
  void (*near_pull)(const NearPullTask<T>&);
  void (*finish)(const FinishTask<T>&);
};

// The table for the best instruction set that this processor has.
template <typename T>
const LinearKernels<T>& linear_kernels();

}  // namespace nwfast
