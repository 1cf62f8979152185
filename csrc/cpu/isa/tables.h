// One instruction set's kernels; included once by each <isa>.cpp.

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../dense/single_kernels.h"
#include "../dense/tiled_kernels.h"

namespace nwfast {
namespace NWFAST_ISA {

// Constant initialisation: no code of this instruction set may run when the library is loaded.
template <typename T>
constexpr Kernels<T> table() {
  return {scalar_nearest<T>, scalar_rows<T>, scalar_keys<T>, tiled_rows<T>, tiled_query_grad<T>, tiled_key_grad<T>};
}
extern constexpr Kernels<float> kFloatKernels = table<float>();
extern constexpr Kernels<double> kDoubleKernels = table<double>();

}  // namespace NWFAST_ISA
}  // namespace nwfast
