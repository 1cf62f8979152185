// From tensors to kernels and back, for one dtype of arithmetic.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "problem.h"

namespace nwfast {

// body(i) for each block, by whichever thread comes first: blocks own their results, so the order does not matter.
template <typename Body>
void parallel_blocks(int64_t blocks, bool serial, const Body& body) {
  if (serial || blocks <= 1) {
    for (int64_t i = 0; i < blocks; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < blocks; i = next++) body(i);
    } catch (...) {  // must not cross the C interface
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Below so many pairs a second thread costs more than it does.
constexpr double kSerialPairs = 65536;

// One feature, one channel (scalar.cpp).
template <typename T>
void scalar_forward(const Problem& problem, const ForwardResult<T>& result);
template <typename T>
void scalar_query_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>
void scalar_key_backward(const Problem& problem, const BackwardTask<T>& task);

// Any number of both (tiled.cpp).
template <typename T>
void tiled_forward(const Problem& problem, const ForwardResult<T>& result);
template <typename T>
void tiled_query_backward(const Problem& problem, const BackwardTask<T>& task);
template <typename T>
void tiled_key_backward(const Problem& problem, const BackwardTask<T>& task);

}  // namespace nwfast
