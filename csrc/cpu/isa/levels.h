// NWFAST_X86: whether there are kernels for AVX2 and AVX-512 beside those for any processor. Macros only: it comes
// before a change of target. NWFAST_BASELINE_ONLY, of CXXFLAGS, builds as for any other processor or compiler, in half
// the time.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(NWFAST_BASELINE_ONLY)
#define NWFAST_X86 1
#endif
