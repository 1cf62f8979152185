// One call of the op as plain data, on any device: strided views of canonical tensors (see
// nwfast/backends/__init__.py). Nothing is expanded: broadcast dimensions have stride 0.

#pragma once

#include <cstdint>

#include "host_device.h"

namespace nwfast {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16 };

enum Needs {
  kNeedQuery = 1,
  kNeedKey = 2,
  kNeedValue = 4,
  kNeedW = 8,
  kNeedKeyWeight = 16
};  // as NEEDS_* in nwfast/backends

// Leading dimensions, at most kMost.
template <int kMost>
struct BatchOf {
  int rank = 0;
  int64_t sizes[kMost];
  int64_t count = 1;
};

// (*B, rows, columns); vectors have one of the two.
template <int kMost>
struct ViewOf {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t batch_strides[kMost];
  int64_t row_stride = 0, column_stride = 0;

  NWFAST_HOST_DEVICE int64_t offset(const BatchOf<kMost>& batch, int64_t b) const {
    int64_t offset = 0;
    for (int dim = batch.rank - 1; dim >= 0; --dim) {
      offset += b % batch.sizes[dim] * batch_strides[dim];
      b /= batch.sizes[dim];
    }
    return offset;
  }
};

template <typename View, int kMost>
struct ProblemOf {
  BatchOf<kMost> batch;
  int64_t queries, keys, features, channels;
  View query, key, value, w, key_weight;  // key_weight.data may be null
  bool exclude_self;
  const int64_t* own = nullptr;  // (queries) keys left out under exclude_self; null: of the rows' numbers

  NWFAST_HOST_DEVICE int64_t own_key(int64_t i) const { return own ? own[i] : i; }
  // One feature and one channel.
  NWFAST_HOST_DEVICE bool single() const { return features == 1 && channels == 1; }
};

}  // namespace nwfast
