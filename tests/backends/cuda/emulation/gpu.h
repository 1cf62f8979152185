// A GPU emulated on the CPU, in place of the CUDA half of csrc/cuda/intrinsics.cuh: the kernels' own sources compile
// with the CPU's compiler and run as they are.
//
// Each CUDA thread is a fiber with a stack of its own. Blocks run one after the other; the fibers of a block run in
// turn, each up to its next barrier, shuffle or vote, warps and lanes forwards in one block and backwards in the next,
// so that a missing barrier shows. What it checks beyond the results:
//
// * shared memory starts as NaN, and so does the target of an asynchronous copy, which lands only at the wait;
// * barriers and warp operations that not all threads reach, or reach in different places, end the process;
// * sizes of launches, alignment of copies, copies that nobody waited for.
//
// Built with AddressSanitizer it also finds every access outside an array, global or shared.

#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define NWFAST_SHARED(name) unsigned char* const name = nwfast::emulation::shared_memory()

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace nwfast {

using Stream = void*;

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The state of the thread that runs now; blockIdx and the like are defined from it.
struct Position {
  Index thread, block, block_size, grid_size;
};
extern Position position;

unsigned char* shared_memory();
void block_barrier();

// All lanes of the warp give `bytes` bytes (at most 64), and get those of all lanes, 64 bytes apart. `operation` names
// what they do, and must be the same for all.
const unsigned char* exchange(const char* operation, const void* mine, size_t bytes);

void start_copy(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int groups);

void run(const std::function<void()>& kernel, int64_t blocks, int threads, size_t shared_bytes);
void allow_shared(size_t bytes);

template <typename T>
T from_lane(const char* operation, T mine, int lane) {
  static_assert(sizeof(T) <= 64);
  T theirs;
  memcpy(&theirs, exchange(operation, &mine, sizeof mine) + 64 * lane, sizeof theirs);
  return theirs;
}

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

}  // namespace emulation

inline int emulated_multiprocessors() {
  const char* const asked = getenv("NWFAST_EMULATED_MULTIPROCESSORS");
  return asked ? atoi(asked) : 2;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, Stream, A... arguments) {
  emulation::run([&] { kernel(arguments...); }, blocks, threads, shared_bytes);
}
template <typename... P>
void allow_shared(void (*)(P...), size_t bytes) {
  emulation::allow_shared(bytes);
}

// The approximation of the exponential unit: off by a unit of the last place, pseudo-randomly, except at integers.
inline float exp2_approximate(float x) {
  if (!(x >= -126)) return x < -126 ? 0.0f : x;
  float y = exp2f(x);
  if (x != floorf(x) && y < 0x1p120f) {
    uint32_t bits, input;
    memcpy(&bits, &y, sizeof bits);
    memcpy(&input, &x, sizeof input);
    bits += static_cast<uint32_t>(input * 2654435761u >> 31) * 2 - 1;
    memcpy(&y, &bits, sizeof y);
  }
  return y;
}

inline float multiply_add_down(float a, float b, float c) {
  const double exact = static_cast<double>(a) * b + c;  // the product is exact, the sum is within its rounding
  float y = static_cast<float>(exact);
  if (y > exact) y = nextafterf(y, -INFINITY);
  return y;
}

inline float half_to_float(uint16_t bits) { return emulation::half_to_float(bits); }
inline uint16_t float_to_half(float x) { return emulation::float_to_half(x); }

template <bool kBFloat16>
uint32_t pack_halves(float low, float high) {
  const auto convert = kBFloat16 ? emulation::float_to_bfloat16 : emulation::float_to_half;
  return convert(low) | static_cast<uint32_t>(convert(high)) << 16;
}

template <bool kBFloat16>
float emulated_element(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair & 0xffff);
  if (!kBFloat16) return emulation::half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

// D += A B on the fragments of mma.m16n8k16, as the PTX manual lays them out.
template <bool kBFloat16>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  Fragments all[32];
  const unsigned char* const lanes = emulation::exchange("mma", &mine, sizeof mine);
  for (int lane = 0; lane < 32; ++lane) memcpy(&all[lane], lanes + 64 * lane, sizeof mine);
  const int lane = static_cast<int>(emulation::position.thread.x % 32), group = lane / 4, pair = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = pair * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;  // the pair of k within its half of 8
      const float left = emulated_element<kBFloat16>(all[row % 8 * 4 + holder].a[row / 8 + k / 8 * 2], k % 2);
      const float right = emulated_element<kBFloat16>(all[column * 4 + holder].b[k / 8], k % 2);
      d[i] += left * right;
    }
  }
}

inline void load_transposed(uint32_t (&fragments)[4], const void* row) {
  const unsigned char* const lanes = emulation::exchange("ldmatrix", row, 16);
  const int lane = static_cast<int>(emulation::position.thread.x % 32), group = lane / 4, pair = lane % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[2];
    for (int i = 0; i < 2; ++i) {
      memcpy(&elements[i], lanes + 64 * (matrix * 8 + pair * 2 + i) + 2 * group, sizeof elements[i]);
    }
    fragments[matrix] = elements[0] | static_cast<uint32_t>(elements[1]) << 16;
  }
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  emulation::start_copy(shared, global, kBytes);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kGroups>
void wait_copies() {
  emulation::wait_copies(kGroups);
}

}  // namespace nwfast

#define threadIdx (nwfast::emulation::position.thread)
#define blockIdx (nwfast::emulation::position.block)
#define blockDim (nwfast::emulation::position.block_size)
#define gridDim (nwfast::emulation::position.grid_size)

inline void __syncthreads() { nwfast::emulation::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { nwfast::emulation::exchange("syncwarp", "", 1); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return nwfast::emulation::from_lane("shuffle", x, static_cast<int>(nwfast::emulation::position.thread.x % 32) ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return nwfast::emulation::from_lane("shuffle", x, lane);
}
inline unsigned __ballot_sync(unsigned, int vote) {
  const unsigned char mine = vote != 0;
  const unsigned char* const lanes = nwfast::emulation::exchange("vote", &mine, 1);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(lanes[64 * lane]) << lane;
  return votes;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
