// The key side of the backward pass: the transposed sums. Rows become sources, keys become targets.
//
// With g_i the gradient of a row's output, S_i its total, p_ij = a_j exp(s_ij) / S_i and u_ij = <g_i, v_j - out_i> +
// lse_grad_i, a key needs
//   A_j = sum_i exp(s_ij) g_i / S_i (by channel)  and  E_j = sum_i exp(s_ij) (<g_i, out_i> - lse_grad_i) / S_i
// and the same sums with a factor (x_i - k_j): grad_value = a_j A_j, grad_key_weight = <v_j, A_j> - E_j, grad_key =
// a_j w^2 (<v_j, A'_j> - E'_j).
//
// Where few rows lie around each key, keys visit them one by one, in the precision of the input (NearRows). Elsewhere
// rows whose total is not small beside the largest weight need no shift and are expanded or summed as in the forward
// pass, with the roles exchanged; other rows are relative to their nearest key (FarRows). A block of keys owns its
// sums, and adds to them in a fixed order.
//
// One class, for all that the ways of a block share: its rows' charges, what it has read of left-out keys, and the
// order in which the ways add to its sums. The ways themselves are in near.h, far.h and steep.h.

#include "far.h"
#include "near.h"

namespace nwfast {
namespace linear {
namespace {

constexpr double kFarthest = 20;      // bandwidths; more than any window without a shift has
constexpr int64_t kServed = 2048;     // keys of one task, whose sums stay in a core's cache
constexpr double kSmallTotal = 0.05;  // beside the largest weight; e^-2 / 2 is the least that level zero can have
constexpr double kSmallShift = 12;    // binary digits by which shifts make most totals small

template <typename R>
class KeyPass {
 public:
  KeyPass(const Problem& problem, const BatchData<R>& batch, const BackwardTask<R>& task, int64_t b, bool serial)
      : problem_(problem),
        batch_(batch),
        task_(task),
        b_(b),
        serial_(serial),
        table_(linear_kernels<R>()),
        gradients_(problem, task, b, data_),
        far_rows_(gradients_, data_, plan_),
        steep_rows_(gradients_, data_, plan_) {}

  bool run() {
    if (!batch_.prepare(b_, serial_, data_)) return false;
    channels_ = data_.channels;
    columns_ = channels_ + 1;
    const int64_t base = b_ * problem_.keys;
    for (int64_t j = 0; j < problem_.keys && (data_.keys == 0 || !data_.dropped.empty()); ++j) {
      for (int c = 0; task_.grad_value && c < channels_; ++c) task_.grad_value[(base + j) * channels_ + c] = 0;
      if (task_.grad_key) task_.grad_key[base + j] = 0;
      if (task_.grad_key_weight) task_.grad_key_weight[base + j] = 0;
    }
    if (data_.keys == 0) return true;
    Buffer<R> left_out(task_.grad_key_weight ? static_cast<int64_t>(data_.dropped.size()) : 0);
    Extent extent = data_.extent(columns_, task_.grad_key != nullptr, false);
    if (task_.grad_key_weight) read_left_out(left_out.get(), extent);
    make_plan<R>(extent, plan_);
    slots_ = plan_.orders;
    expanded_ = plan_.any_edges(data_.key_range.low, data_.key_range.high);
    std::vector<int64_t> far;
    near_ = NearRows<R>::promising(data_, plan_) && read_near_rows(far);
    if (!near_) {
      if (!read_rows(far)) return false;
      if (expanded_ && data_.queries > 0) {
        boxes_.compress(plan_, data_.query, data_.queries, columns_, false, loader(), serial_);
        fill_matrices(plan_);
      }
    }
    far_rows_.sort(std::move(far), serial_);
    serve({data_.key, data_.keys, true, nullptr, nullptr});
    if (task_.grad_key_weight && !data_.dropped.empty()) {
      const int64_t n = static_cast<int64_t>(data_.dropped.size());
      Buffer<int64_t> place(problem_.keys), excluding(n);
      for (int64_t j = 0; j < problem_.keys; ++j) place[j] = -1;
      for (int64_t j = 0; j < n; ++j) place[data_.dropped[j]] = j;
      for (int64_t i = 0; data_.exclude && i < data_.queries; ++i) {
        const int64_t j = place[data_.original_row(i)];
        if (j >= 0) excluding[j] = i;
      }
      steep_rows_.find(far_rows_.referred());
      serve({left_out.get(), n, false, place.get(), excluding.get()});
    }
    return true;
  }

