// Functions that both the CPU's compiler and nvcc's device compiler see.

#pragma once

#ifdef __CUDACC__
#define NWFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NWFAST_HOST_DEVICE inline __attribute__((always_inline))
#endif
