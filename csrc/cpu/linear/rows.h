// Sums over the keys for every row (query): by expansion where boxes are crowded, directly where keys or queries are
// few, and, for rows that would visit many keys one by one, from keys compressed around the gap they lie in.
//
// A row's sums are relative to a reference r: exp(-((x - u)^2 - (x - r)^2) w^2 / 2). r is the row's nearest key where
// that is more than kLevelZero bandwidths away, and x itself elsewhere.

#pragma once

#include "boxes.h"
#include "data.h"
#include "edge.h"

namespace nwfast {
namespace fgt {

constexpr int64_t kGroup = 8;           // rows that are summed together directly
constexpr int64_t kNearKeys = 64;       // keys in the common window of a vector of rows that are summed one by one
constexpr int64_t kNearSpread = 48;     // keys between the rows of a vector from which on rows are summed singly
constexpr int64_t kAloneKeys = 128;     // the same of a single row, where queries are sparse
constexpr int64_t kFewKeys = 64;        // just beyond that window
constexpr double kNearWeightSpan = 40;  // so that the sum of float weights stays far above the least float
// Floats do not underflow to 0 where near kernels sum (kernels/near_rows.h), and what far keys add by that must not
// show.
constexpr double kNearMost = 1e13;  // bandwidths from 0
constexpr double kNearMostValue = 1e15;
constexpr double kNearLeastCharge = -40;          // log of the least product of the size of values and a float weight
constexpr double kNearMostGrad = 1e12;            // divided by the total
constexpr double kNearLeast = 1e-15;              // scale, whose square and the squares of whose bandwidths are floats
constexpr double kMostOwnValue = 32;              // times the sum of all others that an excluded key may have added
constexpr int64_t kEvaluated = 512;               // rows whose results are written together
constexpr int64_t kPaddedRows = kEvaluated + 32;  // kernels write up to 32 rows at a time

// The sums of a row: of exp(.) a_j and exp(.) a_j (v_j - centre), and of these times (r - k_j) and times
// (x - k_j)^2 - (x - r)^2 where asked for.
struct RowSums {
  const double* sums;  // (slots, columns, pitch), at the row's place
  int64_t pitch;
  int columns;
  int offset_slot, score_slot;
  double apart;  // x - r

