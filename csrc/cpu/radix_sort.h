// Stable radix sort of 64-bit keys by some of their bits: least significant digit first, one counting pass and one
// scattering pass per digit, both over the same fixed parts. A stable order is unique, so the result does not depend on
// the number of threads.
#pragma once
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {

// Sorts keys[0, n) by their bits [low, high) and returns where the result is: `keys` or `spare`. Uses a scratch slot.
PYFUSED_INLINE uint64_t* radix_sort(uint64_t* keys, uint64_t* spare, int64_t n, int low, int high, int slot,
                                    int threads) {
  constexpr int kWidest = 11;          // 2048 counters stay in the first-level cache
  constexpr int64_t kGrain = 1 << 14;  // keys per thread that pay for its counters
  int passes = (high - low + kWidest - 1) / kWidest;
  if (n < 2 || passes == 0) return keys;
  int width = (high - low + passes - 1) / passes;
  int64_t digits = int64_t{1} << width, parts = min<int64_t>((n + kGrain - 1) / kGrain, max(threads, 1));
  auto* next = static_cast<int64_t*>(scratch(slot, sizeof(int64_t) * digits * parts));  // [part][digit]
  for (int pass = 0; pass < passes; ++pass) {
    int shift = low + pass * width;
    uint64_t mask = digits - 1;
    std::memset(next, 0, sizeof(int64_t) * digits * parts);
    parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end, int part) {
      int64_t* count = next + part * digits;
      for (int64_t i = begin; i < end; ++i) ++count[keys[i] >> shift & mask];
    });
    int64_t before = 0;
    for (int64_t digit = 0; digit < digits; ++digit)
      for (int64_t part = 0; part < parts; ++part) {
        int64_t count = next[part * digits + digit];
        next[part * digits + digit] = before;
        before += count;
      }
    parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end, int part) {
      int64_t* to = next + part * digits;
      for (int64_t i = begin; i < end; ++i) spare[to[keys[i] >> shift & mask]++] = keys[i];
    });
    uint64_t* sorted = spare;
    spare = keys;
    keys = sorted;
  }
  return keys;
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
