// The kernels of the fast Gauss transform for any processor, and the choice of the best table for this one.

#define NWFAST_ISA baseline
#define NWFAST_LEVEL 128
#include "linear_tables.h"

namespace nwfast {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace avx512 {
extern const FgtKernels<float> kFloatFgtKernels;
extern const FgtKernels<double> kDoubleFgtKernels;
}  // namespace avx512
namespace avx2 {
extern const FgtKernels<float> kFloatFgtKernels;
extern const FgtKernels<double> kDoubleFgtKernels;
}  // namespace avx2
#endif

template <>
const FgtKernels<float>& fgt_kernels<float>() {
  return NWFAST_TABLE(kFloatFgtKernels);
}

template <>
const FgtKernels<double>& fgt_kernels<double>() {
  return NWFAST_TABLE(kDoubleFgtKernels);
}

}  // namespace nwfast
