// The kernels for processors with AVX2. The target pragma follows the system headers: inline functions from there
// must stay runnable everywhere, since the linker keeps one copy of each for all sources.

#include "levels.h"

#ifdef NWFAST_X86

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#pragma GCC target("avx2,fma")
#define NWFAST_ISA avx2
#define NWFAST_LEVEL 256
#include "tables.h"

#endif
