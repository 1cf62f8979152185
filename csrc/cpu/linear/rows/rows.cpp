// The way that each row goes: near rows one by one, rows of crowded boxes by series where that pays, others directly,
// and what those leave, by the gap that it lies in.

#include "gaps.h"
#include "near.h"
#include "series.h"

namespace nwfast {
namespace linear {
namespace {

template <typename R>
class RowPass {
 public:
  RowPass(const RowTask<R>& rows, const Boxes<R>& boxes, bool expanded)
      : rows_(rows), boxes_(boxes), expanded_(expanded) {}

  void run(bool serial) {
    const int64_t chunks = (rows_.data.queries + kChunk - 1) / kChunk;
    std::vector<std::vector<int64_t>> far(chunks);
    parallel_blocks(chunks, serial, [&](int64_t chunk) { run_chunk(chunk, far[chunk]); });
    std::vector<int64_t> rows;
    for (const auto& part : far) rows.insert(rows.end(), part.begin(), part.end());
    if (!rows.empty()) GapRows<R>(rows_).run(rows, serial);
  }

 private:
  void run_chunk(int64_t chunk, std::vector<int64_t>& far) const {
    const int64_t begin = chunk * kChunk, end = std::min(rows_.data.queries, begin + kChunk);
    const R* const x = rows_.data.query;
    const double reach = rows_.plan.scale > 0 ? rows_.plan.window / rows_.plan.scale : INFINITY;
    DirectRows<R> direct(rows_, far);
    if (!expanded_) {
      direct.run(begin, end);
      return;
    }
    const auto load = rows_.loader();
    Expansion<R, decltype(load)> expansion(rows_.plan, boxes_, rows_.data.key, rows_.data.keys, rows_.columns,
                                           !rows_.data.weight, load);
    NearRowPass<R> near(rows_);
    SeriesRows<R> series(rows_);
    const double per_pair = 4.0 * ((rows_.columns + 1) / 2), per_term = 0.3 * rows_.columns * rows_.slots;
    int64_t window = lower_bound(rows_.data.key, rows_.data.keys, static_cast<double>(x[begin]) - reach);
    for (int64_t i = begin; i < end;) {
      window = gallop(rows_.data.key, rows_.data.keys, window, static_cast<double>(x[i]) - reach);
      const int64_t done = near.run(i, end, window, reach, direct);
      if (done > 0) {
        i += done;
        continue;
      }
      const int64_t few = std::min(i + 2 * kGroup, end);
      const int64_t last = window + 6 * kGroup;
      if (last >= rows_.data.keys ||
          static_cast<double>(rows_.data.key[last]) > static_cast<double>(x[few - 1]) + reach) {
        if (rows_.data.keys > 6 * kGroup) {
          direct.run(i, few);
          i = few;
          continue;
        }
      }
      const int64_t box = rows_.plan.box_of(x[i]);
      int64_t stop = gallop(x, end, i, rows_.plan.lower_edge(box + 1));
      if (!rows_.plan.has_edges(box)) {
        stop = std::max(stop, few);
        direct.run(i, stop);
        i = stop;
        continue;
      }
      expansion.move_to(box);
      const double rows = static_cast<double>(stop - i);
      const double one_by_one = rows * static_cast<double>(expansion.points()) * per_pair;
      const double by_series =
          (rows + static_cast<double>(expansion.translations()) * rows_.plan.terms) * rows_.plan.terms * per_term;
      if (one_by_one <= by_series) {
        direct.run(i, stop);
      } else {
        double error = rows_.plan.tail_error * static_cast<double>(rows_.data.keys);
        const double* const local = expansion.expand(&error);
        for (int64_t row = i; row < stop; row = series.end()) {
          series.evaluate(row, std::min(stop, row + kEvaluated), rows_.plan.centre(box), local, error, direct);
        }
      }
      i = stop;
    }
    series.finish();
  }

  const RowTask<R>& rows_;
  const Boxes<R>& boxes_;
  const bool expanded_;
};

}  // namespace

template <typename R>
void sum_rows(const Data<R>& data, const Plan& plan, const Boxes<R>& boxes, bool expanded, const RowFinish& finish,
              bool serial) {
  RowPass<R>(RowTask<R>(data, plan, finish), boxes, expanded).run(serial);
}
template void sum_rows<float>(const Data<float>&, const Plan&, const Boxes<float>&, bool, const RowFinish&, bool);
template void sum_rows<double>(const Data<double>&, const Plan&, const Boxes<double>&, bool, const RowFinish&, bool);

}  // namespace linear
}  // namespace nwfast
