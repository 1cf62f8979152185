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

// A number's bits, and which it was.
template <typename U>
struct SortItem {
  U bits;
  uint32_t index;
};

inline int64_t parts_of(int64_t n) { return std::min<int64_t>(4, n / 16384 + 1); }

// Calls body(part, begin, end) for the parts of an array of n, side by side.
template <typename Body>
void over_parts(int64_t n, bool serial, const Body& body) {
  const int64_t parts = parts_of(n), size = (n + parts - 1) / parts;
  parallel_blocks(parts, serial,
                  [&](int64_t part) { body(part, std::min(n, part * size), std::min(n, (part + 1) * size)); });
}

// Sorts items by their bits, below 2^bits, equal ones in their order: each pass counts and moves the parts of the
// array.
template <typename U>
void sort_items(Buffer<SortItem<U>>& items, int64_t n, int bits, bool serial) {
  const int digits = std::max(1, (bits + 10) / 11), digit_bits = (bits + digits - 1) / digits;
  const int64_t buckets = int64_t{1} << digit_bits, parts = parts_of(n);
  const U mask = static_cast<U>(buckets - 1);
  Buffer<SortItem<U>> moved(n);
  std::vector<int64_t> places(parts * buckets);
  for (int pass = 0; pass < digits; ++pass) {
    const int shift = pass * digit_bits;
    over_parts(n, serial, [&, from = items.get()](int64_t part, int64_t begin, int64_t end) {
      int64_t* const own = places.data() + part * buckets;
      std::fill(own, own + buckets, 0);
      for (int64_t i = begin; i < end; ++i) ++own[from[i].bits >> shift & mask];
    });
    int64_t sum = 0;
    bool one_bucket = false;
    for (int64_t digit = 0; digit < buckets; ++digit) {
      const int64_t before = sum;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t count = places[part * buckets + digit];
        places[part * buckets + digit] = sum;
        sum += count;
      }
      one_bucket |= sum - before == n;
    }
    if (one_bucket) continue;
    over_parts(n, serial, [&, from = items.get(), to = moved.get()](int64_t part, int64_t begin, int64_t end) {
      int64_t* const own = places.data() + part * buckets;
      for (int64_t i = begin; i < end; ++i) to[own[from[i].bits >> shift & mask]++] = from[i];
    });
    items.swap(moved);
  }
}

// The same order by several threads, and the sorted numbers. sorted may be x.
template <typename T>
void sort_numbers(const T* x, int64_t n, bool serial, uint32_t* order, T* sorted) {
  typedef typename RadixBits<T>::Type U;
  Buffer<SortItem<U>> items(n);
  over_parts(n, serial, [to = items.get(), x](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = {ordered_bits(x[i]), static_cast<uint32_t>(i)};
  });
  sort_items(items, n, 8 * sizeof(U), serial);
  over_parts(n, serial, [from = items.get(), order, sorted](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      order[i] = from[i].index;
      sorted[i] = from_ordered_bits<T>(from[i].bits);
    }
  });
}

}  // namespace nwfast
