// The instruction sets that there are kernels for, and the tables of the best one that this processor has.

#pragma once

#include "levels.h"

namespace nwfast {

enum class Level { kBaseline, kAvx2, kAvx512 };
Level processor_level();        // the best that this processor has
const char* instruction_set();  // its name

// The one of three tables of kernels that this processor can run.
template <typename Table>
const Table& table_for(const Table& avx512, const Table& avx2, const Table& baseline) {
  const Level level = processor_level();
  return level == Level::kAvx512 ? avx512 : level == Level::kAvx2 ? avx2 : baseline;
}
#ifdef NWFAST_X86
#define NWFAST_TABLE(name) table_for(avx512::name, avx2::name, baseline::name)
#else
#define NWFAST_TABLE(name) baseline::name
#endif

}  // namespace nwfast
