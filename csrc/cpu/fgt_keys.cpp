// The key side of the backward pass: the transposed sums. Rows become sources, keys become targets.
//
// With g_i the gradient of a row's output, S_i its total, p_ij = a_j exp(s_ij) / S_i and u_ij = <g_i, v_j - out_i> +
// lse_grad_i, a key needs
//   A_j = sum_i exp(s_ij) g_i / S_i (by channel)  and  E_j = sum_i exp(s_ij) (<g_i, out_i> - lse_grad_i) / S_i
// and the same sums with a factor (x_i - k_j): grad_value = a_j A_j, grad_key_weight = <v_j, A_j> - E_j, grad_key =
// a_j w^2 (<v_j, A'_j> - E'_j).
//
// Rows whose total is not small beside the largest weight need no shift and are expanded or summed as in the forward
// pass, with the roles exchanged. Other rows are relative to their nearest key: those with few keys in their window are
// gathered by each key, the rest are summed at the compressed keys behind the edges of their gap and handed on from
// there. A block of keys owns its sums, and adds to them in a fixed order.

#include "fgt_near_rows.h"

namespace nwfast {
namespace fgt {
namespace {

constexpr int64_t kServed = 2048;     // keys of one task, whose sums stay in a core's cache
constexpr int64_t kTargets = 16;      // keys that gather from the same rows
constexpr double kSmallTotal = 0.05;  // beside the largest weight; e^-2 / 2 is the least that level zero can have
constexpr double kSmallShift = 12;    // binary digits by which shifts make most totals small

// Keys to be served: those with a weight, or those without.
template <typename R>
struct Targets {
  const R* x;
  int64_t n;
  bool weighted;
  const int64_t* place;      // of keys without a weight, by the caller's numbers; -1 for others
  const int64_t* excluding;  // the row that leaves out a key without a weight
};

// Rows whose parts each key gathers one by one.
struct Gathered {
  std::vector<int64_t> row;
  std::vector<double> x, reference, low, high;  // windows: of all rows up to one (high), from one on (low)
  std::vector<double> grad, mean;               // (channels, rows); the gradient is divided by the row's total
  std::vector<double> lse_grad;
};

template <typename R>
class KeyPass {
 public:
  KeyPass(const Problem& problem, const BackwardTask<R>& task, int64_t b, bool serial)
      : problem_(problem), task_(task), b_(b), serial_(serial), table_(fgt_kernels<R>()) {}

  bool run() {
    if (!data_.prepare(problem_, b_, serial_) || !data_.bad_rows.empty()) return false;
    channels_ = data_.channels;
    columns_ = channels_ + 1;
    const int64_t base = b_ * problem_.keys;
    for (int64_t j = 0; j < problem_.keys && (data_.keys == 0 || !data_.dropped.empty()); ++j) {
      for (int c = 0; task_.grad_value && c < channels_; ++c) task_.grad_value[(base + j) * channels_ + c] = 0;
      if (task_.grad_key) task_.grad_key[base + j] = 0;
      if (task_.grad_key_weight) task_.grad_key_weight[base + j] = 0;
    }
    if (data_.keys == 0) return true;
    make_plan<R>(data_.extent(columns_, task_.grad_key != nullptr, false), plan_);
    slots_ = plan_.orders;
    expanded_ = data_.key_range.magnitude() / plan_.box < static_cast<double>(kMostBoxes);
    near_ = NearRows<R>::promising(data_, plan_) && read_near_rows();
    if (!near_) {
      if (!read_rows()) return false;
      if (expanded_ && data_.queries > 0) {
        cells_.compress(plan_, data_.query, data_.queries, columns_, false, loader(), serial_);
        fill_matrices(plan_);
      }
    }
    sort_far_rows();
    serve({data_.key, data_.keys, true, nullptr, nullptr});
    if (task_.grad_key_weight && !data_.dropped.empty()) {
      const int64_t n = static_cast<int64_t>(data_.dropped.size());
      Buffer<R> x(n);
      const int64_t offset = problem_.key.offset(problem_.batch, b_);
      for (int64_t j = 0; j < n; ++j) {
        read(problem_.key, offset + data_.dropped[j] * problem_.key.row_stride, 1, 0, &x[j]);
      }
      Buffer<int64_t> place(problem_.keys), excluding(n);
      for (int64_t j = 0; j < problem_.keys; ++j) place[j] = -1;
      for (int64_t j = 0; j < n; ++j) place[data_.dropped[j]] = j;
      for (int64_t i = 0; data_.exclude && i < data_.queries; ++i) {
        const int64_t j = place[data_.original_row(i)];
        if (j >= 0) excluding[j] = i;
      }
      serve({x.get(), n, false, place.get(), excluding.get()});
    }
    return true;
  }