  RowSums(const Plan& plan, int channels, const double* from, int64_t distance, double far)
      : sums(from), pitch(distance), columns(channels + 1), offset_slot(1), score_slot(1 + plan.offsets), apart(far) {}
  double total() const { return sums[0]; }
  double value(int c) const { return sums[(c + 1) * pitch]; }
  double offset(int column) const { return sums[(offset_slot * columns + column) * pitch]; }
  double score(int column) const { return sums[(score_slot * columns + column) * pitch]; }
};

// The nearest key that counts for a row.
struct Nearest {
  int64_t place;  // of the first key >= x
  double key;
  bool any;  // whether there is one
  bool level_zero;
};

// hint: at most the place to be found.
template <typename R>
Nearest nearest(const Data<R>& data, const Plan& plan, int64_t i, int64_t hint) {
  const double x = data.query[i];
  int64_t place = hint;
  for (int step = 0; step < 16 && place < data.keys && data.key[place] < x; ++step) ++place;
  place = gallop(data.key, data.keys, place, x);
  const int64_t excluded = data.excluded(i);
  int64_t left = place - 1, right = place;
  if (left == excluded) --left;
  if (right == excluded) ++right;
  Nearest found{place, x, left >= 0 || right < data.keys, true};
  if (!found.any) return found;
  if (left < 0) {
    found.key = data.key[right];
  } else if (right >= data.keys) {
    found.key = data.key[left];
  } else {
    const double below = data.key[left], above = data.key[right];
    found.key = below_is_nearer(below, above, x) ? below : above;
  }
  found.level_zero = std::fabs(x - found.key) * plan.scale <= kLevelZero;
  return found;
}

// The keys that count for a row: those within [*low, *high).
template <typename R>
void window_of(const Data<R>& data, const Plan& plan, double x, double key, double* low, double* high) {
  const double span = plan.log_span + data.weight_span, distance = std::fabs(x - key) * plan.scale;
  const double depth =
      plan.scale > 0 ? 2 * span / (std::sqrt(distance * distance + 2 * span) + distance) / plan.scale : INFINITY;
  const double slack = (std::fabs(x) + std::fabs(key)) * 1e-15 + 1e-300;  // what rounding takes of the bounds
  *low = (key <= x ? key : x - (key - x)) - depth - slack;
  *high = (key >= x ? key : x + (x - key)) + depth + slack;
}

// The first key that is not below the bound, searched downwards from place.
template <typename R>
int64_t search_down(const Data<R>& data, int64_t place, double bound) {
  int64_t step = 1, high = place;
  for (int k = 0; k < 8; ++k) {
    if (high == 0 || data.key[high - 1] < bound) return high;
    --high;
  }
  while (high - step >= 0 && !(data.key[high - step] < bound)) {
    high -= step;
    step *= 2;
  }
  const int64_t low = std::max<int64_t>(0, high - step);
  return low + lower_bound(data.key + low, high - low, bound);
}

// Keys behind an edge for rows of a level, the nearest of which is `apart` away.
template <typename R>
Edge<R> edge_of(const Data<R>& data, const Plan& plan, int64_t edge, int side, int level, double apart) {
  const double span = plan.log_span + data.weight_span + 8, distance = apart * plan.scale;
  const double depth = 2 * span / (std::sqrt(distance * distance + 2 * span) + distance);
  const double widest = 2 * (data.key_range.high - data.key_range.low) + 1e-300;
  const double half = std::fmin(widest, plan.scale > 0 ? std::ldexp(1 / plan.scale, -level) : INFINITY);
  return Edge<R>(data.key, data.keys, edge, side, half, plan.scale > 0 ? depth / plan.scale : INFINITY,
                 Accuracy<R>::kFarTerms);
}

inline int level_of(double distance) {
  return distance <= kLevelZero ? 0 : static_cast<int>(std::ceil(std::log2(distance / kLevelZero)));
}

// Whether R has the range for sums one by one (kernels/near_rows.h).
template <typename R>
bool near_suits(const Data<R>& data, const Plan& plan) {
  const double magnitude = std::fmax(data.key_range.magnitude(), data.query_range.magnitude());
  if (magnitude * plan.scale > kNearMost) return false;
  const double size = data.channels == 1 ? data.values[0].magnitude() : 0;
  if (sizeof(R) == 4 && size > 0 && std::log(size) - data.weight_span < kNearLeastCharge) return false;
  return data.channels == 1 && data.weight_span < kNearWeightSpan && data.weight_factor < 1e38 &&
         plan.scale > kNearLeast && plan.scale < 1 / kNearLeast && magnitude * plan.scale * plan.scale < 1e36 &&
         size < kNearMostValue;
}

template <typename R, typename Finish>
class RowPass {
 public:
  RowPass(const Data<R>& data, const Plan& plan, const Cells<R>& cells, bool expanded, const Finish& finish)
      : data_(data),
        plan_(plan),
        cells_(cells),
        expanded_(expanded),
        finish_(finish),
        columns_(data.channels + 1),
        slots_(plan.orders),
        near_counts_(near_suits(data, plan)),
        table_(fgt_kernels<R>()) {}

  void run(bool serial) {
    const int64_t chunks = (data_.queries + kChunk - 1) / kChunk;
    std::vector<std::vector<int64_t>> far(chunks);
    parallel_blocks(chunks, serial, [&](int64_t chunk) { run_chunk(chunk, far[chunk]); });
    std::vector<int64_t> rows;
    for (const auto& part : far) rows.insert(rows.end(), part.begin(), part.end());
    if (!rows.empty()) run_far(rows, serial);
  }

 private:
  // What a thread needs to sum rows directly.
  struct Scratch {
    std::vector<double> charge, sums, block;
    int64_t place = 0;  // a lower bound of the rows to come
    bool placed = false;
  };

  // Sums of expanded rows [begin, end), which get their results together.
  struct Expanded {
    std::vector<double> sums;  // (slots, columns, kPaddedRows)
    int64_t begin = 0, end = 0;

    explicit Expanded(int columns) : sums(columns * kPaddedRows) {}
    void finish(const Finish& to) {
      if (begin < end) to(begin, end - begin, sums.data(), kPaddedRows, nullptr);
      begin = end;
    }
  };

  auto loader() const {
    return [this](int64_t begin, int64_t n, double* charge, int64_t pitch) { data_.load(begin, n, charge, pitch); };
  }

