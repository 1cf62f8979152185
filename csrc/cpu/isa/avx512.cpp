// The kernels for processors with AVX512. The target pragma follows the system headers: inline functions from there
// must stay runnable everywhere, since the linker keeps one copy of each for all sources.

#include "levels.h"

#ifdef NWFAST_X86

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef NWFAST_EMULATED_AVX512
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"
#include "emulated_avx512.h"
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define NWFAST_ISA avx512
#define NWFAST_LEVEL 512
#include "tables.h"

#endif