 private:
  auto loader() const {
    return [this](int64_t begin, int64_t n, double* charge, int64_t pitch) {
      for (int c = 0; c < columns_; ++c) {
        std::memcpy(charge + c * pitch, charge_.get() + c * data_.queries + begin, n * sizeof(double));
      }
    };
  }

  // Charges of the rows that need no shift, zeros for others, which are listed. False if a gradient is not finite.
  bool read_rows() {
    const int64_t n = data_.queries, chunks = (n + kChunk - 1) / kChunk;
    charge_.allocate(columns_ * n);
    std::vector<std::vector<int64_t>> far(chunks);
    std::vector<char> finite(chunks, 1);
    parallel_blocks(chunks, serial_, [&](int64_t chunk) {
      const int64_t end = std::min(n, (chunk + 1) * kChunk);
      for (int64_t begin = chunk * kChunk; begin < end; begin += kBlock) {
        finite[chunk] &= read_block(begin, std::min(kBlock, end - begin), far[chunk]);
      }
    });
    far_.clear();
    for (const auto& part : far) far_.insert(far_.end(), part.begin(), part.end());
    return std::find(finite.begin(), finite.end(), 0) == finite.end();
  }

  bool read_block(int64_t begin, int64_t n, std::vector<int64_t>& far) {
    double total[kBlock], shift[kBlock], plain[kBlock], share[kBlock], mean[kBlock];
    double *const charges = charge_.get() + begin, *const sum = charges + channels_ * data_.queries;
    if (read_totals(begin, n, total, shift)) {
      for (int64_t k = 0; k < n; ++k) {
        const bool small = shift[k] > kSmallShift && total[k] < kSmallTotal * std::exp2(kSmallShift);
        plain[k] = small ? 0 : shift[k] != 0 ? total[k] * std::exp2(-shift[k]) : total[k];
      }
    } else {
      std::copy(total, total + n, plain);
    }
    int odd = 0, all_near = 1;
    for (int64_t k = 0; k < n; ++k) {
      odd |= !(total[k] >= 0);
      all_near &= plain[k] >= kSmallTotal;
      share[k] = plain[k] >= kSmallTotal ? 1 / plain[k] : 0;
      sum[k] = 0;
    }
    for (int64_t k = 0; !all_near && k < n; ++k) {
      if (!(plain[k] >= kSmallTotal) && total[k] > 0) far.push_back(begin + k);
    }
    if (task_.grad_lse.data) {
      read_rows_of(task_.grad_lse, 0, begin, n, sum);
      for (int64_t k = 0; k < n; ++k) sum[k] = -sum[k];
    }
    for (int c = 0; c < channels_; ++c) {
      double* const grad = charges + c * data_.queries;
      read_rows_of(task_.grad_out, c * task_.grad_out.column_stride, begin, n, grad);
      read_means(begin, n, c, mean);
      for (int64_t k = 0; k < n; ++k) sum[k] += grad[k] * mean[k];
    }
    for (int c = 0; c < columns_; ++c) {
      double* const charge = charges + c * data_.queries;
      if (all_near) {
        double zero = 0;  // NaN where a charge is infinite or NaN
        for (int64_t k = 0; k < n; ++k) {
          zero += charge[k] * 0;
          charge[k] *= share[k];
        }
        odd |= zero != 0;
        continue;
      }
      for (int64_t k = 0; k < n; ++k) {
        // A row without any key has no gradient, and no output.
        odd |= total[k] > 0 && !(std::fabs(charge[k]) < INFINITY);
        charge[k] = share[k] > 0 ? charge[k] * share[k] : 0;
      }
    }
    return !odd;
  }

  // Totals relative to the rows' references, and the shifts from those to the rows themselves; whether there is any.
  bool read_totals(int64_t begin, int64_t n, double* total, double* shift) const {
    const double* const state = task_.state + 2 * b_ * problem_.queries;
    if (data_.rows_moved) {
      for (int64_t k = 0; k < n; ++k) {
        const int64_t row = data_.original_row(begin + k);
        shift[k] = state[2 * row];
        total[k] = state[2 * row + 1];
      }
    } else {
      for (int64_t k = 0; k < n; ++k) shift[k] = state[2 * (begin + k)];
      for (int64_t k = 0; k < n; ++k) total[k] = state[2 * (begin + k) + 1];
    }
    int shifted = 0;
    for (int64_t k = 0; k < n; ++k) {
      total[k] *= data_.weight_factor;
      shifted |= shift[k] != 0;
    }
    return shifted != 0;
  }
  void read_means(int64_t begin, int64_t n, int c, double* mean) const {
    const R* const out = task_.out + b_ * problem_.queries * channels_ + c;
    const double centre = data_.centre[c];
    if (channels_ == 1 && !data_.rows_moved) {
      for (int64_t k = 0; k < n; ++k) mean[k] = static_cast<double>(out[begin + k]) - centre;
    } else {
      for (int64_t k = 0; k < n; ++k) {
        mean[k] = static_cast<double>(out[data_.original_row(begin + k) * channels_]) - centre;
      }
    }
  }