  void run_chunk(int64_t chunk, std::vector<int64_t>& far) const {
    const int64_t begin = chunk * kChunk, end = std::min(data_.queries, begin + kChunk);
    const R* const x = data_.query;
    const double reach = plan_.scale > 0 ? plan_.window / plan_.scale : INFINITY;
    const auto load = loader();
    Scratch scratch;
    if (!expanded_) {
      direct(begin, end, scratch, far);
      return;
    }
    Expansion<R, decltype(load)> expansion(plan_, cells_, data_.key, data_.keys, columns_, !data_.weight, load);
    Expanded expanded(slots_ * columns_);
    std::vector<double> sums(near_counts_ ? slots_ * columns_ * kPaddedRows : 0);
    std::vector<double> apart(near_counts_ ? kPaddedRows : 0);
    const double per_pair = 4.0 * ((columns_ + 1) / 2), per_term = 0.3 * columns_ * slots_;
    int64_t window = lower_bound(data_.key, data_.keys, static_cast<double>(x[begin]) - reach);
    for (int64_t i = begin; i < end;) {
      window = gallop(data_.key, data_.keys, window, static_cast<double>(x[i]) - reach);
      if (near_counts_ && few_keys(i, std::min(i + kGroup, end), window, reach)) {
        const int64_t rows = near(i, std::min(end, i + kEvaluated), sums, apart, scratch);
        if (rows > 0) finish_(i, rows, sums.data(), kPaddedRows, apart.data());
        i += rows;
        if (rows > 0) continue;
      }
      const int64_t few = std::min(i + 2 * kGroup, end);
      const int64_t last = window + 6 * kGroup;
      if (last >= data_.keys || static_cast<double>(data_.key[last]) > static_cast<double>(x[few - 1]) + reach) {
        if (data_.keys > 6 * kGroup) {
          direct(i, few, scratch, far);
          i = few;
          continue;
        }
      }
      const int64_t box = plan_.box_of(x[i]);
      int64_t stop = gallop(x, end, i, plan_.lower_edge(box + 1));
      if (!plan_.has_edges(box)) {
        stop = std::max(stop, few);
        direct(i, stop, scratch, far);
        i = stop;
        continue;
      }
      expansion.move_to(box);
      const double rows = static_cast<double>(stop - i);
      const double one_by_one = rows * static_cast<double>(expansion.points()) * per_pair;
      const double by_series =
          (rows + static_cast<double>(expansion.translations()) * plan_.terms) * plan_.terms * per_term;
      if (one_by_one <= by_series) {
        direct(i, stop, scratch, far);
      } else {
        double error = plan_.tail_error * static_cast<double>(data_.keys);
        const double* const local = expansion.expand(&error);
        for (int64_t row = i; row < stop; row = expanded.end) {
          evaluate(row, std::min(stop, row + kEvaluated), plan_.centre(box), local, error, expanded, scratch, far);
        }
      }
      i = stop;
    }
    expanded.finish(finish_);
  }

  // Whether near() is likely to serve row i: not too many keys in its window, which begins at `window`.
  bool few_keys(int64_t i, int64_t stop, int64_t window, double reach) const {
    const double x = data_.query[i], last = data_.query[stop - 1];
    const auto beyond = [&](int64_t place, double bound) { return place >= data_.keys || data_.key[place] > bound; };
    const bool sparse = !beyond(window + kNearSpread, last - reach);
    const int64_t most = sparse ? kAloneKeys : kNearKeys;
    return beyond(window + most + most / 4, x + reach);
  }

  // Sums rows one by one as long as few keys count for them; returns how many it summed.
  int64_t near(int64_t begin, int64_t end, std::vector<double>& sums, std::vector<double>& apart,
               Scratch& scratch) const {
    place_at(begin, scratch);
    FgtNear<R> task;
    task.x = data_.query + begin;
    task.rows = end - begin;
    task.first_row = begin;
    task.key = data_.key;
    task.keys = data_.keys;
    task.place = scratch.place;
    task.value = data_.value;
    task.value_stride = data_.row_stride;
    task.centre = static_cast<R>(data_.centre[0]);
    task.weight = data_.weight;
    task.weight_factor = static_cast<R>(data_.weight_factor);
    task.exclude = data_.exclude;
    task.excluded = data_.exclude && (data_.keys_moved || data_.rows_moved) ? data_.excluded_places() + begin : nullptr;
    task.scale = plan_.scale;
    task.log_span = plan_.log_span + data_.weight_span;
    task.near_span = std::min(task.log_span, std::log(kFewKeys / (Accuracy<R>::kAccept / 4)) + data_.weight_span);
    task.level_zero = kLevelZero;
    task.most = kNearKeys;
    task.most_alone = kAloneKeys;
    task.spread = kNearSpread;
    task.few = kFewKeys;
    task.offsets = plan_.offsets;
    task.scores = plan_.scores;
    task.sums = sums.data();
    task.apart = apart.data();
    task.sums_pitch = kPaddedRows;
    return table_.near(task);
  }

