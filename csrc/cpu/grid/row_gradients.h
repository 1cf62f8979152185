// The gradients that reach rows, and the way that each row takes in the backward pass.

#pragma once

#include "../row_grad.h"
#include "direct.h"

namespace nwfast {
namespace grid {

constexpr double kLeastTotal = 0.05;  // of rows that are expanded as sources, in units of the largest key weight

// Of one batch element's rows, in the order of its sorted queries.
template <typename R>
struct RowGradients {
  Buffer<double> out, lse;          // (rows, channels); (rows)
  Buffer<double> log_total, total;  // log2 of the row's total, and 1 over it, in units of batch.weight_unit
  Buffer<double> shift, inverse;    // of the state; weight_unit / total of it
  std::vector<char> level;         // of direct sums that serve a row: kLevels for none, kIdle for rows that add nothing
  std::vector<int64_t> left_over;  // rows that are left to the dense driver, by the caller's numbers
  static constexpr char kIdle = 100;

  RowGradients(const Element<R>& element, const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial) {
    const int64_t m = element.queries.n, channels = problem.channels;
    out.allocate(m * channels);
    lse.allocate(m);
    log_total.allocate(m);
    total.allocate(m);
    shift.allocate(m);
    inverse.allocate(m);
    level.assign(m, kIdle);
    double least[kLevels];
    for (int k = 0; k < kLevels; ++k) {
      least[k] = element.least_total(element.plan.radius_at(kLevelDistance[k]));
    }
    const double unit = element.batch.weight_unit;
    const double most = most_score<R, R>(problem);
    parallel_blocks((m + kPointTask - 1) / kPointTask, serial, [&](int64_t part) {
      for (int64_t i = part * kPointTask; i < std::min(m, (part + 1) * kPointTask); ++i) {
        const int64_t original = element.queries.order[i];
        const double size = read_row_grad(problem, task, b, original, out.get() + i * channels, lse[i]);
        const double* const state = task.state + 2 * (b * problem.queries + original);
        log_total[i] = std::log2(state[1] / unit) - state[0];
        total[i] = std::exp2(state[0]) / (state[1] / unit);
        shift[i] = state[0];
        inverse[i] = unit / state[1];
        if (size == 0 || state[1] == 0) continue;
        level[i] = kLevels;
        const bool fits = sizeof(R) == 8 ? size < 1e250 && size > 1e-250 : size > 0x1p-50 && size < 0x1p40;
        if (!(state[0] <= most) || !fits || element.batch.odd[i]) continue;
        for (int k = kLevels - 1; k >= 0; --k) {
          if (log_total[i] >= least[k]) level[i] = static_cast<char>(k);
        }
      }
    });
    std::vector<double> grad(channels);
    double grad_lse;
    for (const int64_t row : element.outside) {
      const double* const state = task.state + 2 * (b * problem.queries + row);
      if (read_row_grad(problem, task, b, row, grad.data(), grad_lse) == 0 || state[1] == 0) continue;
      left_over.push_back(row);
    }
  }
};

// What the dense kernels read of some rows: packed, and sorted by cell as they are.
template <typename R>
struct PackedRows {
  int64_t n = 0;
  std::vector<Box> boxes;
  Buffer<R> query, value_grad, offset_grad, lse_grad, inverse;
  Buffer<double> shift;
  Buffer<int64_t> own;

  void pack(const Element<R>& element, const RowGradients<R>& gradients, const R* outs, const Problem& problem,
            int64_t b, const std::vector<int64_t>& rows) {
    const int64_t features = problem.features, channels = problem.channels;
    const int64_t pitch = element.batch.data.channel_pitch;
    n = static_cast<int64_t>(rows.size());
    query.allocate(n * features);
    value_grad.allocate(n * pitch);
    for (Buffer<R>* buffer : {&offset_grad, &lse_grad, &inverse}) buffer->allocate(n);
    shift.allocate(n);
    own.allocate(n);
    boxes.clear();
    for (const Run& run : runs_of(element.queries, rows, n)) boxes.push_back({run.cell, run.begin, run.end});
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = rows[k], row = b * problem.queries + element.queries.order[i];
      std::copy_n(element.batch.query.get() + i * features, features, &query[k * features]);
      R dot = 0;  // as the kernels sum it, so that it cancels where a row's weight is all on one key
      for (int64_t c = 0; c < channels; ++c) {
        const R grad = static_cast<R>(gradients.out[i * channels + c]);
        value_grad[k * pitch + c] = grad;
        dot = multiply_add(static_cast<R>(outs[row * channels + c] - element.batch.centre[c]), grad, dot);
      }
      for (int64_t c = channels; c < pitch; ++c) value_grad[k * pitch + c] = 0;
      offset_grad[k] = dot;
      lse_grad[k] = static_cast<R>(gradients.lse[i]);
      inverse[k] = static_cast<R>(gradients.inverse[i]);
      shift[k] = gradients.shift[i];
      own[k] = problem.exclude_self ? element.own[i] : -1;
    }
  }
};

// The backward pass of rows that are left to the dense driver, as a problem of its own.
template <typename R>
struct LeftOverBackward {
  LeftOverRows<R> rows;
  BackwardTask<R> task;

  LeftOverBackward(const Element<R>& element, const Problem& problem, const BackwardTask<R>& from, int64_t b,
                   std::vector<int64_t> some)
      : rows(element, problem, b, std::move(some)) {
    const int64_t count = rows.problem.queries, channels = problem.channels;
    out_.allocate(count * channels);
    state_.allocate(2 * count);
    grad_.allocate(count * channels);
    lse_.allocate(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = b * problem.queries + rows.rows[i];
      read_row_grad(problem, from, b, rows.rows[i], grad_.get() + i * channels, lse_[i]);
      std::copy_n(from.out + row * channels, channels, out_.get() + i * channels);
      std::copy_n(from.state + 2 * row, 2, state_.get() + 2 * i);
    }
    task = BackwardTask<R>();
    task.grad_out = array_view(grad_.get(), channels, 1);
    if (from.grad_lse.data) task.grad_lse = array_view(lse_.get(), 1, 1);
    task.out = out_.get();
    task.state = state_.get();
  }

 private:
  Buffer<R> out_;
  Buffer<double> state_, grad_, lse_;
};

}  // namespace grid
}  // namespace nwfast
