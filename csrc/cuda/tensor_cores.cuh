// Operands of tensor cores in shared memory, and products of their fragments.
//
// A panel is some rows of 64 bytes (kInner numbers) of the inner dimension, in 16-byte chunks that are swizzled so that
// the eight rows of an ldmatrix lie in different banks.
// Products  16-bit types with float sums; float as TF32 (10 bits of mantissa), or, EXACT, as 3xTF32: each number is the
//           sum of two TF32 numbers, 22 bits, three of the four products are formed, and each step's sum is added with
//           rounding to nearest, which tensor cores do not do. In 3xTF32 infinity times infinity is NaN.
#pragma once
#include "cuda/common.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kChunks = 4;  // of the inner dimension at a time

template <class T>
constexpr int kInner = kChunks * kWidth<T>;

__device__ __forceinline__ int row_chunk(int row, int chunk) { return (row * kChunks + (chunk ^ (row >> 1 & 3))) * 16; }

// R registers of a fragment; of a number in 3xTF32 `rest` is what `value` leaves. A number that TF32 cannot hold, such
// as infinity, goes to `rest` alone: infinity times the 0 that it would leave would be NaN.
template <bool EXACT, int R>
struct Fragment {
  uint32_t value[R], rest[EXACT ? R : 1];

  template <class T>
  __device__ __forceinline__ void set(int i, uint32_t word) {
    value[i] = word;
    if constexpr (sizeof(T) == 4) {
      float x;
      memcpy(&x, &word, sizeof x);
      value[i] = to_tf32(x);
      if constexpr (EXACT) {
        float rounded;
        memcpy(&rounded, &value[i], sizeof x);
        const bool finite = fabsf(rounded) < INFINITY;
        rest[i] = finite ? to_tf32(x - rounded) : word;
        if (!finite) value[i] = 0;
      }
    }
  }
};

template <class T, bool EXACT>
__device__ __forceinline__ void multiply(float (&sum)[4], const Fragment<EXACT, 4>& a, const Fragment<EXACT, 2>& b) {
  if constexpr (EXACT) {
    float step[4] = {0, 0, 0, 0};
    mma(step, a.rest, b.value, T());
    mma(step, a.value, b.rest, T());
    mma(step, a.value, b.value, T());
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += step[i];
  } else {
    mma(sum, a.value, b.value, T());
  }
}

// Four 8 x 8 matrices (8 x 4 of 32-bit numbers) of a panel, from a chunk and a row on; SECOND_INNER: the second matrix
// is further inside and the third further outside, else the other way round.
template <class T, bool SECOND_INNER>
__device__ __forceinline__ void load_rows(uint32_t (&r)[4], const unsigned char* operand, int chunk, int outer) {
  const int lane = threadIdx.x % 32;
  const int in = SECOND_INNER ? lane >> 3 & 1 : lane >> 4, out = SECOND_INNER ? lane >> 4 : lane >> 3 & 1;
  load_matrices(r, operand + row_chunk(outer + (lane & 7) + out * 8, chunk + in));
}

}  // namespace
}  // namespace cuda
}  // namespace pyfused