  // The gradients of rows, in the order of the data.
  void read_rows_of(const View& view, int64_t offset, int64_t begin, int64_t n, double* out) const {
    offset += view.offset(problem_.batch, b_);
    if (data_.rows_moved) {
      nwfast::gather(view, offset, data_.row_order.get() + begin, n, view.row_stride, out);
    } else {
      read(view, offset + begin * view.row_stride, n, view.row_stride, out);
    }
  }

  // (g_i, <g_i, out_i - base> - lse_grad_i), not divided by the total; outputs and base are centred.
  void charge_of(int64_t i, const double* base, double* charge) const {
    const int64_t row = b_ * problem_.queries + data_.original_row(i);
    double sum = 0;
    for (int c = 0; c < channels_; ++c) {
      charge[c] = grad_of(i, c);
      sum += charge[c] * (mean_of(row, c) - (base ? base[c] : 0));
    }
    charge[channels_] = sum - lse_grad_of(i);
  }
  double mean_of(int64_t row, int c) const {
    return static_cast<double>(task_.out[row * channels_ + c]) - data_.centre[c];
  }
  double grad_of(int64_t i, int c) const {
    const int64_t original = data_.original_row(i);
    double g = 0;
    read(task_.grad_out,
         task_.grad_out.offset(problem_.batch, b_) + original * task_.grad_out.row_stride +
             c * task_.grad_out.column_stride,
         1, 0, &g);
    return g;
  }
  double lse_grad_of(int64_t i) const {
    if (!task_.grad_lse.data) return 0;
    double g = 0;
    read(task_.grad_lse, task_.grad_lse.offset(problem_.batch, b_) + data_.original_row(i) * task_.grad_lse.row_stride,
         1, 0, &g);
    return g;
  }

  // Rows for keys to visit one by one; those that R is not precise enough for are far ones. False if keys would visit
  // too many, or a gradient is not finite.
  bool read_near_rows() {
    const int64_t chunks = (data_.queries + kChunk - 1) / kChunk;
    near_rows_.allocate(data_);
    std::vector<std::vector<int64_t>> far(chunks);
    std::vector<char> finite(chunks, 1);
    parallel_blocks(chunks, serial_, [&](int64_t chunk) {
      const int64_t end = std::min(data_.queries, (chunk + 1) * kChunk);
      int64_t hint = lower_bound(data_.key, data_.keys, static_cast<double>(data_.query[chunk * kChunk]));
      for (int64_t begin = chunk * kChunk; begin < end; begin += kBlock) {
        finite[chunk] &= read_near_block(begin, std::min(kBlock, end - begin), hint, far[chunk]);
      }
    });
    far_.clear();
    for (const auto& part : far) far_.insert(far_.end(), part.begin(), part.end());
    return std::find(finite.begin(), finite.end(), 0) == finite.end() &&
           near_rows_.find_ranges(data_.key, data_.keys, serial_);
  }

  bool read_near_block(int64_t begin, int64_t n, int64_t& hint, std::vector<int64_t>& far) {
    double total[kBlock], shift[kBlock], grad[kBlock], mean[kBlock], lse_grad[kBlock] = {};
    read_totals(begin, n, total, shift);
    read_rows_of(task_.grad_out, 0, begin, n, grad);
    if (task_.grad_lse.data) read_rows_of(task_.grad_lse, 0, begin, n, lse_grad);
    read_means(begin, n, 0, mean);
    bool finite = true;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = begin + k;
      finite &= total[k] >= 0;
      if (!(total[k] > 0)) {  // without any key: no gradient
        near_rows_.skip(i);
        continue;
      }
      finite &= std::fabs(grad[k]) < INFINITY && std::fabs(lse_grad[k]) < INFINITY && std::fabs(mean[k]) < INFINITY;
      R reference = data_.query[i];
      if (shift[k] != 0) {
        const Nearest found = nearest(data_, plan_, i, hint);
        hint = found.place;
        if (!found.level_zero) reference = static_cast<R>(found.key);
      }
      const double share = 1 / total[k];
      if ((shift[k] == 0 && total[k] < kSmallTotal) ||
          !near_rows_.put(i, data_.query[i], reference, grad[k] * share, mean[k], lse_grad[k] * share, plan_)) {
        near_rows_.skip(i);
        far.push_back(i);
      }
    }
    return finite;
  }

