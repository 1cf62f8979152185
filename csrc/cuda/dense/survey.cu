// See survey.cuh. Minima and maxima do not depend on the order in which they are taken.

#include "survey.cuh"

namespace nwfast {
namespace {

enum Extreme { kKeyLow, kKeyHigh, kQuerySize, kValueLow, kValueHigh, kWeightLow, kWeightHigh, kBad, kDescends, kCount };

__device__ float join(int which, float a, float b) {
  const bool low = which == kKeyLow || which == kValueLow || which == kWeightLow;
  return low ? fminf(a, b) : fmaxf(a, b);
}

constexpr float kLargest = 0x1p48f, kSmallest = 0x1p-48f;  // of coordinates other than 0
constexpr double kLargestScore = 0x1p100;

}  // namespace

__global__ void __launch_bounds__(kSurveyThreads)
    survey_data(const __grid_constant__ Problem problem, Survey* surveys) {
  NWFAST_SHARED(shared);
  float (*const parts)[kSurveyThreads / kWarp] = reinterpret_cast<float (*)[kSurveyThreads / kWarp]>(shared);
  const int64_t b = blockIdx.x;
  const int64_t query = problem.query.offset(problem.batch, b), key = problem.key.offset(problem.batch, b);
  const int64_t value = problem.value.offset(problem.batch, b);
  const int64_t weight = problem.key_weight.data ? problem.key_weight.offset(problem.batch, b) : 0;
  float found[kCount];
  found[kKeyLow] = found[kValueLow] = found[kWeightLow] = INFINITY;
  found[kKeyHigh] = found[kValueHigh] = -INFINITY;
  found[kQuerySize] = found[kWeightHigh] = found[kBad] = found[kDescends] = 0;
#pragma unroll 2
  for (int64_t j = threadIdx.x; j < problem.keys; j += kSurveyThreads) {
    const float k = problem.key.read<float>(key + j * problem.key.row_stride);
    const float next = problem.key.read<float>(key + (j + 1 < problem.keys ? j + 1 : j) * problem.key.row_stride);
    const float v = problem.value.read<float>(value + j * problem.value.row_stride);
    const float a =
        problem.key_weight.data ? problem.key_weight.read<float>(weight + j * problem.key_weight.row_stride) : 1;
    if (!(k <= next)) found[kDescends] = 1;
    if (a == 0) continue;  // left out, whatever it holds
    found[kKeyLow] = fminf(found[kKeyLow], k);
    found[kKeyHigh] = fmaxf(found[kKeyHigh], k);
    found[kValueLow] = fminf(found[kValueLow], v);
    found[kValueHigh] = fmaxf(found[kValueHigh], v);
    if (a > 0) found[kWeightLow] = fminf(found[kWeightLow], a);
    found[kWeightHigh] = fmaxf(found[kWeightHigh], a);
    if (!isfinite(k) || !isfinite(v) || !isfinite(a) || a < 0) found[kBad] = 1;
  }
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < problem.queries; i += kSurveyThreads) {
    const float q = fabsf(problem.query.read<float>(query + i * problem.query.row_stride));
    if (isfinite(q)) found[kQuerySize] = fmaxf(found[kQuerySize], q);
  }
  for (int which = 0; which < kCount; ++which) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      found[which] = join(which, found[which], __shfl_xor_sync(kAllLanes, found[which], step));
    }
    if (lane_number() == 0) parts[which][warp_number()] = found[which];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int which = 0; which < kCount; ++which) {
    for (int part = 0; part < kSurveyThreads / kWarp; ++part)
      found[which] = join(which, found[which], parts[which][part]);
  }
  Survey survey;
  survey.low = found[kValueLow];
  survey.high = found[kValueHigh];
  // Numbers within a factor of two of each other have no rounding error in their difference.
  const float least = fminf(fabsf(survey.low), fabsf(survey.high)), most = fmaxf(fabsf(survey.low), fabsf(survey.high));
  survey.centre = (survey.low < 0) == (survey.high < 0) && 3 * least >= most ? survey.low / 2 + survey.high / 2 : 0;
  int exponent = 0;
  if (problem.key_weight.data && found[kWeightHigh] > 0) frexpf(found[kWeightHigh], &exponent);
  // Kept where its reciprocal is a normal number as well.
  survey.weight_unit = ldexpf(1, exponent < -125 ? -125 : exponent > 125 ? 125 : exponent);
  const float size = fmaxf(found[kQuerySize], fmaxf(fabsf(found[kKeyLow]), fabsf(found[kKeyHigh])));
  const double w = problem.w.read<double>(problem.w.offset(problem.batch, b));
  const double score = 4 * kHalfLog2E * w * w * size * size;
  survey.usable = found[kBad] == 0 && (size == 0 || (size > kSmallest && size < kLargest)) && score < kLargestScore &&
                  most < 0x1p100f && found[kWeightHigh] > 0 && found[kWeightHigh] / kWeightRange <= found[kWeightLow];
  survey.ascending = found[kDescends] == 0;
  surveys[b] = survey;
}

}  // namespace nwfast