  // Adds rows [begin, end) of a box, at most kEvaluated, to those that wait for their results. Rows that are not
  // accurate enough are summed again.
  void evaluate(int64_t begin, int64_t end, double centre, const double* local, double error, Expanded& expanded,
                Scratch& scratch, std::vector<int64_t>& far) const {
    if (expanded.end != begin || end - expanded.begin > kEvaluated) expanded.finish(finish_);
    if (expanded.begin == expanded.end) expanded.begin = begin;
    expanded.end = end;
    double* const sums = expanded.sums.data() + (begin - expanded.begin);
    FgtEvaluate<R> task;
    task.x = data_.query + begin;
    task.n = end - begin;
    task.centre = centre;
    task.scale = plan_.to_local();
    task.local = local;
    task.series = slots_ * columns_;
    task.terms = plan_.terms;
    task.pitch = plan_.pitch;
    task.sums = sums;
    task.sums_pitch = kPaddedRows;
    table_.evaluate(task);
    double least = error / Accuracy<R>::kAccept;
    if (data_.exclude) {
      // What is left must not be small beside what was taken away.
      if (data_.leaves_out_queries()) subtract_equal(begin, end, sums);
      for (int64_t i = begin; i < end && !data_.leaves_out_queries(); ++i) {
        double* const row = sums + (i - begin);
        const double own = subtract_own(i, 0, row, kPaddedRows);
        if (!keeps_digits(i, own, row, kPaddedRows)) row[0] = -1;
      }
      least = std::fmax(least, 0);
    }
    int bad = 0;
    for (int64_t i = 0; i < end - begin; ++i) bad |= !(sums[i] >= least);
    if (!bad) return;
    // Runs of rows that are accurate enough, and of rows that have to be summed again.
    expanded.end = begin;
    expanded.finish(finish_);
    for (int64_t i = begin; i < end;) {
      const bool good = sums[i - begin] >= least;
      int64_t stop = i + 1;
      while (stop < end && (sums[stop - begin] >= least) == good) ++stop;
      if (good) {
        finish_(i, stop - i, sums + (i - begin), kPaddedRows, nullptr);
      } else {
        direct(i, stop, scratch, far);
      }
      i = stop;
    }
    expanded.begin = expanded.end = end;
  }

  // Takes keys that are the queries themselves out of their sums.
  void subtract_equal(int64_t begin, int64_t end, double* sums) const {
    const int64_t n = end - begin;
    double charge[kEvaluated];
    for (int64_t i = 0; i < n; ++i) charge[i] = data_.weight ? data_.weight_of(begin + i) : 1;
    for (int64_t i = 0; i < n; ++i) {
      const double left = sums[i] - charge[i];
      sums[i] = left >= 1e-3 * charge[i] ? left : -1;
    }
    for (int c = 0; c < data_.channels; ++c) {
      double* const column = sums + (c + 1) * kPaddedRows;
      for (int64_t i = 0; i < n; ++i) {
        const double own = charge[i] * data_.value_of(begin + i, c);
        column[i] -= own;
        sums[i] = kMostOwnValue * std::fabs(column[i]) >= std::fabs(own) ? sums[i] : -1;
      }
    }
  }

  // Whether sums that the excluded key was taken out of, whose share of the total was `own`, are not small beside that.
  bool keeps_digits(int64_t i, double own, const double* sums, int64_t pitch) const {
    bool keeps = sums[0] >= 1e-3 * own;
    const int64_t j = data_.excluded(i);
    for (int c = 0; j >= 0 && c < data_.channels; ++c) {
      keeps &= kMostOwnValue * std::fabs(sums[(c + 1) * pitch]) >= own * std::fabs(data_.value_of(j, c));
    }
    return keeps;
  }

