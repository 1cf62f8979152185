// The kernels for any processor, and the choice of the best tables for this one.

#include <cstdlib>

#include "processor.h"

#define NWFAST_ISA baseline
#define NWFAST_LEVEL 128
#include "tables.h"

namespace nwfast {

#ifdef NWFAST_X86
namespace avx512 {
extern const Kernels<float> kFloatKernels;
extern const Kernels<double> kDoubleKernels;
extern const ProductKernels kProductKernels;
extern const LinearKernels<float> kFloatLinearKernels;
extern const LinearKernels<double> kDoubleLinearKernels;
extern const GridKernels<float> kFloatGridKernels;
extern const GridKernels<double> kDoubleGridKernels;
}  // namespace avx512
namespace avx2 {
extern const Kernels<float> kFloatKernels;
extern const Kernels<double> kDoubleKernels;
extern const ProductKernels kProductKernels;
extern const LinearKernels<float> kFloatLinearKernels;
extern const LinearKernels<double> kDoubleLinearKernels;
extern const GridKernels<float> kFloatGridKernels;
extern const GridKernels<double> kDoubleGridKernels;
}  // namespace avx2
#endif

namespace {

Level detect() {
#ifdef NWFAST_X86
  __builtin_cpu_init();
  const char* limit = std::getenv("NWFAST_CPU_CAPABILITY");  // for tests and comparisons
  const bool baseline = limit && !std::strcmp(limit, "baseline"), avx2 = limit && !std::strcmp(limit, "avx2");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef NWFAST_EMULATED_AVX512
  const bool has_avx512 = has_avx2;
#else
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
  if (!baseline && !avx2 && has_avx512) return Level::kAvx512;
  if (!baseline && has_avx2) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

}  // namespace

Level processor_level() {
  static const Level best = detect();
  return best;
}

const char* instruction_set() {
  return processor_level() == Level::kAvx512 ? "AVX-512" : processor_level() == Level::kAvx2 ? "AVX2" : "baseline";
}

template <>
const Kernels<float>& kernels<float>() {
  return NWFAST_TABLE(kFloatKernels);
}

template <>
const Kernels<double>& kernels<double>() {
  return NWFAST_TABLE(kDoubleKernels);
}

const ProductKernels& product_kernels() { return NWFAST_TABLE(kProductKernels); }

template <>
const LinearKernels<float>& linear_kernels<float>() {
  return NWFAST_TABLE(kFloatLinearKernels);
}

template <>
const LinearKernels<double>& linear_kernels<double>() {
  return NWFAST_TABLE(kDoubleLinearKernels);
}

template <>
const GridKernels<float>& grid_kernels<float>() {
  return NWFAST_TABLE(kFloatGridKernels);
}

template <>
const GridKernels<double>& grid_kernels<double>() {
  return NWFAST_TABLE(kDoubleGridKernels);
}

}  // namespace nwfast
