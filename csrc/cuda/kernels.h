// The launchers: plain C++ that works out grids and workspace from the problem's shape alone, so that nothing waits for
// the device and a CUDA graph can capture every call. All work goes to the given stream.

#pragma once

#include "problem.cuh"

namespace nwfast {

// What a launcher may know of the device.
struct Device {
  int multiprocessors;
  Stream stream;
};

// Bytes of device memory that a pass needs beside its results.
size_t forward_workspace(const Problem& problem, const Device& device, const ForwardResult& result);
size_t backward_workspace(const Problem& problem, const Device& device, const BackwardTask& task);

void run_forward(const Problem& problem, const Device& device, const ForwardResult& result, void* workspace);
void run_backward(const Problem& problem, const Device& device, const BackwardTask& task, void* workspace);

// Hands out parts of a workspace, or, from null, counts what they need.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename T>
  T* take(int64_t n) {
    T* const part = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (static_cast<size_t>(n > 0 ? n : 1) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  size_t used() const { return used_; }
  bool counting() const { return memory_ == nullptr; }

 private:
  static constexpr size_t kAlignment = 256;
  unsigned char* memory_;
  size_t used_ = 0;
};

inline int64_t blocks_for(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace nwfast
