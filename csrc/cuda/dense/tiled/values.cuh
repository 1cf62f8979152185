// What a block of tiled/rows.cu holds in shared memory, and its sums of weights times values: one specialization for
// each way to multiply. Each takes a tile of values to shared memory (stage), adds the product of a warp's weights, 16
// rows by 64 keys in the registers of the scores, with the tile (add), and hands out the sums (finish).

#pragma once

#include "rows.cuh"

namespace nwfast {

constexpr int kTileThreads = 128;
constexpr int kWarpRows = 16;
constexpr int kGroups = kTile / 8;             // of eight columns
constexpr int kFeatureChunk = 16;              // features staged at once
constexpr int kPitch = kTile + 4;              // of coordinates
constexpr int kWeightPitch = kWarpRows + 4;    // of weights on their way to the product
constexpr int kHalfPitch = kChannelChunk + 8;  // 16 bytes more than a power of two: rows start in different banks
// A thread of the block stages a key or a row of its own, its warps share the rows, and a lane's channels are as many
// as its columns of keys.
static_assert(kTileThreads >= kTile && kTileThreads / 32 * kWarpRows == kTile, "a warp has 16 rows of the tile");
static_assert(kGroups * 8 == kTile && kTile % 16 == 0 && kChannelChunk == kTile, "fragments of 16 keys, 8 channels");
static_assert(kFewChannels <= kChannelChunk && kTileThreads >= kFeatureChunk, "");
static_assert(kTileThreads % (kChannelChunk / 8) == 0 && kTile % (kTileThreads / (kChannelChunk / 8)) == 0,
              "rounds of copies are whole");

struct alignas(16) Shared {  // what follows it is copied in quads
  float query[kFeatureChunk][kPitch], key[kFeatureChunk][kPitch];
  float scale[kFeatureChunk], log_weight[kTile], rescale[kTile];
  float outer_top[kTile], outer_total[kTile];
  int64_t query_at, key_at, value_at, w_at, weight_at;  // offsets of the batch element: registers are scarce
};

template <Product kProduct>
constexpr size_t shared_bytes() {
  const size_t values = kProduct == Product::kFew    ? sizeof(float) * kFewChannels * kPitch
                        : kProduct == Product::kMany ? sizeof(float) * kTile * (kChannelChunk + 4 * kWeightPitch)
                                                     : sizeof(uint16_t) * kTile * kHalfPitch;
  return sizeof(Shared) + values;
}

// Channel c of the value of key j, without the channel's centre.
__device__ __forceinline__ float centred_value(const Problem& problem, int64_t value, int64_t j, int64_t c,
                                               const ValueRange* ranges) {
  return problem.value.read<float>(value + j * problem.value.row_stride + c * problem.value.column_stride) -
         ranges[c].centre;
}

// The sums of a warp's 16 rows over values, one specialization for each product.
template <Product kProduct>
struct Values;

template <>
struct Values<Product::kFew> {
  float sums[2][kFewChannels] = {};

  __device__ void round(const float (&)[4], int) const {}
  __device__ void lower(int, float) const {}
  __device__ void correct(int, float) const {}