  // Takes the excluded key out of sums that are relative to x - apart; returns its share of the total.
  double subtract_own(int64_t i, double apart, double* sums, int64_t pitch) const {
    const int64_t j = data_.excluded(i);
    if (j < 0) return 0;
    const double x = data_.query[i], u = data_.key[j];
    if (x == u && apart == 0) {
      const double charge = data_.weight_of(j);
      sums[0] -= charge;
      for (int c = 0; c < data_.channels; ++c) sums[(c + 1) * pitch] -= charge * data_.value_of(j, c);
      return charge;
    }
    const double offset = (x - apart) - u, score = score_of(x, x - apart, u);
    const double weight = std::exp(-std::fmin(1400.0, std::fmax(-1400.0, score * plan_.scale * plan_.scale)) / 2);
    for (int column = 0; column < columns_; ++column) {
      const double charge = weight * data_.weight_of(j) * (column ? data_.value_of(j, column - 1) : 1);
      int slot = 0;
      sums[(slot++ * columns_ + column) * pitch] -= charge;
      if (plan_.offsets) sums[(slot++ * columns_ + column) * pitch] -= charge * offset;
      if (plan_.scores) sums[(slot++ * columns_ + column) * pitch] -= charge * score;
    }
    return weight * data_.weight_of(j);
  }

  // Moves the scratch's place to the row, about; rows must not descend.
  void place_at(int64_t row, Scratch& scratch) const {
    const double x = data_.query[row];
    scratch.place =
        scratch.placed ? gallop(data_.key, data_.keys, scratch.place, x) : lower_bound(data_.key, data_.keys, x);
    scratch.placed = true;
  }

  void direct(int64_t begin, int64_t end, Scratch& scratch, std::vector<int64_t>& far) const {
    place_at(begin, scratch);
    Nearest found[kGroup];
    double reference[kGroup], apart[kGroup];
    for (int64_t first = begin; first < end; first += kGroup) {
      const int64_t rows = std::min(kGroup, end - first);
      double low = INFINITY, high = -INFINITY, lows[kGroup], highs[kGroup];
      for (int64_t k = 0; k < rows; ++k) {
        found[k] = nearest(data_, plan_, first + k, scratch.place);
        scratch.place = found[k].place;
        const double x = data_.query[first + k];
        reference[k] = found[k].level_zero ? x : found[k].key;
        apart[k] = x - reference[k];
        // Windows ascend with the rows, where none leaves out a key.
        if (k > 0 && k < rows - 1 && !data_.exclude) continue;
        window_of(data_, plan_, x, found[k].key, &lows[k], &highs[k]);
        low = std::fmin(low, lows[k]);
        high = std::fmax(high, highs[k]);
      }
      const int64_t window_begin = search_down(data_, found[0].place, low);
      int64_t window_end = found[rows - 1].place;
      for (int k = 0; k < 8 && window_end < data_.keys && data_.key[window_end] < high; ++k) ++window_end;
      window_end = gallop(data_.key, data_.keys, window_end, high);
      if (window_end - window_begin <= kDirectKeys) {
        sum_rows(first, rows, reference, window_begin, window_end, scratch);
        finish_(first, rows, scratch.sums.data(), kGroup, apart);
        continue;
      }
      for (int64_t k = 0; k < rows; ++k) {
        window_of(data_, plan_, data_.query[first + k], found[k].key, &lows[k], &highs[k]);
        const int64_t own_begin = search_down(data_, found[k].place, lows[k]);
        const int64_t own_end = gallop(data_.key, data_.keys, found[k].place, highs[k]);
        if (own_end - own_begin > kDirectKeys) {
          far.push_back(first + k);
          continue;
        }
        sum_rows(first + k, 1, reference + k, own_begin, own_end, scratch);
        finish_(first + k, 1, scratch.sums.data(), kGroup, apart + k);
      }
    }
  }