 private:
  // Coordinates of keys without a weight. They lie wherever they lie, and boxes have to reach those that rows reach.
  void read_left_out(R* x, Extent& extent) const {
    const int64_t offset = problem_.key.offset(problem_.batch, b_);
    const double reach = std::fmin(kFarthest / extent.scale, kMostCoordinate);
    const double lowest = data_.query_range.low - reach, highest = data_.query_range.high + reach;
    double low = INFINITY, high = -INFINITY;
    for (size_t j = 0; j < data_.dropped.size(); ++j) {
      read(problem_.key, offset + data_.dropped[j] * problem_.key.row_stride, 1, 0, x + j);
      low = std::fmin(low, std::fmax(x[j], lowest));
      high = std::fmax(high, std::fmin(x[j], highest));
    }
    if (data_.dropped.empty() || data_.queries == 0) return;
    low = std::fmin(low, std::fmin(data_.key_range.low, data_.query_range.low));
    high = std::fmax(high, std::fmax(data_.key_range.high, data_.query_range.high));
    extent.spread = high - low;
    extent.magnitude = std::fmax(extent.magnitude, std::fmax(std::fabs(low), std::fabs(high)));
  }

  auto loader() const {
    return [this](int64_t begin, int64_t n, double* charge, int64_t pitch) {
      for (int c = 0; c < columns_; ++c) {
        std::memcpy(charge + c * pitch, charge_.get() + c * data_.queries + begin, n * sizeof(double));
      }
    };
  }

  // read(begin, n, far) for all blocks of rows; it lists far rows. False if one of them returns false.
  template <typename Read>
  bool over_rows(std::vector<int64_t>& all_far, const Read& read) const {
    const int64_t chunks = (data_.queries + kChunk - 1) / kChunk;
    std::vector<std::vector<int64_t>> far(chunks);
    std::vector<char> served(chunks, 1);
    parallel_blocks(chunks, serial_, [&](int64_t chunk) {
      const int64_t end = std::min(data_.queries, (chunk + 1) * kChunk);
      for (int64_t begin = chunk * kChunk; begin < end; begin += kHeldPoints) {
        served[chunk] &= read(begin, std::min(kHeldPoints, end - begin), far[chunk]);
      }
    });
    all_far.clear();
    for (const auto& part : far) all_far.insert(all_far.end(), part.begin(), part.end());
    return std::find(served.begin(), served.end(), 0) == served.end();
  }

  // Charges of the rows that need no shift, zeros for others, which are far ones. False if a gradient is not finite.
  bool read_rows(std::vector<int64_t>& far) {
    charge_.allocate(columns_ * data_.queries);
    return over_rows(far,
                     [this](int64_t begin, int64_t n, std::vector<int64_t>& own) { return read_block(begin, n, own); });
  }

