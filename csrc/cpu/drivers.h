// From tensors to kernels and back, for one dtype of arithmetic.

#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace nwfast {

// Calls `call(body, i)` for each block, by whichever thread comes first: blocks own their results, so the order does
// not matter.
void run_blocks(int64_t blocks, bool serial, void (*call)(const void* body, int64_t i), const void* body);
int64_t thread_count();

// body(i) for each block. Bodies are long, and each is compiled once, whether one thread runs it or many.
template <typename Body>
void parallel_blocks(int64_t blocks, bool serial, const Body& body) {
  run_blocks(blocks, serial, [](const void* it, int64_t i) { (*static_cast<const Body*>(it))(i); }, &body);
}

// Below so many pairs a second thread costs more than it does. Nothing to do with kChoicePairs, of the same size.
constexpr double kSerialPairs = 65536;

// One feature, one channel (dense/single.cpp).
template <typename T>
void single_forward(const Problem& problem, const ForwardResult<T>& result);
template <typename T>
void single_query_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>
void single_key_backward(const Problem& problem, const BackwardTask<T>& task);

// Any number of both (dense/tiled_forward.cpp, dense/tiled_backward.cpp).
template <typename T>
void tiled_forward(const Problem& problem, const ForwardResult<T>& result);
template <typename T>
void tiled_query_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>
void tiled_key_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>  // the two of them
void tiled_backward(const Problem& problem, const BackwardTask<T>& task);

// One feature, in linear time (linear/drivers.cpp, linear/keys/keys.cpp); false where the dense drivers have to serve:
// coordinates, values or weights that are not finite, or scales beyond what boxes can hold.
template <typename T>
bool linear_forward(const Problem& problem, const ForwardResult<T>& result);
template <typename T>
bool linear_query_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>
bool linear_key_backward(const Problem& problem, const BackwardTask<T>& task);

// The same for two and three features (grid).
namespace grid {
template <typename T>
bool forward(const Problem& problem, const ForwardResult<T>& result);
template <typename T>
bool query_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>
bool key_backward(const Problem& problem, const BackwardTask<T>& task);
// Whether it is expected to be faster than the dense drivers (grid/choose.cpp).
bool is_faster(const Problem& problem);
}  // namespace grid

// Whether that is expected to be faster than the drivers above (choose.cpp).
bool linear_is_faster(const Problem& problem);

// Keys prepared for a fixed w (linear/prepared.cpp): sorted, with the moments of crowded boxes and the matrices between
// boxes. All that a prediction needs, in plain arrays.
template <typename T>
struct PreparedKeys {
  std::vector<T> key, value, weight;  // (keys), (keys, channels), (keys) or empty where all are 1
  std::vector<int64_t> boxes;         // (boxes, 3): number, first key, last key + 1
  std::vector<double> moments, matrices, numbers;
};
template <typename T>
struct PreparedKeysView {
  const T *key, *value, *weight;  // weight may be null
  int64_t keys, channels;
  const int64_t* boxes;
  int64_t box_count;
  const double *moments, *matrices;
  int64_t matrices_size;
  const double* numbers;
  int64_t numbers_size;
};
// False where the dense drivers have to serve.
template <typename T>
bool linear_compress(const Problem& problem, PreparedKeys<T>& prepared);
// out and lse of the result alone.
template <typename T>
bool linear_predict(const PreparedKeysView<T>& prepared, const View& query, int64_t queries,
                    const ForwardResult<T>& result);

}  // namespace nwfast