  __device__ void stage(const Problem& problem, int64_t value, int64_t weight, int64_t from, int count, int64_t first,
                        int channels, const ValueRange* ranges, unsigned char* memory) const {
    float* const staged = reinterpret_cast<float*>(memory);
    for (int at = static_cast<int>(threadIdx.x); at < kFewChannels * kTile; at += kTileThreads) {
      const int j = at % kTile, c = at / kTile;
      float v = 0;
      if (j < count && c < channels && problem.keeps(weight, from + j)) {
        v = centred_value(problem, value, from + j, first + c, ranges);
      }
      staged[c * kPitch + j] = v;
    }
  }
  __device__ void add(const float (&weight)[kGroups][4], const float (&rescale)[2], int channels, Shared&,
                      const unsigned char* memory) {
    const float* const staged = reinterpret_cast<const float*>(memory);
#pragma unroll
    for (int c = 0; c < kFewChannels; ++c) {
      if (c >= channels) break;
      float upper = 0, lower = 0;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const float2 v = *reinterpret_cast<const float2*>(staged + c * kPitch + n * 8 + lane_number() % 4 * 2);
        upper += weight[n][0] * v.x;
        upper += weight[n][1] * v.y;
        lower += weight[n][2] * v.x;
        lower += weight[n][3] * v.y;
      }
      sums[0][c] = sums[0][c] * rescale[0] + upper;
      sums[1][c] = sums[1][c] * rescale[1] + lower;
    }
  }
  template <typename Write>
  __device__ void finish(int channels, const Write& write) {
#pragma unroll
    for (int c = 0; c < kFewChannels; ++c) {
      if (c >= channels) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums[half][c];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane_number() % 4 == 0) write(lane_number() / 4 + 8 * half, c, sum);
      }
    }
  }
};

template <>
struct Values<Product::kMany> {
  float sums[4][8] = {};  // of rows 4 (lane / 8) and on, channels 4 (lane % 8) and on and the same 32 further

  __device__ void round(const float (&)[4], int) const {}
  __device__ void lower(int, float) const {}
  __device__ void correct(int, float) const {}

  __device__ void stage(const Problem& problem, int64_t value, int64_t weight, int64_t from, int count, int64_t first,
                        int channels, const ValueRange* ranges, unsigned char* memory) const {
    float* const staged = reinterpret_cast<float*>(memory);
    for (int at = static_cast<int>(threadIdx.x); at < kTile * kChannelChunk; at += kTileThreads) {
      const int c = at % kChannelChunk, j = at / kChannelChunk;
      float v = 0;
      if (j < count && c < channels && problem.keeps(weight, from + j)) {
        v = centred_value(problem, value, from + j, first + c, ranges);
      }
      staged[at] = v;
    }
  }
  __device__ void add(const float (&weight)[kGroups][4], const float (&rescale)[2], int, Shared& shared,
                      unsigned char* memory) {
    const float* const staged = reinterpret_cast<const float*>(memory);
    const int lane = lane_number(), warp = warp_number();
    float* const weights = reinterpret_cast<float*>(memory) + kTile * kChannelChunk + warp * kTile * kWeightPitch;
    float* const scales = shared.rescale + warp * kWarpRows;
    if (lane % 4 == 0) {
      scales[lane / 4] = rescale[0];
      scales[lane / 4 + 8] = rescale[1];
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[(n * 8 + lane % 4 * 2 + i % 2) * kWeightPitch + lane / 4 + i / 2 * 8] = weight[n][i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float scale = scales[lane / 8 * 4 + r];
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[r][c] *= scale;
    }
#pragma unroll 4
    for (int j = 0; j < kTile; ++j) {
      const float4 p = *reinterpret_cast<const float4*>(weights + j * kWeightPitch + lane / 8 * 4);
      const float4 near = *reinterpret_cast<const float4*>(staged + j * kChannelChunk + lane % 8 * 4);
      const float4 far = *reinterpret_cast<const float4*>(staged + j * kChannelChunk + 32 + lane % 8 * 4);
      const float row[4] = {p.x, p.y, p.z, p.w};
      const float column[8] = {near.x, near.y, near.z, near.w, far.x, far.y, far.z, far.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[r][c] += row[r] * column[c];
      }
    }
    __syncwarp();  // before the next tile's weights are written
  }
  template <typename Write>
  __device__ void finish(int channels, const Write& write) {
    const int lane = lane_number();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int channel = c / 4 * 32 + lane % 8 * 4 + c % 4;
        if (channel < channels) write(lane / 8 * 4 + r, channel, sums[r][c]);
      }
    }
  }
};

