// One instruction set's kernels of the fast Gauss transform; included once by each linear_<isa>.cpp.

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../linear/kernels/near_keys.h"

namespace nwfast {
namespace NWFAST_ISA {

// Constant initialisation: no code of this instruction set may run when the library is loaded.
template <typename T>
constexpr FgtKernels<T> fgt_table() {
  return {fgt_moments<T>, fgt_translate, fgt_evaluate<T>,  fgt_direct<T>, fgt_near<T>,
          fgt_gather<T>,  fgt_pull<T>,   fgt_near_pull<T>, fgt_finish<T>};
}
extern constexpr FgtKernels<float> kFloatFgtKernels = fgt_table<float>();
extern constexpr FgtKernels<double> kDoubleFgtKernels = fgt_table<double>();

}  // namespace NWFAST_ISA
}  // namespace nwfast
