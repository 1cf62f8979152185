// The backward pass for the rows that matrix products serve (../products/panels.h).

#pragma once

#include "batch.h"

namespace nwfast {
namespace backward {

// These rows of a batch, as the kernels read them.
class ServedRows {
 public:
  ServedRows(const Problem& problem, const BackwardBatch<float>& batch) : batch_(batch) {
    const int64_t features = problem.features;
    query_.allocate((batch.served + kRowPadding) * features);
    top_.allocate(batch.served);
    std::fill_n(query_.get() + batch.served * features, kRowPadding * features, 0.0f);
    for (int64_t i = 0; i < batch.served; ++i) {
      float* const packed = &query_[i * features];
      batch.panels->pack_row(&batch.row_query[i * features], packed);
      top_[i] = static_cast<float>(batch.panels->constant(batch.panels->trust_of(packed)) - batch.shift[i]);
    }
  }

  void fill(const Problem& problem, int64_t begin, int64_t rows, ProductGradRows& task) const {
    TiledQueryGrad<float> common;
    batch_.fill(problem, begin, common);
    task.data = batch_.panels->data;
    task.rows = rows;
    task.query = query_.get() + begin * problem.features;
    task.excluded = common.excluded;
    task.top = top_.get() + begin;
    task.inverse_total = common.inverse_total;
    task.offset_grad = common.offset_grad;
    task.lse_grad = common.lse_grad;
    task.value_grad = common.value_grad;
    task.value_pitch = batch_.data.channel_pitch;
  }

  const float* query() const { return query_.get(); }

 private:
  const BackwardBatch<float>& batch_;
  Buffer<float> query_, top_;
};

// What these rows get and give: the gradients of their queries, what they add to that of w (grad_w: features, or null)
// and, where `keys` is not null, to the sums for keys. Of kProductChunk rows at a time u_ij is kept for all keys: first
// tiles of keys add up over the rows and write it down, then rows add up over the keys.
template <typename R>
void product_backward(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial,
                      const BackwardBatch<float>& batch, bool queries, double* grad_w, KeySums<double>* keys) {
  if (batch.served == 0) return;
  const int64_t n = problem.keys, features = problem.features, channels = problem.channels;
  const int64_t tiles = (n + kProductKeys - 1) / kProductKeys, pitch = tiles * kProductKeys;
  const bool values = keys && task.grad_value, offsets = keys && task.grad_key;
  const ServedRows served(problem, batch);
  const ProductPanels& panels = *batch.panels;
  Buffer<float> query_columns(offsets ? ProductPanels::panels_of(features) * kProductChunk * kPanel : 0);
  Buffer<float> grad_columns(values ? ProductPanels::panels_of(channels) * kProductChunk * kPanel : 0);
  Buffer<float> pulls(queries ? (kProductChunk + kRowPadding) * pitch : 0);
  if (queries) std::fill_n(pulls.get(), (kProductChunk + kRowPadding) * pitch, 0.0f);
  Buffer<double> weight(n), value(values ? n * channels : 0), offset(offsets ? n * features : 0);
  std::fill_n(weight.get(), n, 0.0);
  if (values) std::fill_n(value.get(), n * channels, 0.0);
  if (offsets) std::fill_n(offset.get(), n * features, 0.0);
  Buffer<double> second(features);  // the sum of second moments, to which keys add at the end
  std::fill_n(second.get(), features, 0.0);
  for (int64_t chunk = 0; chunk < batch.served; chunk += kProductChunk) {
    const int64_t rows = std::min(kProductChunk, batch.served - chunk);
    if (offsets) {
      ProductPanels::pack_columns(served.query() + chunk * features, features, rows, features, query_columns.get());
    }
    if (values) {
      const int64_t distance = batch.data.channel_pitch;
      ProductPanels::pack_columns(&batch.value_grad[chunk * distance], distance, rows, channels, grad_columns.get());
    }
    parallel_blocks(tiles, serial, [&](int64_t tile) {
      ProductKeyGrad some;
      served.fill(problem, chunk, rows, some);
      some.key_begin = tile * kProductKeys;
      some.key_end = std::min(n, some.key_begin + kProductKeys);
      some.column_rows = rows;
      some.query_columns = query_columns.get();
      some.grad_columns = grad_columns.get();
      some.sum_value = values ? &value[some.key_begin * channels] : nullptr;
      some.sum_weight = &weight[some.key_begin];
      some.sum_offset = offsets ? &offset[some.key_begin * features] : nullptr;
      some.pulls = queries ? pulls.get() : nullptr;
      some.pulls_pitch = pitch;
      product_kernels().key_grad(some);
    });
    if (!queries) continue;
    const int64_t blocks = (rows + kProductRows - 1) / kProductRows;
    Buffer<double> partial(blocks * features);
    parallel_blocks(blocks, serial, [&](int64_t block) {
      const int64_t first = block * kProductRows;
      Buffer<double> total(kProductRows), moment(kProductRows * features);
      ProductQueryGrad some;
      some.data = panels.data;
      some.rows = std::min(kProductRows, rows - first);
      some.pulls = pulls.get() + first * pitch;
      some.pulls_pitch = pitch;
      some.total = total.get();
      some.moment = moment.get();
      product_kernels().query_grad(some);
      for (int64_t f = 0; f < features; ++f) {
        const double w = batch.w[f], unit = batch.unit[f];
        double sum = 0;
        for (int64_t i = 0; i < some.rows; ++i) {
          const int64_t row = chunk + first + i;
          const double x = static_cast<double>(served.query()[row * features + f]);
          const double part = moment[i * features + f], gradient = x * total[i] - part;
          if (task.grad_query) {
            task.grad_query[(b * problem.queries + batch.row_of[row]) * features + f] =
                static_cast<R>(-w * ((w / unit) * (gradient / panels.scale(f))));
          }
          sum += x * (gradient - part);
        }
        partial[block * features + f] = sum;
      }
    });
    for (int64_t i = 0; i < blocks * features; ++i) second[i % features] += partial[i];
  }
  for (int64_t f = 0; grad_w && f < features; ++f) {
    double sum = second[f];
    for (int64_t j = 0; j < n; ++j) sum += panels.key(j, f) * panels.key(j, f) * weight[j];
    grad_w[f] += w_gradient(batch.w[f], batch.unit[f], sum / (panels.scale(f) * panels.scale(f)));
  }
  if (!keys) return;
  for (int64_t j = 0; offsets && j < n; ++j) {
    for (int64_t f = 0; f < features; ++f) {
      double& sum = offset[j * features + f];
      sum = (sum - panels.key(j, f) * weight[j]) / panels.scale(f);
    }
  }
  keys->add(problem, batch, 0, n, values ? value.get() : nullptr, weight.get(), offsets ? offset.get() : nullptr);
}

}  // namespace backward
}  // namespace nwfast