  // Far rows are gathered one by one, or summed in groups at compressed keys.
  void sort_far_rows() {
    const int64_t count = static_cast<int64_t>(far_.size()), blocks = (count + kChunk - 1) / kChunk;
    found_.resize(count);
    std::vector<char> single(count);
    std::vector<double> lows(count), highs(count);
    std::vector<int64_t> start(blocks + 1, 0);  // of each block among the gathered rows
    parallel_blocks(blocks, serial_, [&](int64_t block) {
      const int64_t first = block * kChunk;
      int64_t hint = lower_bound(data_.key, data_.keys, static_cast<double>(data_.query[far_[first]]));
      for (int64_t k = first; k < std::min(count, first + kChunk); ++k) {
        found_[k] = nearest(data_, plan_, far_[k], hint);
        hint = found_[k].place;
        single[k] = far_window(k, &lows[k], &highs[k]);
        start[block + 1] += single[k];
      }
    });
    for (int64_t block = 0; block < blocks; ++block) start[block + 1] += start[block];
    const int64_t n = start[blocks];
    gathered_.row.resize(n);
    for (auto* numbers : {&gathered_.x, &gathered_.reference, &gathered_.low, &gathered_.high, &gathered_.lse_grad}) {
      numbers->resize(n);
    }
    gathered_.grad.resize(channels_ * n);
    gathered_.mean.resize(channels_ * n);
    parallel_blocks(blocks, serial_, [&](int64_t block) {
      int64_t i = start[block];
      for (int64_t k = block * kChunk; k < std::min(count, (block + 1) * kChunk); ++k) {
        if (single[k]) put_gathered(i++, k, lows[k], highs[k]);
      }
    });
    for (int64_t i = 1; i < n; ++i) gathered_.high[i] = std::fmax(gathered_.high[i], gathered_.high[i - 1]);
    for (int64_t i = n - 2; i >= 0; --i) gathered_.low[i] = std::fmin(gathered_.low[i], gathered_.low[i + 1]);
    make_groups(single);
  }

  // The window of a far row; whether its keys are few enough to be visited one by one.
  bool far_window(int64_t k, double* low, double* high) const {
    const double x = data_.query[far_[k]];
    window_of(data_, plan_, x, found_[k].key, low, high);
    // A total below 1 lets keys of less weight count.
    const double total = total_of(far_[k]);
    if (total < 1 && plan_.scale > 0) {
      const double more = std::sqrt(-2 * std::log(total)) / plan_.scale;
      *low -= more;
      *high += more;
    }
    const int64_t begin = search_down(data_, found_[k].place, *low);
    if (gallop(data_.key, data_.keys, found_[k].place, *high) - begin <= kDirectKeys) return true;
    const int64_t own = data_.excluded(far_[k]);
    return own >= 0 && std::fabs(x - data_.key[own]) <= std::fabs(x - (found_[k].level_zero ? x : found_[k].key));
  }

  // Far row k becomes the i-th of those that keys gather.
  void put_gathered(int64_t i, int64_t k, double low, double high) {
    const int64_t row = far_[k], n = static_cast<int64_t>(gathered_.row.size());
    const double total = total_of(row);
    gathered_.row[i] = k;
    gathered_.x[i] = data_.query[row];
    gathered_.reference[i] = found_[k].level_zero ? gathered_.x[i] : found_[k].key;
    gathered_.low[i] = low;
    gathered_.high[i] = high;
    for (int c = 0; c < channels_; ++c) {
      gathered_.grad[c * n + i] = grad_of(row, c) / total;
      gathered_.mean[c * n + i] = mean_of(b_ * problem_.queries + data_.original_row(row), c);
    }
    gathered_.lse_grad[i] = lse_grad_of(row) / total;
  }

  double total_of(int64_t i) const {
    return task_.state[2 * (b_ * problem_.queries + data_.original_row(i)) + 1] * data_.weight_factor;
  }

  struct Group {
    int64_t place;  // of the key at the edge
    int side, level;
    std::vector<int64_t> rows;  // among the far ones
    double apart;               // least distance of a row from the edge
  };
  struct Field {
    std::unique_ptr<Edge<R>> edge;
    std::vector<double> base;  // the values of the edge's key, which others are taken relative to
    std::vector<double> sums;  // (slots, columns, pitch), at the edge's sources
    int64_t pitch;
  };

  void make_groups(const std::vector<char>& single) {
    in_left_group_.assign(far_.size(), 0);
    for (int side = 0; side < 2; ++side) {
      for (int64_t k = 0; k < static_cast<int64_t>(far_.size()); ++k) {
        if (single[k]) continue;
        const int64_t left = found_[k].place - 1, right = found_[k].place, edge = side ? right : left;
        if (edge < 0 || edge >= data_.keys) continue;
        const double x = data_.query[far_[k]], apart = std::fabs(x - data_.key[edge]);
        const double reference = found_[k].level_zero ? 0 : std::fabs(x - found_[k].key);
        const double excess = (apart - reference) * (apart + reference) * plan_.scale * plan_.scale / 2;
        if (excess > plan_.log_span + data_.weight_span + 8 - std::fmin(0.0, std::log(total_of(far_[k])))) continue;
        const int level = level_of(apart * plan_.scale);
        if (groups_.empty() || groups_.back().side != side || groups_.back().place != edge ||
            groups_.back().level != level) {
          groups_.push_back({edge, side, level, {}, INFINITY});
        }
        groups_.back().rows.push_back(k);
        in_left_group_[k] |= side == 0;
        groups_.back().apart = std::fmin(groups_.back().apart, apart);
      }
    }
    fields_.resize(groups_.size());
    parallel_blocks(static_cast<int64_t>(groups_.size()), serial_,
                    [&](int64_t g) { sum_group(groups_[g], fields_[g]); });
  }

