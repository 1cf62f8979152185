// Ordering of coordinates: a stable radix sort on the bits of floating-point numbers, O(n).

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "drivers.h"

namespace nwfast {

template <typename T>
struct RadixBits;
template <>
struct RadixBits<float> {
  typedef uint32_t Type;
};
template <>
struct RadixBits<double> {
  typedef uint64_t Type;
};

// The integer that orders like the number: negative numbers have all bits flipped, others the sign bit.
template <typename T>
typename RadixBits<T>::Type ordered_bits(T x) {
  typedef typename RadixBits<T>::Type U;
  U bits;
  x += T(0);  // -0 and 0 are one number
  std::memcpy(&bits, &x, sizeof bits);
  const U sign = U(1) << (8 * sizeof(U) - 1);
  return bits & sign ? ~bits : bits | sign;
}

template <typename T>
bool ascending(const T* x, int64_t n) {
  constexpr int64_t kChecked = 64;  // checked without branches
  if (n > 0 && x[0] != x[0]) return false;
  for (int64_t i = 1; i < n; i += kChecked) {
    const int64_t end = i + kChecked < n ? i + kChecked : n;
    bool in_order = true;
    for (int64_t j = i; j < end; ++j) in_order &= x[j - 1] <= x[j];
    if (!in_order) return false;
  }
  return true;
}

// order such that x[order[0]] <= x[order[1]] <= ..., equal numbers in their original order; n < 2^32, no NaN.
template <typename T>
void sort_order(const T* x, int64_t n, uint32_t* order) {
  typedef typename RadixBits<T>::Type U;
  struct Item {
    U bits;
    uint32_t index;
  };
  constexpr int kDigit = 11, kBuckets = 1 << kDigit;
  Buffer<Item> first(n), second(n);
  Item *from = first.get(), *to = second.get();
  for (int64_t i = 0; i < n; ++i) from[i] = {ordered_bits(x[i]), static_cast<uint32_t>(i)};
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(U)); shift += kDigit) {
    int64_t places[kBuckets] = {};
    for (int64_t i = 0; i < n; ++i) ++places[from[i].bits >> shift & (kBuckets - 1)];
    int64_t sum = 0;
    bool one_bucket = false;
    for (int d = 0; d < kBuckets; ++d) {
      one_bucket |= places[d] == n;
      const int64_t count = places[d];
      places[d] = sum;
      sum += count;
    }
    if (one_bucket) continue;
    for (int64_t i = 0; i < n; ++i) to[places[from[i].bits >> shift & (kBuckets - 1)]++] = from[i];
    Item* const swap = from;
    from = to;
    to = swap;
  }
  for (int64_t i = 0; i < n; ++i) order[i] = from[i].index;
}

// The number whose ordered bits these are.
template <typename T>
T from_ordered_bits(typename RadixBits<T>::Type bits) {
  typedef typename RadixBits<T>::Type U;
  const U sign = U(1) << (8 * sizeof(U) - 1);
  bits = bits & sign ? bits & ~sign : ~bits;
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The same order by several threads, and the sorted numbers: each pass counts and moves parts of the array side by
// side. sorted may be x.
template <typename T>
void sort_numbers(const T* x, int64_t n, bool serial, uint32_t* order, T* sorted) {
  typedef typename RadixBits<T>::Type U;
  struct Item {
    U bits;
    uint32_t index;
  };
  constexpr int kDigit = 11, kBuckets = 1 << kDigit, kPasses = (8 * sizeof(U) + kDigit - 1) / kDigit;
  const int64_t parts = std::min<int64_t>(4, n / 16384 + 1), size = (n + parts - 1) / parts;
  Buffer<Item> first(n), second(n);
  std::vector<int64_t> places(parts * kBuckets);
  const auto over_parts = [&](const auto& body) {
    parallel_blocks(parts, serial, [&](int64_t part) {
      body(places.data() + part * kBuckets, part * size, std::min(n, (part + 1) * size));
    });
  };
  over_parts([items = first.get(), x](int64_t*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) items[i] = {ordered_bits(x[i]), static_cast<uint32_t>(i)};
  });
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = pass * kDigit;
    over_parts([shift, items = first.get()](int64_t* own, int64_t begin, int64_t end) {
      std::fill(own, own + kBuckets, 0);
      for (int64_t i = begin; i < end; ++i) ++own[items[i].bits >> shift & (kBuckets - 1)];
    });
    int64_t sum = 0;
    bool one_bucket = false;
    for (int digit = 0; digit < kBuckets; ++digit) {
      const int64_t before = sum;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t count = places[part * kBuckets + digit];
        places[part * kBuckets + digit] = sum;
        sum += count;
      }
      one_bucket |= sum - before == n;
    }
    if (one_bucket) continue;
    over_parts([shift, from = first.get(), to = second.get()](int64_t* own, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[own[from[i].bits >> shift & (kBuckets - 1)]++] = from[i];
    });
    first.swap(second);
  }
  over_parts([items = first.get(), order, sorted](int64_t*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      order[i] = items[i].index;
      sorted[i] = from_ordered_bits<T>(items[i].bits);
    }
  });
}

}  // namespace nwfast
