// The kernels of the fast Gauss transform for processors with AVX512. The target pragma follows the system headers:
// inline functions from there must stay runnable everywhere, since the linker keeps one copy of each for all sources.

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define NWFAST_ISA avx512
#define NWFAST_LEVEL 512
#include "linear_tables.h"

#endif
