// Prepared keys: what the forward pass does with keys alone, done once for many sets of queries.

#include "element.h"

namespace nwfast {
namespace {

// Places in PreparedKeys::numbers; centres, lowest and highest values by channel and the plan's errors follow.
enum Number {
  kW,
  kScale,
  kBox,
  kTerms,
  kReach,
  kWindow,
  kLogSpan,
  kTailError,
  kWeightFactor,
  kWeightSpan,
  kExpanded,
  kNumbers
};

constexpr double kLeastScale = 1e-60;  // weighs as 0 does, and boxes still have a width

}  // namespace

template <typename T>
bool linear_compress(const Problem& problem, PreparedKeys<T>& prepared) {
  linear::Element<T> element;
  linear::Data<T>& data = element.data;
  if (!data.prepare(problem, 0, false)) return false;
  const int channels = data.channels;
  if (data.keys > 0) {
    linear::Extent extent = data.extent(channels + 1, false, false);
    extent.anywhere = true;
    extent.queries = extent.keys;
    extent.scale = std::fmax(extent.scale, kLeastScale);
    linear::make_plan<T>(extent, element.plan);
    element.compress(false);
  }
  const linear::Plan& plan = element.plan;
  prepared.key.assign(data.key, data.key + data.keys);
  prepared.value.resize(data.keys * channels);
  for (int64_t j = 0; j < data.keys; ++j) {
    for (int c = 0; c < channels; ++c) {
      prepared.value[j * channels + c] = data.value[j * data.row_stride + c * data.column_stride];
    }
  }
  if (data.weight) prepared.weight.assign(data.weight, data.weight + data.keys);
  const int64_t size = (channels + 1) * plan.terms;
  for (int64_t i = 0; i < element.boxes.count(); ++i) {
    const linear::Box& box = element.boxes[i];
    prepared.boxes.insert(prepared.boxes.end(), {box.number, box.begin, box.end});
    prepared.moments.insert(prepared.moments.end(), element.boxes.moments(i), element.boxes.moments(i) + size);
  }
  prepared.matrices = plan.matrices;
  std::vector<double>& numbers = prepared.numbers;
  numbers = {data.w,
             plan.scale,
             plan.box,
             static_cast<double>(plan.terms),
             static_cast<double>(plan.reach),
             plan.window,
             plan.log_span,
             plan.tail_error,
             data.weight_factor,
             data.weight_span,
             element.expanded ? 1.0 : 0.0};
  for (int c = 0; c < channels; ++c) {
    numbers.insert(numbers.end(), {data.centre[c], data.values[c].low, data.values[c].high});
  }
  numbers.insert(numbers.end(), plan.error.begin(), plan.error.end());
  return true;
}

template <typename T>
bool linear_predict(const PreparedKeysView<T>& prepared, const View& query, int64_t queries,
                    const ForwardResult<T>& result) {
  linear::Element<T> element;
  linear::Data<T>& data = element.data;
  linear::Plan& plan = element.plan;
  const double* const numbers = prepared.numbers;
  const int channels = static_cast<int>(prepared.channels);
  data.channels = channels;
  data.keys = prepared.keys;
  data.key = prepared.key;
  data.value = prepared.value;
  data.row_stride = channels;
  data.column_stride = 1;
  data.weight = prepared.weight;
  data.w = numbers[kW];
  data.weight_factor = numbers[kWeightFactor];
  data.weight_span = numbers[kWeightSpan];
  for (int c = 0; c < channels; ++c) {
    data.centre.push_back(numbers[kNumbers + 3 * c]);
    Range range;
    range.low = numbers[kNumbers + 3 * c + 1];
    range.high = numbers[kNumbers + 3 * c + 2];
    data.values.push_back(range);
  }
  if (data.keys > 0) {
    data.key_range.low = data.key[0];
    data.key_range.high = data.key[data.keys - 1];
  }
  const bool serial = queries < linear::kChunk / 4;
  if (!data.prepare_queries(query, 0, queries, serial)) return false;
  if (data.keys == 0) {
    for (int64_t i = 0; i < queries; ++i) linear::empty_row(result, channels, i, -INFINITY, 0);
    linear::finish_odd_rows(data, result, 0);
    return true;
  }
  plan.scale = numbers[kScale];
  plan.box = numbers[kBox];
  plan.half = plan.box * plan.scale / 2;
  plan.terms = static_cast<int>(numbers[kTerms]);
  plan.pitch = (plan.terms + 7) / 8 * 8;
  plan.reach = static_cast<int64_t>(numbers[kReach]);
  plan.window = numbers[kWindow];
  plan.log_span = numbers[kLogSpan];
  plan.tail_error = numbers[kTailError];
  linear::fill_bounds(plan);
  plan.matrices.assign(prepared.matrices, prepared.matrices + prepared.matrices_size);
  element.expanded = numbers[kExpanded] != 0;
  std::vector<linear::Box> boxes(prepared.box_count);
  for (int64_t i = 0; i < prepared.box_count; ++i) {
    boxes[i] = {prepared.boxes[3 * i], prepared.boxes[3 * i + 1], prepared.boxes[3 * i + 2], i};
  }
  element.boxes.adopt(std::move(boxes), prepared.moments, static_cast<int64_t>(channels + 1) * plan.terms);
  linear::forward_rows(element, result, 0, serial);
  linear::finish_odd_rows(data, result, 0);
  return true;
}

template bool linear_compress<float>(const Problem&, PreparedKeys<float>&);
template bool linear_compress<double>(const Problem&, PreparedKeys<double>&);
template bool linear_predict<float>(const PreparedKeysView<float>&, const View&, int64_t, const ForwardResult<float>&);
template bool linear_predict<double>(const PreparedKeysView<double>&, const View&, int64_t,
                                     const ForwardResult<double>&);

}  // namespace nwfast
