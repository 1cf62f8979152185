// What the float32 kernels for one feature and channel must know of the data, found out on the device: one block looks
// through the keys, queries, values and weights of one batch element.

#pragma once

#include "../problem.cuh"

namespace nwfast {

struct Survey {
  float centre;       // subtracted from values before they are summed
  float low, high;    // of the values
  float weight_unit;  // a power of two by which weights are divided
  int usable;         // all finite, and of sizes whose squares and scores float32 can hold
  int ascending;      // keys are sorted
};

// Launched with one block of kSurveyThreads for each batch element.
constexpr int kSurveyThreads = 512;
constexpr size_t kSurveyShared = 9 * (kSurveyThreads / kWarp) * sizeof(float);
__global__ void survey_data(const __grid_constant__ Problem problem, Survey* surveys);

}  // namespace nwfast