  // The group's sums at the sources of its edge.
  void sum_group(const Group& group, Field& field) const {
    field.edge.reset(new Edge<R>(edge_of(data_, plan_, group.place, group.side, group.level, group.apart)));
    const int64_t n = static_cast<int64_t>(group.rows.size()), targets = field.edge->sources();
    for (int c = 0; c < channels_; ++c) field.base.push_back(data_.value_of(group.place, c));
    std::vector<double> apart(n), reference(n, 0.0), charge(columns_ * n), one(columns_);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = group.rows[i], row = far_[k];
      const double x = data_.query[row], edge = data_.key[group.place];
      const double r = found_[k].level_zero ? x : found_[k].key;
      apart[i] = std::fabs(x - edge);
      // From the edge to the row's own reference.
      const double score = (r - edge) * ((x - edge) + (x - r));
      const double factor = std::exp(-score * plan_.scale * plan_.scale / 2) / total_of(row);
      charge_of(row, field.base.data(), one.data());
      for (int c = 0; c < columns_; ++c) charge[c * n + i] = one[c] * factor;
    }
    field.pitch = padded(targets);
    field.sums.assign(slots_ * columns_ * field.pitch, 0.0);
    FgtGather<double> task;
    task.target = field.edge->position();
    task.targets = targets;
    task.source = apart.data();
    task.reference = reference.data();
    task.sources = n;
    task.charge = charge.data();
    task.pitch = n;
    task.columns = columns_;
    task.scale = plan_.scale;
    task.offsets = plan_.offsets;
    task.sums = field.sums.data();
    task.sums_pitch = field.pitch;
    fgt_kernels<double>().gather(task);
    if (plan_.offsets && group.side) {  // x lies below the keys
      for (int64_t i = columns_ * field.pitch; i < 2 * columns_ * field.pitch; ++i) field.sums[i] = -field.sums[i];
    }
  }

  void serve(const Targets<R>& targets) const {
    parallel_blocks((targets.n + kServed - 1) / kServed, serial_, [&](int64_t chunk) { serve_chunk(targets, chunk); });
  }

  // Of a chunk of keys. The pitch leaves room for what kernels write beyond the last key.
  struct Sums {
    int64_t begin, pitch;
    Buffer<double> near;   // (slots, columns, pitch): A and E, and with factors (k_j - x_i)
    Buffer<double> far;    // (channels + slots, pitch): A, <v, A> - E and <v, A'> - E' of the other rows
    Buffer<double> value;  // (channels, pitch), centred
  };

  void serve_chunk(const Targets<R>& targets, int64_t chunk) const {
    const int64_t begin = chunk * kServed, end = std::min(targets.n, begin + kServed), pitch = padded(end - begin) + 32;
    Sums sums;
    sums.begin = begin;
    sums.pitch = pitch;
    if (!near_) {
      sums.near.allocate(slots_ * columns_ * pitch);
      if (data_.queries > 0) {
        sum_level_zero(targets, begin, end, sums.near.get(), pitch);
      } else {
        std::memset(sums.near.get(), 0, slots_ * columns_ * pitch * sizeof(double));
      }
      if (data_.exclude) subtract_own(targets, begin, end, sums.near.get(), pitch);
    }
    load_values(targets, begin, end, sums);
    if (near_ || !far_.empty()) sums.far.allocate((channels_ + slots_) * pitch);
    if (near_) {
      near_rows_.pull(data_, plan_, begin, end - begin, sums.far.get(), pitch);
    } else if (!far_.empty()) {
      std::memset(sums.far.get(), 0, (channels_ + slots_) * pitch * sizeof(double));
    }
    if (!far_.empty()) {
      GatheredRange range;
      for (int64_t first = begin; first < end; first += kTargets) {
        gather(targets, first, std::min(kTargets, end - first), range, sums);
      }
      for (size_t g = 0; g < groups_.size(); ++g) add_group(targets, groups_[g], fields_[g], begin, end, sums);
    }
    for (int64_t first = begin; first < end; first += kBlock) {
      finish(targets, first, std::min(kBlock, end - first), sums);
    }
  }

