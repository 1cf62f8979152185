// The vectorised kernels, one table for each instruction set, and the plain structures that they take.
//
// All of them compute sums over packed arrays (contiguous, one dtype, scaled); reading strided tensors, ordering,
// windows, and turning sums into outputs and gradients is the drivers' work (single.cpp, tiled.h), which is
// compiled once for every processor. Scores are in base 2: a weight is 2^score.

#pragma once

#include <cstdint>

namespace nwfast {

constexpr int64_t kPadding = 16;  // packed arrays are padded to a multiple of the widest vector
inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// One feature, one channel ------------------------------------------------------------------------------------------

constexpr int64_t kRowBlock = 64;     // queries that share a window of keys
constexpr double kRelativeFrom = 16;  // beyond this score of the nearest key, scores are taken relative to that key

enum SingleSum { kTotal, kValue, kScoreTotal, kScoreValue, kOffsetTotal, kOffsetValue, kSingleSums };

// For up to kRowBlock queries x_i and the keys k_j of a window, with t_ij the score and charges A_j, B_j:
//   sum_j 2^t A, sum_j 2^t B, and, if asked for, the same two with factors t_ij and the offset (x_i - k_j) * scale.
// t_ij = -((x_i - k_j) * scale)^2, or relative to the row's nearest key k*_i where that is far:
// t_ij = -(k* - k_j)(2 x_i - k* - k_j) * scale^2, with offset (k* - k_j) * scale.
template <typename T>
struct SingleRows {
  const T* key;           // (n), padded
  const T* total_charge;  // A (n), padded, or null for all 1
  const T* value_charge;  // B (n), padded
  int64_t n;
  int64_t window_begin, window_end;
  T scale;
  bool wide;  // products with scale may overflow (in double alone): every row is taken relative to its nearest key
  int64_t rows;
  const T* query;           // (rows)
  const T* nearest;         // k* (rows)
  const int64_t* excluded;  // (rows) place of the key left out, or null
  bool scores, offsets;     // whether kScore* and kOffset* are wanted
  double* sums;             // (rows, kSingleSums)
  double* shift;            // (rows) the score of k* that t is relative to, negated: 0, or >= 0 where far
};

// For the keys [key_begin, key_end) over all rows of all blocks whose windows meet them, with e_ij = 2^t_ij and
// u_ij = value_grad_i (v_j - mean_i) + lse_grad_i:
//   sum_i e value_grad_i,   sum_i e u,   sum_i e u (x_i - k_j)
// Where a key is so much nearer to a row than k* that e overflows (it has no weight), its sums are not finite.
template <typename T>
struct SingleKeys {
  const T* key;    // (n), padded
  const T* value;  // (n), padded
  int64_t n, key_begin, key_end;
  T scale;
  bool wide;  // as above; rows with a shift of 0 have their query for k*
  int64_t rows;
  const T* query;                               // (rows)
  const uint8_t* skipped;                       // (rows) those that add nothing, whatever they hold, or null
  const T* nearest;                             // (rows)
  const double* shift;                          // (rows)
  const T* value_grad;                          // (rows)
  const T* mean;                                // (rows) the outputs
  const T* lse_grad;                            // (rows)
  const int64_t* excluded;                      // (rows) or null
  const int64_t* windows;                       // (ceil(rows / kRowBlock), 2)
  double *sum_value, *sum_weight, *sum_offset;  // (key_end - key_begin) each
};

// Any number of features and channels ------------------------------------------------------------------------------

constexpr int64_t kTiledRows = 4;   // queries in flight
constexpr int64_t kTileKeys = 512;  // keys whose scores are held at once
constexpr int64_t kKeyTile = 64;    // keys that a key-side tile owns
constexpr int64_t kMaxColumns = 8;  // up to so many channels, value is packed by channel for the forward pass

// Packed keys and values of one batch element. Scores are t_ij = -score_scale sum_f ((x_if - k_jf) * feature_scale_f)^2
// + log_weight_j.
template <typename T>
struct TiledData {
  int64_t n, features, channels;
  int64_t pitch;           // padded n: the distance between features in key and channels in value_columns
  int64_t channel_pitch;   // channels, padded where they are many: the distance between keys in value_rows
  const T* key;            // (features, pitch)
  const T* value_columns;  // (channels, pitch), or null where only value_rows is needed
  const T* value_rows;     // (n, channel_pitch), or null
  const T* log_weight;     // (pitch), base 2, or null for all 0
  const T* feature_scale;  // (features), or null for all 1
  T score_scale;
};

// Forward: for each row sum_j 2^(t_ij + shift_i) and the same with each channel of value; shift_i = -max_j t_ij.
template <typename T>
struct TiledRows {
  TiledData<T> data;
  int64_t rows;
  const T* query;           // (rows, features)
  const int64_t* excluded;  // (rows) or null
  double* total;            // (rows)
  double* shift;            // (rows)
  double* values;           // (rows, channels)
};

// Query side of the backward pass: with p_ij = 2^(t_ij + shift_i) * inverse_total_i and
// u_ij = p_ij (<value_grad_i, v_j> - offset_grad_i + lse_grad_i), for each row and feature:
//   sum_j u (x_if - k_jf),   sum_j u (x_if - k_jf)^2
template <typename T>
struct TiledQueryGrad {
  TiledData<T> data;
  int64_t rows;
  const T* query;
  const int64_t* excluded;
  const double* shift;
  const T *inverse_total, *offset_grad, *lse_grad;  // (rows)
  const T* value_grad;                              // (rows, channel_pitch)
  double *first, *second;                           // (rows, features) each
};

// Key side: for the keys [key_begin, key_end), at most kKeyTile of them, over all rows:
//   sum_i p value_grad_i (per channel),   sum_i u,   sum_i u (x_if - k_jf) (per feature)
// Where a key is so much nearer to a row than its shift says that p overflows (it has no weight), its sums are not
// finite.
template <typename T>
struct TiledKeyGrad {
  TiledData<T> data;
  int64_t key_begin, key_end;
  int64_t rows;
  const T* query;
  const int64_t* excluded;
  const double* shift;
  const T *inverse_total, *offset_grad, *lse_grad;
  const T* value_grad;
  double* sum_value;   // (keys of the tile, channels)
  double* sum_weight;  // (keys of the tile)
  double* sum_offset;  // (keys of the tile, features)
};

// Which of the points or boxes j in [begin, end) may have a score of at least `limit` with any of a block of others
// (skipping/boxes.h): with gap_jf the distance between the intervals of j and of the block,
//   max(charge_j, reach_j - least) - sum_f (gap_jf * feature_scale_f)^2 >= limit, or NaN.
// Ascending; places and bounds have room for all and one more.
template <typename T>
struct Selection {
  int64_t features, pitch;
  const T *low, *high;      // (features, pitch): the same array for points
  const T *charge, *reach;  // (pitch), each or null for all 0 and for nothing
  const T* feature_scale;   // (features)
  const T *block_low, *block_high;
  T limit, least;
  int64_t begin, end;
  uint32_t* places;
  T* bounds;  // the left side, or null
};

template <typename T>
struct Kernels {
  void (*single_nearest)(const SingleRows<T>&, T* nearest);
  void (*single_rows)(const SingleRows<T>&);
  void (*single_keys)(const SingleKeys<T>&);
  void (*tiled_rows)(const TiledRows<T>&);
  void (*tiled_query_grad)(const TiledQueryGrad<T>&);
  void (*tiled_key_grad)(const TiledKeyGrad<T>&);
  int64_t (*select_near)(const Selection<T>&);  // returns how many
};

// The table for the best instruction set that this processor has.
template <typename T>
const Kernels<T>& kernels();

}  // namespace nwfast