  // Sums of up to kGroup rows over the keys of a window, into scratch.sums.
  void sum_rows(int64_t first, int64_t rows, const double* reference, int64_t begin, int64_t end,
                Scratch& scratch) const {
    const int64_t size = slots_ * columns_ * kGroup;
    scratch.charge.resize(columns_ * kDirectKeys);
    scratch.block.resize(size);
    scratch.sums.assign(size, 0.0);
    int64_t excluded[kGroup];
    for (int64_t part = begin; part < end; part += kDirectKeys) {
      const int64_t n = std::min(kDirectKeys, end - part);
      data_.load(part, n, scratch.charge.data(), kDirectKeys);
      FgtDirect<R> task;
      task.target = data_.query + first;
      task.reference = reference;
      for (int64_t k = 0; data_.exclude && k < rows; ++k) excluded[k] = data_.excluded(first + k) - part;
      task.excluded = data_.exclude ? excluded : nullptr;
      task.targets = rows;
      task.source = data_.key + part;
      task.sources = n;
      task.charge = scratch.charge.data();
      task.pitch = kDirectKeys;
      task.columns = columns_;
      task.scale = plan_.scale;
      task.offsets = plan_.offsets;
      task.scores = plan_.scores;
      task.sums = scratch.block.data();
      task.sums_pitch = kGroup;
      table_.direct(task);
      for (int64_t k = 0; k < size; ++k) scratch.sums[k] += scratch.block[k];
    }
  }

  // Rows with more keys in their windows than they could visit one by one. Keys on each side of the gap that a row lies
  // in are summed apart, relative to the key at the gap's edge.
  void run_far(const std::vector<int64_t>& rows, bool serial) const {
    const int64_t count = static_cast<int64_t>(rows.size()), size = slots_ * columns_;
    std::vector<Nearest> found(count);
    parallel_blocks((count + kChunk - 1) / kChunk, serial, [&](int64_t block) {
      const int64_t end = std::min(count, (block + 1) * kChunk);
      int64_t hint = lower_bound(data_.key, data_.keys, static_cast<double>(data_.query[rows[block * kChunk]]));
      for (int64_t k = block * kChunk; k < end; ++k) {
        found[k] = nearest(data_, plan_, rows[k], hint);
        hint = found[k].place;
      }
    });
    Buffer<double> sums(2 * size * count);
    const auto distance = [&](int64_t k, int side) -> double {  // from the edge, in user units; < 0 if there is none
      const int64_t edge = side ? found[k].place : found[k].place - 1;
      if (edge < 0 || edge >= data_.keys) return -1;
      return std::fabs(static_cast<double>(data_.query[rows[k]]) - static_cast<double>(data_.key[edge]));
    };
    // Runs of rows with the same edge and level.
    std::vector<FarGroup> groups;
    for (int side = 0; side < 2; ++side) {
      for (int64_t k = 0; k < count; ++k) {
        const double apart = distance(k, side), other = distance(k, 1 - side);
        const int64_t edge = side ? found[k].place : found[k].place - 1;
        if (apart < 0) continue;
        if (other >= 0 && apart > other) {  // may be negligible
          const double x = data_.query[rows[k]], further = data_.key[edge],
                       nearer = data_.key[side ? edge - 1 : edge + 1];
          const double excess = score_of(x, nearer, further) * plan_.scale * plan_.scale / 2;
          if (excess > plan_.log_span + data_.weight_span + (data_.exclude ? 8 : 0)) continue;
        }
        const int level = level_of(apart * plan_.scale);
        if (groups.empty() || groups.back().side != side || groups.back().edge != edge ||
            groups.back().level != level || groups.back().end != k || groups.back().end - groups.back().begin >= 4096) {
          groups.push_back({edge, side, level, k, k, INFINITY});
        }
        groups.back().end = k + 1;
        groups.back().nearest = std::fmin(groups.back().nearest, apart);
      }
    }
    std::fill(sums.get(), sums.get() + 2 * size * count, 0.0);
    parallel_blocks(static_cast<int64_t>(groups.size()), serial,
                    [&](int64_t g) { sum_far(rows, groups[g], count, sums.get()); });
    parallel_blocks((count + kChunk - 1) / kChunk, serial, [&](int64_t block) {
      const int64_t end = std::min(count, (block + 1) * kChunk);
      std::vector<double> row(size);
      Scratch scratch;
      for (int64_t k = block * kChunk; k < end; ++k) {
        if (!combine(rows[k], found[k], sums.get() + k, count, row.data())) sum_all(rows[k], found[k], scratch, row);
        const double apart = found[k].level_zero ? 0 : data_.query[rows[k]] - found[k].key;
        finish_(rows[k], 1, row.data(), 1, &apart);
      }
    });
  }

