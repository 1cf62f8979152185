// What the kernels use of the device: one function for each instruction, and the launch. Tests replace this file's
// second half with an emulation of a GPU on the CPU (NWFAST_EMULATED names its header), and run the kernels as they
// are.

#pragma once

#include <cstdint>

#include "../common/exp2.h"
#include "../common/softmax_state.h"

#ifdef NWFAST_EMULATED
#include NWFAST_EMULATED
#else

#include <cuda_runtime.h>

namespace nwfast {

using Stream = cudaStream_t;

// The dynamic shared memory of a block, the only kind that the kernels use.
#define NWFAST_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, Stream stream, A... arguments) {
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
}

// 2^x to two units of the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * b + c, rounded down.
__device__ __forceinline__ float multiply_add_down(float a, float b, float c) { return __fmaf_rd(a, b, c); }

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Two floats as halves in one register, the first in the low half.
template <bool kBFloat16>
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t bits;
  if (kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

// The tensor cores' D += A B with A (16, 16), B (16, 8) of halves and D (16, 8) of floats, spread over a warp.
template <bool kBFloat16>
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8 x 8 matrices of halves from shared memory, transposed: lane l gives the address of row l % 8 of matrix l / 8,
// and gets of each the fragment that multiply_fragments wants of B.
__device__ __forceinline__ void load_transposed(uint32_t (&fragments)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(address)
               : "memory");
}

// Copies from global to shared memory that run beside the computation, until wait_copies<n> leaves at most n groups.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(kBytes) : "memory");
  }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace nwfast

#endif

namespace nwfast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_number() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_number() { return static_cast<int>(threadIdx.x) / kWarp; }

// The sum over a warp, the same bits in every lane.
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The least and the greatest over a warp, in every lane.
__device__ __forceinline__ void warp_bounds(float& low, float& high) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, step));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
  }
}

}  // namespace nwfast
