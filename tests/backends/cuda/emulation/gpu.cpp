// The fibers and the scheduler behind gpu.h.

#include "gpu.h"

#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace nwfast {
namespace emulation {

Position position;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kLargestShared = 227 << 10, kUsualShared = 48 << 10;
constexpr int kLanes = 32;

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "emulated GPU: block %u, thread %u: %s\n", position.block.x, position.thread.x, what.c_str());
  fflush(stderr);
  abort();
}

#if defined(__x86_64__)

// Saves the registers that a call preserves, and changes to the other stack.
extern "C" void nwfast_switch(void** save, void* to);
asm(R"(
.text
.globl nwfast_switch
.hidden nwfast_switch
nwfast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(unsigned char* stack, size_t size, void (*entry)()) {
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15};
    void** slots = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and a return address never used
    std::fill(slots, slots + 8, nullptr);
    slots[6] = reinterpret_cast<void*>(entry);
    stack_pointer = slots;
  }
  static void change(Context& from, Context& to) { nwfast_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;
  void prepare(unsigned char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
  Context context;
  std::vector<unsigned char> stack;
  State state;
  uint64_t generation;  // of the warp's operation that it waits for
  std::vector<Copy> copies;
  int groups;
};

struct Warp {
  unsigned char slots[2][kLanes * 64];
  uint64_t generation;
  uint32_t arrived;
  const char* operation;
};

std::mutex one_launch;  // autograd has threads of its own
std::vector<Thread> threads;
std::vector<Warp> warps;
Context scheduler;
int running;
const std::function<void()>* body;
unsigned char* shared = nullptr;
size_t shared_limit = kUsualShared;

Thread& self() { return threads[running]; }

void yield() {
  Context::change(self().context, scheduler);
  position.thread.x = static_cast<unsigned>(running);
}

void enter() {
  position.thread.x = static_cast<unsigned>(running);
  (*body)();
  if (!self().copies.empty()) fail("ends with copies that it did not wait for");
  self().state = State::kDone;
  yield();
  fail("resumed after its end");
}

// Runs the lanes of one warp until none can go on; whether any did.
bool run_warp(int warp, bool backwards) {
  bool progress = false, again = true;
  while (again) {
    again = false;
    for (int i = 0; i < kLanes; ++i) {
      const int lane = backwards ? kLanes - 1 - i : i, thread = warp * kLanes + lane;
      Thread& t = threads[thread];
      if (t.state == State::kAtWarp && warps[warp].generation > t.generation) t.state = State::kReady;
      if (t.state != State::kReady) continue;
      running = thread;
      Context::change(scheduler, t.context);
      again = progress = true;
    }
  }
  return progress;
}

void run_block(int count, bool backwards) {
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    if (t.stack.empty()) t.stack.resize(kStack);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.stack.data(), kStack);  // of frames that the thread before it never left
#endif
    t.context.prepare(t.stack.data(), kStack, enter);
    t.state = State::kReady;
    t.copies.clear();
    t.groups = 0;
  }
  const int warp_count = count / kLanes;
  for (int w = 0; w < warp_count; ++w) {
    warps[w].generation = 0;
    warps[w].arrived = 0;
  }
  for (;;) {
    bool progress = false;
    for (int w = 0; w < warp_count; ++w) progress |= run_warp(backwards ? warp_count - 1 - w : w, backwards);
    int waiting = 0, done = 0;
    for (int i = 0; i < count; ++i) {
      waiting += threads[i].state == State::kAtBlock;
      done += threads[i].state == State::kDone;
    }
    if (done == count) return;
    if (waiting > 0 && waiting + done == count) {
      for (int i = 0; i < count; ++i) {
        if (threads[i].state == State::kAtBlock) threads[i].state = State::kReady;
      }
    } else if (!progress) {
      for (int i = 0; i < count; ++i) {
        if (threads[i].state != State::kAtWarp) continue;
        position.thread.x = static_cast<unsigned>(i);
        fail(std::string("waits for the other lanes at ") + warps[i / kLanes].operation);
      }
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return shared; }

void block_barrier() {
  self().state = State::kAtBlock;
  yield();
}

const unsigned char* exchange(const char* operation, const void* mine, size_t bytes) {
  Warp& warp = warps[running / kLanes];
  const int lane = running % kLanes;
  unsigned char* const slots = warp.slots[warp.generation % 2];
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation && strcmp(warp.operation, operation) != 0) {
    fail(std::string("is at ") + operation + " while other lanes are at " + warp.operation);
  }
  memcpy(slots + 64 * lane, mine, bytes);
  warp.arrived |= uint32_t{1} << lane;
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    self().state = State::kAtWarp;
    self().generation = warp.generation;
    yield();
  }
  return slots;
}

void start_copy(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("starts a copy of " + std::to_string(bytes) + " bytes that is not aligned");
  }
  memset(to, 0xff, bytes);  // NaN
  self().copies.push_back({to, from, bytes, self().groups});
}

void commit_copies() { ++self().groups; }

void wait_copies(int groups) {
  std::vector<Copy>& copies = self().copies;
  const auto done = [&](const Copy& copy) { return copy.group < self().groups - groups; };
  for (const Copy& copy : copies) {
    if (done(copy)) memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), done), copies.end());
}

void allow_shared(size_t bytes) { shared_limit = std::max(kUsualShared, bytes); }

void run(const std::function<void()>& kernel, int64_t blocks, int count, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t limit = std::exchange(shared_limit, kUsualShared);
  if (blocks < 1 || blocks > 0x7fffffff || count < kLanes || count > 1024 || count % kLanes || shared_bytes > limit ||
      limit > kLargestShared) {
    throw std::runtime_error("emulated GPU: cannot launch " + std::to_string(blocks) + " blocks of " +
                             std::to_string(count) + " threads with " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
  if (threads.size() < static_cast<size_t>(count)) threads.resize(count);
  if (warps.size() < static_cast<size_t>(count / kLanes)) warps.resize(count / kLanes);
  body = &kernel;
  position.block_size = {static_cast<unsigned>(count), 1, 1};
  position.grid_size = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t block = 0; block < blocks; ++block) {
    position.block = {static_cast<unsigned>(block), 0, 0};
    // Of exactly this size, so that a sanitizer sees what lies beyond.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes) != 0) throw std::bad_alloc();
    shared = static_cast<unsigned char*>(memory);
    memset(shared, 0xff, shared_bytes);
    run_block(count, block % 2 == 1);
    free(memory);
  }
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float x;
  if (exponent == 31) {
    x = mantissa ? NAN : INFINITY;
  } else {
    x = exponent ? ldexpf(static_cast<float>(1024 + mantissa), static_cast<int>(exponent) - 25)
                 : ldexpf(static_cast<float>(mantissa), -24);
  }
  return sign ? -x : x;
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = fabsf(x);
  if (isnan(x)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(nearbyintf(size * 0x1p24f));
  int exponent;
  const float mantissa = frexpf(size, &exponent);  // in [1/2, 1)
  const int rounded = static_cast<int>(nearbyintf(mantissa * 2048));
  return sign | static_cast<uint16_t>((exponent + 13) * 1024 + rounded);
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (isnan(x)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation
}  // namespace nwfast