  void load_values(const Targets<R>& targets, int64_t begin, int64_t end, Sums& sums) const {
    sums.value.allocate(channels_ * sums.pitch);
    for (int c = 0; c < channels_; ++c) {
      double* const column = sums.value.get() + c * sums.pitch;
      for (int64_t j = begin; targets.weighted && j < end; ++j) column[j - begin] = data_.value_of(j, c);
      for (int64_t j = begin; j < end; ++j) {
        if (targets.weighted) break;
        double value = 0;
        read(problem_.value,
             problem_.value.offset(problem_.batch, b_) + data_.dropped[j] * problem_.value.row_stride +
                 c * problem_.value.column_stride,
             1, 0, &value);
        column[j - begin] = value - data_.centre[c];
      }
      for (int64_t j = end - begin; j < sums.pitch; ++j) column[j] = 0;
    }
  }

  // Rows without a shift.
  void sum_level_zero(const Targets<R>& targets, int64_t begin, int64_t end, double* sums, int64_t pitch) const {
    const R* const u = targets.x;
    const double reach = plan_.scale > 0 ? (plan_.window + 3) / plan_.scale : INFINITY;
    const auto load = loader();
    Expansion<R, decltype(load)> expansion(plan_, cells_, data_.query, data_.queries, columns_, false, load);
    const double per_pair = 4.0 * ((columns_ + 1) / 2), per_term = 0.3 * columns_ * slots_;
    int64_t window = lower_bound(data_.query, data_.queries, static_cast<double>(u[begin]) - reach);
    for (int64_t j = begin; j < end;) {
      int64_t stop = std::min(j + 2 * kGroup, end);
      window = gallop(data_.query, data_.queries, window, static_cast<double>(u[j]) - reach);
      const int64_t last = window + 6 * kGroup;
      bool few = !expanded_ || last >= data_.queries ||
                 static_cast<double>(data_.query[last]) > static_cast<double>(u[stop - 1]) + reach;
      const int64_t box = few ? 0 : plan_.box_of(u[j]);
      if (!few) {
        stop = gallop(u, end, j, plan_.lower_edge(box + 1));
        expansion.move_to(box);
        const double keys = static_cast<double>(stop - j);
        few = keys * static_cast<double>(expansion.points()) * per_pair <=
              (keys + static_cast<double>(expansion.translations()) * plan_.terms) * plan_.terms * per_term;
      }
      if (few) {
        for (; j < stop; j += kGroup) {
          sum_direct(targets, j, std::min(kGroup, stop - j), window, reach, sums + (j - begin), pitch);
        }
      } else {
        FgtEvaluate<R> task;
        task.x = u + j;
        task.n = stop - j;
        task.centre = plan_.centre(box);
        task.scale = plan_.to_local();
        task.local = expansion.expand(nullptr);
        task.series = slots_ * columns_;
        task.terms = plan_.terms;
        task.pitch = plan_.pitch;
        task.sums = sums + (j - begin);
        task.sums_pitch = pitch;
        table_.evaluate(task);
      }
      j = stop;
    }
  }

  void sum_direct(const Targets<R>& targets, int64_t first, int64_t n, int64_t window, double reach, double* sums,
                  int64_t pitch) const {
    const R* const u = targets.x + first;
    const int64_t begin = gallop(data_.query, data_.queries, window, static_cast<double>(u[0]) - reach);
    const int64_t end = gallop(data_.query, data_.queries, begin, static_cast<double>(u[n - 1]) + reach);
    double reference[kGroup];
    for (int64_t k = 0; k < n; ++k) reference[k] = u[k];
    FgtDirect<R> task;
    task.target = u;
    task.reference = reference;
    task.excluded = nullptr;
    task.targets = n;
    task.source = data_.query + begin;
    task.sources = end - begin;
    task.charge = charge_.get() + begin;
    task.pitch = data_.queries;
    task.columns = columns_;
    task.scale = plan_.scale;
    task.offsets = plan_.offsets;
    task.scores = false;
    task.sums = sums;
    task.sums_pitch = pitch;
    table_.direct(task);
  }

  // The row that leaves a key out, if it is among those without a shift.
  void subtract_own(const Targets<R>& targets, int64_t begin, int64_t end, double* sums, int64_t pitch) const {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = targets.weighted ? data_.excluding(j) : targets.excluding[j];
      const double offset = static_cast<double>(data_.query[i]) - static_cast<double>(targets.x[j]);
      const double d = offset * plan_.scale;
      if (!(std::fabs(d) < 40)) continue;
      const double weight = std::exp(-d * d / 2);
      for (int c = 0; c < columns_; ++c) {
        const double term = weight * charge_[c * data_.queries + i];
        sums[c * pitch + j - begin] -= term;
        if (plan_.offsets) sums[(columns_ + c) * pitch + j - begin] += term * offset;
      }
    }
  }

