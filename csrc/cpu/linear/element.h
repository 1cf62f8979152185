// One batch element from its tensors to its rows' results.

#pragma once

#include "rows/rows.h"

namespace nwfast {
namespace linear {

// Data, boxes and moments.
template <typename R>
struct Element {
  Data<R> data;
  Plan plan;
  Boxes<R> boxes;
  bool expanded = false;

  bool prepare(const BatchData<R>& batch, int64_t b, bool offsets, bool scores, bool serial) {
    if (!batch.prepare(b, serial, data)) return false;
    if (data.keys == 0) return true;
    make_plan<R>(data.extent(data.channels + 1, offsets, scores), plan);
    compress(serial);
    return true;
  }

  void compress(bool serial) {
    expanded = plan.any_edges(data.key_range.low, data.key_range.high);
    if (!expanded) return;
    boxes.compress(
        plan, data.key, data.keys, data.channels + 1, !data.weight,
        [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { data.load(begin, n, charge, pitch); },
        serial);
    fill_matrices(plan);
  }

  void rows(bool serial, const RowFinish& finish) const { sum_rows(data, plan, boxes, expanded, finish, serial); }
};

// One channel: a kernel, through a block where rows go back to another place.
template <typename R>
void finish_rows(const LinearKernels<R>& table, const Plan& plan, const Data<R>& data, const ForwardResult<R>& result,
                 int64_t base, int64_t first, int64_t n, const double* sums, int64_t pitch, const double* apart) {
  FinishTask<R> task;
  const int offsets = 2, scores = 2 * (1 + plan.offsets);
  task.centre = data.centre[0];
  task.low = data.values[0].low;
  task.high = data.values[0].high;
  task.unit = 1 / data.weight_factor;
  task.w = data.w;
  constexpr int64_t kRows = 128;
  R block[4 * kRows];
  double state[2 * kRows];
  for (int64_t begin = 0; begin < n; begin += data.rows_moved ? kRows : n) {
    task.rows = data.rows_moved ? std::min(kRows, n - begin) : n;
    task.total = sums + begin;
    task.value = sums + pitch + begin;
    task.offset_total = sums + offsets * pitch + begin;
    task.offset_value = sums + (offsets + 1) * pitch + begin;
    task.score_total = sums + scores * pitch + begin;
    task.score_value = sums + (scores + 1) * pitch + begin;
    task.apart = apart ? apart + begin : nullptr;
    const int64_t row = base + first;
    task.out = data.rows_moved ? block : result.out + row;
    task.lse = !result.lse ? nullptr : data.rows_moved ? block + kRows : result.lse + row;
    task.state = !result.state ? nullptr : data.rows_moved ? state : result.state + 2 * row;
    task.tangent_w = !result.tangent_w ? nullptr : data.rows_moved ? block + 2 * kRows : result.tangent_w + row;
    task.tangent_q = !result.tangent_q ? nullptr : data.rows_moved ? block + 3 * kRows : result.tangent_q + row;
    table.finish(task);
    if (!data.rows_moved) continue;
    const uint32_t* const order = data.row_order + first + begin;
    R* const results[] = {result.out, result.lse, result.tangent_w, result.tangent_q};
    for (int r = 0; r < 4; ++r) {
      for (int64_t k = 0; results[r] && k < task.rows; ++k) results[r][base + order[k]] = block[r * kRows + k];
    }
    for (int64_t k = 0; result.state && k < task.rows; ++k) {
      std::copy_n(state + 2 * k, 2, result.state + 2 * (base + order[k]));
    }
  }
}

// A row without any key, which one infinitely far away from all of them is as well, or (total NaN) without a query.
template <typename R>
void empty_row(const ForwardResult<R>& result, int channels, int64_t row, double lse, double total) {
  for (int c = 0; c < channels; ++c) result.out[row * channels + c] = static_cast<R>(NAN);
  if (result.lse) result.lse[row] = static_cast<R>(lse);
  if (result.state) {
    result.state[2 * row] = 0;
    result.state[2 * row + 1] = total;
  }
  if (result.tangent_w) std::fill_n(result.tangent_w + row * channels, channels, static_cast<R>(total));
  if (result.tangent_q) std::fill_n(result.tangent_q + row * channels, channels, static_cast<R>(total));
}

template <typename R>
void finish_odd_rows(const Data<R>& data, const ForwardResult<R>& result, int64_t base) {
  for (const int64_t row : data.infinite_rows) empty_row(result, data.channels, base + row, -INFINITY, 0);
  for (const int64_t row : data.nan_rows) empty_row(result, data.channels, base + row, NAN, NAN);
}

// Results of all rows, from row `base` of the result on; with several channels no tangents of w.
template <typename R>
void forward_rows(const Element<R>& element, const ForwardResult<R>& result, int64_t base, bool serial) {
  const Data<R>& data = element.data;
  const int channels = data.channels;
  const double w = data.w, unit = 1 / data.weight_factor;
  const LinearKernels<R>& table = linear_kernels<R>();
  const Plan& plan = element.plan;
  element.rows(serial, [&](int64_t first, int64_t n, const double* sums, int64_t pitch, const double* apart) {
    if (channels == 1) {
      finish_rows(table, plan, data, result, base, first, n, sums, pitch, apart);
      return;
    }
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = base + data.original_row(first + k);
      const RowSums of_row(plan, channels, sums + k, pitch, 0);
      const double total = of_row.total();
      if (!(total > 0)) {
        empty_row(result, channels, row, -INFINITY, 0);
        continue;
      }
      for (int c = 0; c < channels; ++c) {
        const double out = data.centre[c] + of_row.value(c) / total;
        result.out[row * channels + c] =
            static_cast<R>(std::fmin(std::fmax(out, data.values[c].low), data.values[c].high));
        if (result.tangent_q) {
          result.tangent_q[row * channels + c] = static_cast<R>(-w * (w * of_row.offset_covariance(c)));
        }
      }
      const double offset = apart ? apart[k] * w : 0;
      if (result.lse) result.lse[row] = static_cast<R>(std::log(total * unit) - offset * offset / 2);
      if (!result.state) continue;
      result.state[2 * row] = offset * offset * kHalfLog2E;
      result.state[2 * row + 1] = total * unit;
    }
  });
}

}  // namespace linear
}  // namespace nwfast
