// Threads are torch's: this file alone takes them from it, which spares the other units its headers.

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "drivers.h"

namespace nwfast {

void run_blocks(int64_t blocks, bool serial, void (*call)(const void* body, int64_t i), const void* body) {
  if (serial || blocks <= 1) {
    for (int64_t i = 0; i < blocks; ++i) call(body, i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  torch::stable::parallel_for(0, thread_count(), 1, [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < blocks; i = next++) call(body, i);
    } catch (...) {  // must not cross the C interface
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace nwfast