  // The place among the targets of the key that a row leaves out.
  int64_t excluded(const Targets<R>& targets, int64_t row) const {
    return targets.weighted ? data_.excluded(row) : data_.exclude ? targets.place[data_.original_row(row)] : -1;
  }

  // Rows whose windows reach some keys; ascends with the keys.
  struct GatheredRange {
    int64_t begin = -1, end = 0;
  };

  void gather(const Targets<R>& targets, int64_t first, int64_t n, GatheredRange& range, Sums& sums) const {
    const R* const u = targets.x + first;
    const double lowest = u[0], highest = std::nextafter(static_cast<double>(u[n - 1]), INFINITY);
    const int64_t rows = static_cast<int64_t>(gathered_.row.size());
    const double *const low = gathered_.low.data(), *const high = gathered_.high.data();
    const bool found = range.begin >= 0;
    range.begin = found ? gallop(high, rows, range.begin, lowest) : lower_bound(high, rows, lowest);
    range.end = found ? gallop(low, rows, range.end, highest) : lower_bound(low, rows, highest);
    const int64_t begin = range.begin, end = range.end;
    if (begin >= end) return;
    std::vector<int64_t> left_out(data_.exclude ? end - begin : 0);
    for (size_t i = 0; i < left_out.size(); ++i) {
      left_out[i] = excluded(targets, far_[gathered_.row[begin + i]]) - first;
    }
    FgtPull<R> task;
    task.target = u;
    task.targets = n;
    task.value = sums.value.get() + (first - sums.begin);
    task.value_pitch = sums.pitch;
    task.source = gathered_.x.data() + begin;
    task.reference = gathered_.reference.data() + begin;
    task.excluded = left_out.empty() ? nullptr : left_out.data();
    task.sources = end - begin;
    task.grad = gathered_.grad.data() + begin;
    task.mean = gathered_.mean.data() + begin;
    task.lse_grad = gathered_.lse_grad.data() + begin;
    task.pitch = static_cast<int64_t>(gathered_.row.size());
    task.channels = channels_;
    task.scale = plan_.scale;
    task.offsets = plan_.offsets;
    task.sums = sums.far.get() + (first - sums.begin);
    task.sums_pitch = sums.pitch;
    table_.pull(task);
  }