  // Brings the sums of both sides to the row's own reference and takes out the excluded key. False if that would cost
  // digits.
  bool combine(int64_t i, const Nearest& found, const double* sums, int64_t count, double* row) const {
    const int64_t size = slots_ * columns_;
    std::fill(row, row + size, 0.0);
    const double x = data_.query[i], reference = found.level_zero ? x : found.key;
    for (int side = 0; side < 2; ++side) {
      const double* const from = sums + side * size * count;
      const int64_t edge = side ? found.place : found.place - 1;
      if (edge < 0 || edge >= data_.keys || from[0] == 0) continue;
      const double u = data_.key[edge], offset = reference - u, score = score_of(x, reference, u);
      const double exponent = -score * plan_.scale * plan_.scale / 2;
      if (exponent > 500) return false;
      const double factor = std::exp(exponent);
      for (int column = 0; column < columns_; ++column) {
        const double total = factor * from[column * count];
        int slot = 0;
        row[slot++ * columns_ + column] += total;
        if (plan_.offsets) {
          row[slot * columns_ + column] += factor * from[(slot * columns_ + column) * count] + offset * total;
          ++slot;
        }
        if (plan_.scores) {
          row[slot * columns_ + column] += factor * from[(slot * columns_ + column) * count] + score * total;
        }
      }
    }
    if (!data_.exclude) return true;
    const double own = subtract_own(i, x - reference, row, 1);
    return keeps_digits(i, own, row, 1);
  }

  void sum_all(int64_t i, const Nearest& found, Scratch& scratch, std::vector<double>& row) const {
    double low, high;
    const double x = data_.query[i], reference = found.level_zero ? x : found.key;
    window_of(data_, plan_, x, found.key, &low, &high);
    const int64_t begin = lower_bound(data_.key, data_.keys, low), end = lower_bound(data_.key, data_.keys, high);
    sum_rows(i, 1, &reference, begin, end, scratch);
    for (int64_t k = 0; k < slots_ * columns_; ++k) row[k] = scratch.sums[k * kGroup];
  }

  struct FarGroup {
    int64_t edge;  // place of the key at the gap's edge
    int side;      // 0: keys below the rows, 1: above
    int level;
    int64_t begin, end;  // of the far rows
    double nearest;      // least distance of a row from the edge
  };

  void sum_far(const std::vector<int64_t>& rows, const FarGroup& group, int64_t count, double* sums) const {
    const Edge<R> edge = edge_of(data_, plan_, group.edge, group.side, group.level, group.nearest);
    const std::vector<double> charge = edge.compress(columns_, loader());
    const int64_t n = group.end - group.begin, pitch = padded(n);
    std::vector<double> apart(n), reference(n, 0.0), block(slots_ * columns_ * pitch);
    for (int64_t k = 0; k < n; ++k) {
      apart[k] = std::fabs(static_cast<double>(data_.query[rows[group.begin + k]]) -
                           static_cast<double>(data_.key[group.edge]));
    }
    FgtDirect<double> task;
    task.target = apart.data();
    task.reference = reference.data();
    task.excluded = nullptr;
    task.targets = n;
    task.source = edge.position();
    task.sources = edge.sources();
    task.charge = charge.data();
    task.pitch = edge.sources();
    task.columns = columns_;
    task.scale = plan_.scale;
    task.offsets = plan_.offsets;
    task.scores = plan_.scores;
    task.sums = block.data();
    task.sums_pitch = pitch;
    fgt_kernels<double>().direct(task);
    double* const out = sums + group.side * slots_ * columns_ * count + group.begin;
    for (int slot = 0; slot < slots_; ++slot) {
      // Distances behind the edge are against the direction of x on the side above.
      const double sign = slot == 1 && plan_.offsets && group.side ? -1 : 1;
      for (int c = 0; c < columns_; ++c) {
        const int64_t column = slot * columns_ + c;
        for (int64_t k = 0; k < n; ++k) out[column * count + k] = sign * block[column * pitch + k];
      }
    }
  }

  const Data<R>& data_;
  const Plan& plan_;
  const Cells<R>& cells_;
  const bool expanded_;
  const Finish& finish_;
  const int columns_, slots_;
  const bool near_counts_;  // whether rows with few keys have a kernel
  const FgtKernels<R>& table_;
};

}  // namespace fgt
}  // namespace nwfast
