// The normaliser of one softmax row, for host and device code: sum_j a_j 2^t_j = total * 2^-shift.
//
// shift and total are kept apart since a single lse of 1e8 cannot hold both; see nwfast/backends/__init__.py.

#pragma once

#include <cmath>

#include "constants.h"
#include "host_device.h"

namespace nwfast {

struct SoftmaxState {
  double shift, total;
};

// The natural logarithm of the sum; -infinity for a row without keys.
NWFAST_HOST_DEVICE double log_sum(const SoftmaxState& state) {
  return state.total == 0 ? -HUGE_VAL : kLn2 * (log2(state.total) - state.shift);
}

// Adds another part of the row's keys. Sums over weights that go with the states are to be multiplied by `mine` and
// `theirs` before they are added. Parts are merged in a fixed order, so that the result is the same at every run.
NWFAST_HOST_DEVICE void merge(SoftmaxState& state, const SoftmaxState& part, double& mine, double& theirs) {
  mine = 1;
  theirs = 0;
  if (part.total == 0) return;
  if (state.total == 0) {
    state = part;
    mine = 0;
    theirs = 1;
    return;
  }
  const double shift = state.shift < part.shift ? state.shift : part.shift;
  mine = exp2(shift - state.shift);
  theirs = exp2(shift - part.shift);
  state.total = mine * state.total + theirs * part.total;
  state.shift = shift;
}

}  // namespace nwfast