  void add_group(const Targets<R>& targets, const Group& group, const Field& field, int64_t begin, int64_t end,
                 Sums& sums) const {
    if (!targets.weighted) return add_pairs(targets, group, begin, end, sums);
    const int64_t first = std::max(begin, field.edge->keys_begin()), last = std::min(end, field.edge->keys_end());
    if (first >= last) return;
    const int64_t n = last - first;
    std::vector<double> block(slots_ * columns_ * n, 0.0), one(columns_);
    field.edge->distribute(first, last, slots_ * columns_, field.sums.data(), field.pitch, block.data(), n);
    for (size_t i = 0; data_.exclude && i < group.rows.size(); ++i) {
      const int64_t row = far_[group.rows[i]], j = data_.excluded(row);
      if (j < first || j >= last) continue;
      double offset;
      const double weight = weight_between(group.rows[i], data_.key[j], &offset);
      charge_of(row, field.base.data(), one.data());
      for (int c = 0; c < columns_; ++c) {
        block[c * n + j - first] -= weight * one[c];
        if (plan_.offsets) block[(columns_ + c) * n + j - first] -= weight * one[c] * offset;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      double* const out = sums.far.get() + (first - begin) + i;
      for (int slot = 0; slot < slots_; ++slot) {
        const double* const from = block.data() + slot * columns_ * n + i;
        double pulled = -from[channels_ * n];
        for (int c = 0; c < channels_; ++c) {
          pulled += from[c * n] * (sums.value[c * sums.pitch + (first - begin) + i] - field.base[c]);
          if (slot == 0) out[c * sums.pitch] += from[c * n];
        }
        out[(channels_ + slot) * sums.pitch] += pulled;
      }
    }
  }

  // exp of the score relative to the far row's reference, divided by the row's total; and x - u.
  double weight_between(int64_t k, double u, double* offset) const {
    const double x = data_.query[far_[k]], r = found_[k].level_zero ? x : found_[k].key;
    const double exponent = -(r - u) * ((x - u) + (x - r)) * plan_.scale * plan_.scale / 2;
    *offset = x - u;
    return std::exp(std::fmin(exponent, 690.0)) / total_of(far_[k]);
  }

  // Keys without a weight may lie anywhere, also in the gap, nearer to a row than its reference: pair by pair. A row
  // may be in a group on each side, and is taken with the first.
  void add_pairs(const Targets<R>& targets, const Group& group, int64_t begin, int64_t end, Sums& sums) const {
    for (const int64_t k : group.rows) {
      if (group.side == 1 && in_left_group_[k]) continue;
      const int64_t row = far_[k], left_out = excluded(targets, row);
      for (int64_t j = begin; j < end; ++j) {
        double offset;
        const double weight = weight_between(k, targets.x[j], &offset);
        if (weight == 0 || j == left_out) continue;
        double pulled = lse_grad_of(row);
        double* const out = sums.far.get() + (j - begin);
        for (int c = 0; c < channels_; ++c) {
          const double g = grad_of(row, c);
          pulled += g * (sums.value[c * sums.pitch + j - begin] -
                         mean_of(b_ * problem_.queries + data_.original_row(row), c));
          out[c * sums.pitch] += weight * g;
        }
        out[channels_ * sums.pitch] += weight * pulled;
        if (plan_.offsets) out[(channels_ + 1) * sums.pitch] += weight * pulled * offset;
      }
    }
  }

  void finish(const Targets<R>& targets, int64_t first, int64_t n, const Sums& sums) const {
    const int64_t start = first - sums.begin, pitch = sums.pitch;
    const bool far = near_ || !far_.empty();
    double weight[kBlock], result[kBlock];
    for (int64_t k = 0; k < n; ++k) weight[k] = targets.weighted && !data_.weight ? 1 : 0;
    for (int64_t k = 0; targets.weighted && data_.weight && k < n; ++k) weight[k] = data_.weight_of(first + k);
    for (int c = 0; task_.grad_value && c < channels_; ++c) {
      const double* const near = near_ ? nullptr : sums.near.get() + c * pitch + start;
      for (int64_t k = 0; k < n; ++k) result[k] = near_ ? 0 : near[k];
      for (int64_t k = 0; far && k < n; ++k) result[k] += sums.far[c * pitch + start + k];
      for (int64_t k = 0; k < n; ++k) result[k] *= weight[k];
      write(targets, first, n, result, task_.grad_value, channels_, c);
    }
    for (int slot = 0; slot < slots_; ++slot) {
      R* const out = slot ? task_.grad_key : task_.grad_key_weight;
      if (!out) continue;
      const double sign = slot ? -1 : 1;  // from (k_j - x_i)
      const double* const near = near_ ? nullptr : sums.near.get() + slot * columns_ * pitch + start;
      for (int64_t k = 0; k < n; ++k) result[k] = near_ ? 0 : -sign * near[channels_ * pitch + k];
      for (int c = 0; !near_ && c < channels_; ++c) {
        const double* const value = sums.value.get() + c * pitch + start;
        for (int64_t k = 0; k < n; ++k) result[k] += sign * value[k] * near[c * pitch + k];
      }
      for (int64_t k = 0; far && k < n; ++k) result[k] += sums.far[(channels_ + slot) * pitch + start + k];
      const double square = data_.w * data_.w;
      for (int64_t k = 0; k < n; ++k) result[k] *= slot ? weight[k] * square : data_.weight_factor;
      write(targets, first, n, result, out, 1, 0);
    }
  }

  // Results of keys into column c of (keys, columns), in the caller's order.
  void write(const Targets<R>& targets, int64_t first, int64_t n, const double* result, R* out, int columns,
             int c) const {
    out += b_ * problem_.keys * columns + c;
    if (targets.weighted && !data_.keys_moved && columns == 1) {
      for (int64_t k = 0; k < n; ++k) out[first + k] = static_cast<R>(result[k]);
      return;
    }
    for (int64_t k = 0; k < n; ++k) {
      const int64_t j = targets.weighted ? data_.original_key(first + k) : data_.dropped[first + k];
      out[j * columns] = static_cast<R>(result[k]);
    }
  }

  const Problem& problem_;
  const BackwardTask<R>& task_;
  const int64_t b_;
  const bool serial_;
  const FgtKernels<R>& table_;
  Data<R> data_;
  Plan plan_;
  Cells<R> cells_;
  int channels_ = 1, columns_ = 2, slots_ = 1;
  bool expanded_ = false, near_ = false;
  NearRows<R> near_rows_;     // where near_
  Buffer<double> charge_;     // (columns, queries)
  std::vector<int64_t> far_;  // rows that are relative to their nearest key
  std::vector<Nearest> found_;
  Gathered gathered_;
  std::vector<Group> groups_;
  std::vector<char> in_left_group_;
  std::vector<Field> fields_;
};

}  // namespace
}  // namespace fgt

template <typename T>
bool fgt_key_backward(const Problem& problem, const BackwardTask<T>& task) {
  return fgt::over_batch(problem,
                         [&](int64_t b, bool serial) { return fgt::KeyPass<T>(problem, task, b, serial).run(); });
}
template bool fgt_key_backward<float>(const Problem&, const BackwardTask<float>&);
template bool fgt_key_backward<double>(const Problem&, const BackwardTask<double>&);

}  // namespace nwfast
