// One call of the op on the CPU, and how to read its views into packed arrays.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "../common/problem.h"
#include "../common/softmax_state.h"
#include "dense/kernels.h"

namespace nwfast {

constexpr int kMaxRank = 64;  // of leading dimensions; torch has no tensors of higher rank

using Batch = BatchOf<kMaxRank>;

struct View : ViewOf<kMaxRank> {
  int64_t offset(const Batch& batch, int64_t b) const {
    return batch.rank == 1 ? b * batch_strides[0] : ViewOf<kMaxRank>::offset(batch, b);  // mostly
  }
};

// Of an array without leading dimensions.
template <typename T>
View array_view(const T* data, int64_t row_stride, int64_t column_stride) {
  View view;
  view.data = data;
  view.dtype = sizeof(T) == 4 ? Dtype::kFloat : Dtype::kDouble;
  view.row_stride = row_stride;
  view.column_stride = column_stride;
  return view;
}

using Problem = ProblemOf<View, kMaxRank>;

// Contiguous results of the forward pass, in the arithmetic dtype; tangents may be null.
template <typename T>
struct ForwardResult {
  T *out, *lse;
  double* state;
  T *tangent_w, *tangent_q;
};

// What the backward pass is given beside the problem, and its contiguous results; null where not needed.
template <typename T>
struct BackwardTask {
  View grad_out, grad_lse;  // grad_lse.data may be null
  const T* out;
  const double* state;
  const T *tangent_w, *tangent_q;  // null where not saved
  T *grad_query, *grad_key, *grad_value, *grad_key_weight;
  double* grad_w;  // (batches, features), to be summed over what w was broadcast over
  // (batches, queries, features) what each row adds to that; with several features, where no products serve.
  T* rows_grad_w = nullptr;
};

// A product that is beyond all numbers, or 0, only if it is so in exact arithmetic: the largest factor times the least
// lies between the third and the product.
inline double product_of(double a, double b, double c) {
  if (std::fabs(a) < std::fabs(b)) std::swap(a, b);
  if (std::fabs(a) < std::fabs(c)) std::swap(a, c);
  if (std::fabs(b) < std::fabs(c)) std::swap(b, c);
  return a * c * b;
}

// Asks for large pages where a call will write much: the first touch of every small page costs half a microsecond.
inline void expect_writes(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{1} << 21, kPage = 4096;
  if (bytes < 2 * kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // where it is refused, small pages do
#else
  (void)data, (void)bytes;
#endif
}

// An uninitialised array, aligned for the widest vectors and padded with zeros to a multiple of kPadding.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { allocate(n); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void allocate(int64_t n) {
    const int64_t size = padded(n > 0 ? n : 1);
    if (size > capacity_) {
      std::free(data_);
      data_ = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>((size * sizeof(T) + 63) / 64 * 64)));
      capacity_ = data_ ? size : 0;
      if (!data_) throw std::bad_alloc();
      expect_writes(data_, static_cast<size_t>(size) * sizeof(T));
    }
    for (int64_t i = n; i < size; ++i) data_[i] = T{};
  }
  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(capacity_, other.capacity_);
  }
  T* get() const { return capacity_ ? data_ : nullptr; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

template <typename S, typename T>
void read_as(const void* data, int64_t offset, int64_t n, int64_t stride, T* out) {
  const S* from = static_cast<const S*>(data) + offset;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[i * stride]);
  }
}

template <typename S, typename T>
void gather_as(const void* data, int64_t offset, const uint32_t* places, int64_t n, int64_t stride, T* out) {
  const S* from = static_cast<const S*>(data) + offset;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[places[i] * stride]);
}

// Read n elements of a strided view, the i-th at places[i] * stride, into an array.
template <typename T>
void gather(const View& view, int64_t offset, const uint32_t* places, int64_t n, int64_t stride, T* out) {
  switch (view.dtype) {
    case Dtype::kFloat:
      return gather_as<float>(view.data, offset, places, n, stride, out);
    case Dtype::kDouble:
      return gather_as<double>(view.data, offset, places, n, stride, out);
    case Dtype::kHalf:
      return gather_as<torch::headeronly::Half>(view.data, offset, places, n, stride, out);
    case Dtype::kBFloat16:
      return gather_as<torch::headeronly::BFloat16>(view.data, offset, places, n, stride, out);
  }
}

// Read n elements of a strided view into an array.
template <typename T>
void read(const View& view, int64_t offset, int64_t n, int64_t stride, T* out) {
  switch (view.dtype) {
    case Dtype::kFloat:
      return read_as<float>(view.data, offset, n, stride, out);
    case Dtype::kDouble:
      return read_as<double>(view.data, offset, n, stride, out);
    case Dtype::kHalf:
      return read_as<torch::headeronly::Half>(view.data, offset, n, stride, out);
    case Dtype::kBFloat16:
      return read_as<torch::headeronly::BFloat16>(view.data, offset, n, stride, out);
  }
}

// The finite range of some numbers, to centre values and to keep scaled coordinates within bounds.
struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();
  bool finite = true;

  template <typename T>
  void include(const T* x, int64_t n) {
    typedef T Vec __attribute__((vector_size(16)));  // what every processor has; wider ones compile to scalars
    constexpr int kLanes = 16 / sizeof(T);
    Vec zero = {};  // turns NaN where a number is infinite or NaN
    Vec least = zero + std::numeric_limits<T>::infinity(), most = zero - std::numeric_limits<T>::infinity();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      Vec number;
      std::memcpy(&number, x + i, sizeof number);
      least = number < least ? number : least;
      most = number > most ? number : most;
      zero += number * T(0);
    }
    for (; i < n; ++i) {
      least[0] = x[i] < least[0] ? x[i] : least[0];
      most[0] = x[i] > most[0] ? x[i] : most[0];
      zero[0] += x[i] * T(0);
    }
    for (int lane = 1; lane < kLanes; ++lane) {
      least[0] = least[lane] < least[0] ? least[lane] : least[0];
      most[0] = most[lane] > most[0] ? most[lane] : most[0];
      zero[0] += zero[lane];
    }
    if (zero[0] == 0) {
      low = least[0] < low ? least[0] : low;
      high = most[0] > high ? most[0] : high;
      return;
    }
    finite = false;
    for (i = 0; i < n; ++i) {
      if (!std::isfinite(x[i])) continue;
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
  }
  double magnitude() const { return high < low ? 0 : std::fmax(std::fabs(low), std::fabs(high)); }
  // What to subtract from values before they are summed. It makes sums of constants exact and gradients accurate, and
  // is itself exact: numbers within a factor of two of each other have no rounding error in their difference.
  double centre() const {
    const double least = std::fmin(std::fabs(low), std::fabs(high));
    return finite && low * high > 0 && 3 * least >= magnitude() ? low / 2 + high / 2 : 0;
  }
};

}  // namespace nwfast
