// Sums over rows for one feature and channel in float32: declarations; see single/keys.cu.

#pragma once

#include "../keys.cuh"
#include "common.cuh"

namespace nwfast {

// A row as the float32 key side sees it; one that it leaves out has zeros for gradients.
struct alignas(16) SingleKeyRow {
  float query;
  float value_grad;  // of out, over the total
  float mean;        // out, centred
  float lse_grad;    // of lse, over the total
};

// Sums of a key, in this order: sum_i e g, sum_i e u (x_i - k_j) and, if asked for, sum_i e u.
enum KeySum { kValueSum, kOffsetSum, kWeightSum, kKeySums };

struct KeyPlan {
  bool full;           // with gradients of lse, or by the key weights
  int64_t block_keys;  // keys of one block
  int64_t key_blocks;
  int64_t tiles;  // of rows
  int64_t parts;  // of the tiles, summed by blocks of their own and added in order
};

KeyPlan plan_keys(const Problem& problem, int multiprocessors, bool full);

// windows (*B, tiles, 2): the keys that can matter to a tile of rows. partial: (*B, parts, kKeySums, N).
void launch_key_sums(const Problem& problem, const Device& device, const KeyPlan& plan, const Survey* surveys,
                     const SingleKeyRow* rows, const float* windows, float* partial);

}  // namespace nwfast
