// The kernels of the fast Gauss transform for processors with AVX2. The target pragma follows the system headers:
// inline functions from there must stay runnable everywhere, since the linker keeps one copy of each for all sources.

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#pragma GCC target("avx2,fma")
#define NWFAST_ISA avx2
#define NWFAST_LEVEL 256
#include "linear_tables.h"

#endif
