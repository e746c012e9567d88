// A 64-bit fingerprint of a tensor's bytes: whether something computed from a weight is still true.
//
//   each lane of 8 vectors of 32-bit words:  h <- h * odd + word,  over kParts parts;  then all lanes, mixed in order
//
// A step is one-to-one in h and in the word, so two tensors that differ in one word of a lane differ in that lane; beyond
// that they collide with probability about 2^-64. Not made to resist an adversary.
// Floor: one read of the tensor. Parts do not depend on the number of threads.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int kUnroll = 8;  // chains of multiplications at a time: each takes some 10 cycles
constexpr int kParts = 32;

PYFUSED_INLINE uint64_t mix(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 29);
}

uint64_t of_part(const char* p, int64_t bytes) {
  constexpr int64_t step = kUnroll * kVectorBytes;
  VecU32 sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + step <= bytes; i += step)
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) {
      VecU32 word;
      std::memcpy(&word, p + i + j * kVectorBytes, sizeof word);
      sum[j] = sum[j] * 0x9e3779b1u + word;
    }
  uint64_t h = bytes, parts[kUnroll * kVectorBytes / sizeof(uint64_t)], last[step / sizeof(uint64_t)] = {};
  std::memcpy(parts, sum, sizeof parts);
  for (uint64_t x : parts) h = mix(h, x);
  std::memcpy(last, p + i, bytes - i);
  for (uint64_t x : last) h = mix(h, x);
  return h;
}

}  // namespace

// out: one int64. input: the bytes of a dense tensor, in the order in which they lie.
Status fingerprint(View out, View input, int threads) {
  PYFUSED_REQUIRE(out.dtype == DType::i64 && out.numel() == 1, "out", "must be one int64");
  return for_dtype(input.dtype, [&](auto tag) {
    int64_t bytes = input.numel() * sizeof tag, vectors = bytes / kVectorBytes;
    uint64_t parts[kParts], h = 0;
    parallel_for(kParts, kParts * (64 << 10) / (bytes + 1) + 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t part = begin; part < end; ++part) {
        int64_t first = vectors * part / kParts * kVectorBytes;
        int64_t last = part + 1 == kParts ? bytes : vectors * (part + 1) / kParts * kVectorBytes;
        parts[part] = of_part(input.as<char>() + first, last - first);
      }
    });
    for (uint64_t part : parts) h = mix(h, part);
    std::memcpy(out.data, &h, sizeof h);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
