// One instruction set's kernels; included once by each <isa>.cpp. The longest to compile: nothing of torch belongs
// here, so that compile.py can begin before torch is there.

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../dense/products/kernels.h"
#include "../dense/single_keys.h"
#include "../dense/single_rows.h"
#include "../dense/skipping/select.h"
#include "../dense/tiled_kernels.h"
#include "../grid/kernels/convolve.h"
#include "../grid/kernels/far.h"
#include "../grid/kernels/mesh.h"
#include "../grid/kernels/moments.h"
#include "../linear/kernels/finish.h"
#include "../linear/kernels/near_keys.h"
#include "../linear/kernels/series.h"

namespace nwfast {
namespace NWFAST_ISA {

// Constant initialisation: no code of this instruction set may run when the library is loaded.
template <typename T>
constexpr Kernels<T> table() {
  return {single_nearest<T>,   single_rows<T>,    single_keys<T>, tiled_rows<T>,
          tiled_query_grad<T>, tiled_key_grad<T>, select_near<T>};
}
extern constexpr Kernels<float> kFloatKernels = table<float>();
extern constexpr Kernels<double> kDoubleKernels = table<double>();

extern constexpr ProductKernels kProductKernels = {product_rows, product_key_grad, product_query_grad};

template <typename T>
constexpr LinearKernels<T> linear_table() {
  return {linear::moments<T>, linear::translate, linear::evaluate<T>,  linear::direct<T>, linear::near<T>,
          linear::gather<T>,  linear::pull<T>,   linear::near_pull<T>, linear::finish<T>};
}
extern constexpr LinearKernels<float> kFloatLinearKernels = linear_table<float>();
extern constexpr LinearKernels<double> kDoubleLinearKernels = linear_table<double>();

template <typename T>
constexpr GridKernels<T> grid_table() {
  return {grid_product,  grid_moments<T>,    grid_evaluate<T>,       grid_spread<T>, grid_interpolate<T>, grid_fold,
          grid_convolve, grid_convolve_rows, grid_window_moments<T>, far_direct,     far_expansion,       far_moments};
}
extern constexpr GridKernels<float> kFloatGridKernels = grid_table<float>();
extern constexpr GridKernels<double> kDoubleGridKernels = grid_table<double>();

}  // namespace NWFAST_ISA
}  // namespace nwfast