  bool read_block(int64_t begin, int64_t n, std::vector<int64_t>& far) {
    double total[kHeldPoints], shift[kHeldPoints], plain[kHeldPoints], share[kHeldPoints], mean[kHeldPoints];
    double *const charges = charge_.get() + begin, *const sum = charges + channels_ * data_.queries;
    if (gradients_.read_totals(begin, n, total, shift)) {
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
    }
    for (int64_t k = 0; !all_near && k < n; ++k) {
      if (!(plain[k] >= kSmallTotal) && total[k] > 0) far.push_back(begin + k);
    }
    gradients_.read_lse_grads(begin, n, sum);
    for (int64_t k = 0; k < n; ++k) sum[k] = -sum[k];
    for (int c = 0; c < channels_; ++c) {
      double* const grad = charges + c * data_.queries;
      gradients_.read_grads(begin, n, c, grad);
      gradients_.read_means(begin, n, c, mean);
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

  // Rows for keys to visit one by one; those that R is not precise enough for are far ones. False if keys would visit
  // too many, or a gradient is not finite.
  bool read_near_rows(std::vector<int64_t>& far) {
    near_rows_.allocate(data_);
    const auto read = [this](int64_t begin, int64_t n, std::vector<int64_t>& own) {
      return read_near_block(begin, n, own);
    };
    return over_rows(far, read) && near_rows_.find_ranges(data_.key, data_.keys, serial_);
  }

  bool read_near_block(int64_t begin, int64_t n, std::vector<int64_t>& far) {
    int64_t hint = lower_bound(data_.key, data_.keys, static_cast<double>(data_.query[begin]));
    double total[kHeldPoints], shift[kHeldPoints], grad[kHeldPoints], mean[kHeldPoints], lse_grad[kHeldPoints];
    gradients_.read_totals(begin, n, total, shift);
    gradients_.read_grads(begin, n, 0, grad);
    gradients_.read_lse_grads(begin, n, lse_grad);
    gradients_.read_means(begin, n, 0, mean);
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
        reference = static_cast<R>(found.key);
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

  void serve(const Targets<R>& targets) const {
    parallel_blocks((targets.n + kServed - 1) / kServed, serial_, [&](int64_t chunk) { serve_chunk(targets, chunk); });
  }

  void serve_chunk(const Targets<R>& targets, int64_t chunk) const {
    const int64_t begin = chunk * kServed, end = std::min(targets.n, begin + kServed), pitch = padded(end - begin) + 32;
    KeySums sums;
    sums.begin = begin;
    sums.pitch = pitch;
    if (!near_) {
      sums.near.allocate(slots_ * columns_ * pitch);
      if (data_.queries > 0) {
        sum_level_zero(targets, begin, end, sums.near.get(), pitch);
      } else {
        std::memset(sums.near.get(), 0, slots_ * columns_ * pitch * sizeof(double));
      }
    }
    load_values(targets, begin, end, sums);
    if (near_ || !far_rows_.empty()) sums.far.allocate((channels_ + slots_) * pitch);
    if (near_) {
      near_rows_.pull(data_, plan_, begin, end - begin, sums.far.get(), pitch);
    } else if (!far_rows_.empty()) {
      std::memset(sums.far.get(), 0, (channels_ + slots_) * pitch * sizeof(double));
    }
    if (!far_rows_.empty()) far_rows_.add(targets, begin, end, sums);
    for (int64_t first = begin; first < end; first += kHeldPoints) {
      finish(targets, first, std::min(kHeldPoints, end - first), sums);
    }
  }

  void load_values(const Targets<R>& targets, int64_t begin, int64_t end, KeySums& sums) const {
    sums.value.allocate(channels_ * sums.pitch);
    for (int c = 0; c < channels_; ++c) {
      double* const column = sums.value.get() + c * sums.pitch;
      for (int64_t j = begin; targets.weighted && j < end; ++j) column[j - begin] = data_.value_of(j, c);
      for (int64_t j = begin; !targets.weighted && j < end; ++j) {
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
    Expansion<R, decltype(load)> expansion(plan_, boxes_, data_.query, data_.queries, columns_, false, load);
    const double per_pair = 4.0 * ((columns_ + 1) / 2), per_term = 0.3 * columns_ * slots_;
    int64_t window = lower_bound(data_.query, data_.queries, static_cast<double>(u[begin]) - reach);
    for (int64_t j = begin; j < end;) {
      int64_t stop = std::min(j + 2 * kGroup, end);
      window = gallop(data_.query, data_.queries, window, static_cast<double>(u[j]) - reach);
      const int64_t last = window + 6 * kGroup;
      bool few = !expanded_ || last >= data_.queries ||
                 static_cast<double>(data_.query[last]) > static_cast<double>(u[stop - 1]) + reach;
      const int64_t box = few ? 0 : plan_.box_of(u[j]);
      few |= !plan_.has_edges(box);
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
        EvaluateTask<R> task;
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
        if (data_.exclude) subtract_own(targets, j, stop, sums + (j - begin), pitch);
      }
      j = stop;
    }
  }

  void sum_direct(const Targets<R>& targets, int64_t first, int64_t n, int64_t window, double reach, double* sums,
                  int64_t pitch) const {
    const R* const u = targets.x + first;
    const int64_t begin = gallop(data_.query, data_.queries, window, static_cast<double>(u[0]) - reach);
    // Up to the bound and on it: it may round onto the key itself.
    const double bound = std::nextafter(static_cast<double>(u[n - 1]) + reach, INFINITY);
    const int64_t end = gallop(data_.query, data_.queries, begin, bound);
    double reference[kGroup];
    int64_t excluded[kGroup];
    for (int64_t k = 0; k < n; ++k) reference[k] = u[k];
    for (int64_t k = 0; data_.exclude && k < n; ++k) excluded[k] = leaving(targets, first + k) - begin;
    DirectTask<R> task;
    task.target = u;
    task.reference = reference;
    task.excluded = data_.exclude ? excluded : nullptr;
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

  // The row that leaves key j out.
  int64_t leaving(const Targets<R>& targets, int64_t j) const {
    return targets.weighted ? data_.excluding(j) : targets.excluding[j];
  }

  // Takes rows that leave keys out from the sums of those, if they are among the rows without a shift.
  void subtract_own(const Targets<R>& targets, int64_t begin, int64_t end, double* sums, int64_t pitch) const {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = leaving(targets, j);
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

  void finish(const Targets<R>& targets, int64_t first, int64_t n, const KeySums& sums) const {
    const int64_t start = first - sums.begin, pitch = sums.pitch;
    const bool far = near_ || !far_rows_.empty();
    double weight[kHeldPoints], result[kHeldPoints];
    for (int64_t k = 0; targets.weighted && k < n; ++k) weight[k] = data_.weight_of(first + k);
    for (int c = 0; targets.weighted && task_.grad_value && c < channels_; ++c) {
      const double* const near = near_ ? nullptr : sums.near.get() + c * pitch + start;
      for (int64_t k = 0; k < n; ++k) result[k] = near_ ? 0 : near[k];
      for (int64_t k = 0; far && k < n; ++k) result[k] += sums.far[c * pitch + start + k];
      for (int64_t k = 0; k < n; ++k) result[k] *= weight[k];
      write(targets, first, n, result, task_.grad_value, channels_, c);
    }
    for (int slot = 0; slot < (targets.weighted ? slots_ : 1); ++slot) {
      R* const out = slot ? task_.grad_key : task_.grad_key_weight;
      if (!out) continue;
      const double sign = slot ? -1 : 1;  // from (k_j - x_i)
      const double* const near = near_ ? nullptr : sums.near.get() + slot * columns_ * pitch + start;
      for (int64_t k = 0; k < n; ++k) result[k] = near_ ? 0 : -sign * near[channels_ * pitch + k];
      for (int c = 0; !near_ && c < channels_; ++c) {
        const double* const value = sums.value.get() + c * pitch + start;
        for (int64_t k = 0; k < n; ++k) result[k] += sign * value[k] * near[c * pitch + k];
      }
      if (!targets.weighted) {
        finish_left_out(targets, first, n, sums, result);
        write(targets, first, n, result, out, 1, 0);
        continue;
      }
      for (int64_t k = 0; far && k < n; ++k) result[k] += sums.far[(channels_ + slot) * pitch + start + k];
      const double square = data_.w * data_.w;
      for (int64_t k = 0; k < n; ++k) result[k] *= slot ? weight[k] * square : data_.weight_factor;
      write(targets, first, n, result, out, 1, 0);
    }
  }

  // Gradients of the weights of keys that have none, from what rows without a shift add.
  void finish_left_out(const Targets<R>& targets, int64_t first, int64_t n, const KeySums& sums, double* result) const {
    const double largest = static_cast<double>(std::numeric_limits<R>::max());
    for (int64_t k = 0; k < n; ++k) {
      const int64_t place = first + k - sums.begin;
      const double* const value = sums.value.get() + place;
      const double u = targets.x[first + k];
      bool steep = steep_rows_.any(u);
      for (int c = 0; c < channels_; ++c) steep |= !(std::fabs(value[c * sums.pitch]) <= kMostValue);
      if (far_rows_.empty()) {
        result[k] *= data_.weight_factor;
      } else if (steep) {
        const int64_t row = data_.exclude ? leaving(targets, first + k) : -1;
        result[k] = result[k] * data_.weight_factor + steep_rows_.gradient(u, value, sums.pitch, row);
      } else {
        result[k] = (result[k] + sums.far[channels_ * sums.pitch + place]) * data_.weight_factor;
      }
      result[k] = result[k] > largest ? largest : result[k] < -largest ? -largest : result[k];
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
  const BatchData<R>& batch_;
  const BackwardTask<R>& task_;
  const int64_t b_;
  const bool serial_;
  const LinearKernels<R>& table_;
  Data<R> data_;
  Plan plan_;
  Boxes<R> boxes_;
  int channels_ = 1, columns_ = 2, slots_ = 1;
  bool expanded_ = false, near_ = false;
  NearRows<R> near_rows_;  // where near_
  Buffer<double> charge_;  // (columns, queries)
  const RowGradients<R> gradients_;
  FarRows<R> far_rows_;
  SteepRows<R> steep_rows_;
};

}  // namespace
}  // namespace linear

template <typename T>
bool linear_key_backward(const Problem& problem, const BackwardTask<T>& task) {
  const linear::BatchData<T> batch(problem);
  return linear::over_batch(
      problem, [&](int64_t b, bool serial) { return linear::KeyPass<T>(problem, batch, task, b, serial).run(); });
}
template bool linear_key_backward<float>(const Problem&, const BackwardTask<float>&);
template bool linear_key_backward<double>(const Problem&, const BackwardTask<double>&);

}  // namespace nwfast