template <bool kBFloat16>
struct HalfValues {
  float sums[kGroups][4] = {};
  uint32_t weights[kGroups][2];  // of the tile at hand, as the tensor cores take them
  float rounded[2] = {};         // their sums

  __device__ void round(const float (&weight)[4], int group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = weights[group][i] = pack_halves<kBFloat16>(weight[2 * i], weight[2 * i + 1]);
      if (kBFloat16) {
        rounded[i] += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
      } else {
        rounded[i] += half_to_float(static_cast<uint16_t>(pair)) + half_to_float(static_cast<uint16_t>(pair >> 16));
      }
    }
  }
  __device__ void lower(int half, float factor) { rounded[half] *= factor; }
  // Makes the sums over values those of a mean: weights that were rounded one by one have another total.
  __device__ void correct(int half, float total) {
    float sum = rounded[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float factor = sum > 0 ? total / sum : 1;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[n][2 * half + i] *= factor;
    }
  }

  __device__ void stage(const Problem& problem, int64_t value, int64_t weight, int64_t from, int count, int64_t first,
                        int channels, const ValueRange*, unsigned char* memory) const {
    uint16_t* const staged = reinterpret_cast<uint16_t*>(memory);
    const uint16_t* const values = static_cast<const uint16_t*>(problem.value.data) + value;
    const int64_t row_stride = problem.value.row_stride, column_stride = problem.value.column_stride;
    if (count == kTile && column_stride == 1 && row_stride % 8 == 0 && channels == kChannelChunk &&
        reinterpret_cast<uintptr_t>(values + first) % 16 == 0) {
      constexpr int kPieces = kChannelChunk / 8, kRows = kTileThreads / kPieces;  // of 16 bytes; of one round of copies
      const int row = static_cast<int>(threadIdx.x) / kPieces, column = static_cast<int>(threadIdx.x) % kPieces * 8;
      const uint16_t* source = values + (from + row) * row_stride + first + column;
      uint16_t* const target = staged + row * kHalfPitch + column;
#pragma unroll
      for (int r = 0; r < kTile; r += kRows, source += kRows * row_stride) {
        copy_async<16>(target + r * kHalfPitch, source);
      }
      return;
    }
#pragma unroll 2
    for (int at = static_cast<int>(threadIdx.x); at < kTile * kChannelChunk; at += kTileThreads) {
      const int j = at / kChannelChunk, c = at % kChannelChunk;
      const bool valid = j < count && c < channels && problem.keeps(weight, from + j);
      staged[j * kHalfPitch + c] = valid ? values[(from + j) * row_stride + (first + c) * column_stride] : 0;
    }
  }
  __device__ void add(const float (&)[kGroups][4], const float (&rescale)[2], int channels, Shared&,
                      const unsigned char* memory) {
    const uint16_t* const staged = reinterpret_cast<const uint16_t*>(memory);
    const int lane = lane_number();
    if (__ballot_sync(kAllLanes, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] *= rescale[i / 2];
      }
    }
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      const uint32_t left[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                                weights[2 * step + 1][1]};
      const uint16_t* const row = staged + (step * 16 + lane % 16) * kHalfPitch + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < kGroups; n += 2) {
        if (n * 8 >= channels) break;
        uint32_t fragments[4];
        load_transposed(fragments, row + n * 8);
        multiply_fragments<kBFloat16>(sums[n], left, {fragments[0], fragments[1]});
        multiply_fragments<kBFloat16>(sums[n + 1], left, {fragments[2], fragments[3]});
      }
    }
  }
  template <typename Write>
  __device__ void finish(int channels, const Write& write) {
    const int lane = lane_number();
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = n * 8 + lane % 4 * 2 + i % 2;
        if (channel < channels) write(lane / 4 + i / 2 * 8, channel, sums[n][i]);
      }
    }
  }
};

template <>
struct Values<Product::kHalf> : HalfValues<false> {};
template <>
struct Values<Product::kBFloat16> : HalfValues<true> {};

}  // namespace nwfast
