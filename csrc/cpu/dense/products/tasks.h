// What the kernels of many features (kernels.h) take: plain arrays, in panels of kPanel numbers.

#pragma once

#include <cstdint>

namespace nwfast {

constexpr int64_t kPanel = 16;          // numbers of a panel: one of the widest vectors
constexpr int64_t kPanelsTogether = 2;  // of keys, whose number is a multiple: kernels may read so many at once
constexpr int64_t kProductRows = 48;    // rows that share a tile of keys
constexpr int64_t kProductKeys = 96;    // keys of a tile
constexpr int64_t kProductDepth = 32;   // features whose products are added up in float
constexpr int64_t kRowPadding = 12;     // rows that may be read beyond the last

// One batch element. Coordinates are about a centre, in units of the score: t_ij = charge_j - constant_i + 2 x_i.u_j,
// where most charges are near 0.
struct ProductData {
  int64_t n, features, channels, pitch;
  const float* key_lanes;      // (panels of keys, features, kPanel)
  const float* key_charge;     // (panels of keys, kPanel); -infinity beyond n
  const float* key_columns;    // (panels of features, n, kPanel): backward
  const float* value_columns;  // (channels, pitch): forward with few channels, or null
  const float* value_panels;   // (panels of channels, n, kPanel): forward with more
  const float* value_lanes;    // (panels of keys, channels, kPanel): backward
};

// As TiledRows.
struct ProductRows {
  ProductData data;
  int64_t rows;             // at most kProductRows
  const float* query;       // (rows + kRowPadding, features)
  const double* constant;   // (rows)
  const int64_t* excluded;  // (rows) or null
  double *total, *shift;    // (rows)
  double* values;           // (rows, channels)
};

// What the two sides of the backward pass read of rows: p_ij = 2^(t_ij + shift_i) inverse_total_i and u_ij = p_ij
// (<value_grad_i, v_j> - offset_grad_i + lse_grad_i).
struct ProductGradRows {
  ProductData data;
  int64_t rows;
  const float* query;       // (rows + kRowPadding, features)
  const int64_t* excluded;  // (rows) or null
  const float* top;         // (rows) constant_i - shift_i
  const float *inverse_total, *offset_grad, *lse_grad;
  const float* value_grad;  // (rows + kRowPadding, value_pitch)
  int64_t value_pitch;
};

// For the keys [key_begin, key_end), at most kProductKeys, over all rows, beside what is there:
//   sum_i p value_grad_i (per channel),   sum_i u,   sum_i u x_if (per feature)
// and the u_ij themselves. All but sum_weight may be null.
struct ProductKeyGrad : ProductGradRows {
  int64_t key_begin, key_end;
  int64_t column_rows;         // rows of a panel of the following two
  const float* query_columns;  // (panels of features, column_rows, kPanel)
  const float* grad_columns;   // (panels of channels, column_rows, kPanel): of value_grad
  double *sum_value, *sum_weight, *sum_offset;
  float* pulls;  // (rows + kRowPadding, pulls_pitch)
  int64_t pulls_pitch;
};

// For some rows, from their u_ij over all keys: sum_j u and sum_j u u_jf.
struct ProductQueryGrad {
  ProductData data;
  int64_t rows;
  const float* pulls;
  int64_t pulls_pitch;
  double *total, *moment;  // (rows), (rows, features)
};

struct ProductKernels {
  void (*rows)(const ProductRows&);
  void (*key_grad)(const ProductKeyGrad&);
  void (*query_grad)(const ProductQueryGrad&);
};
const ProductKernels& product_kernels();

}  // namespace nwfast
