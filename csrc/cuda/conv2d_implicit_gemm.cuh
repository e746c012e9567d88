// What the implicit-GEMM convolutions share: tiles of 64 x 64 or 128 x 128 numbers, an inner dimension that is read 64
// bytes at a time (kInner numbers) through kStages buffers, and the products of one such tile.
//
// Every buffer in shared memory is made of 16-byte chunks, swizzled so that the eight rows of an ldmatrix lie in
// different banks. Operands lie in one of two ways:
//   rows     [64 or 128][kInner]: the inner dimension is adjacent, as in NHWC inputs and weights
//   columns  [kInner][64 or 128]: the outer dimension is, as for the weight gradient, whose inner dimension is pixels
// Products  16-bit types with float sums; float as TF32 (10 bits of mantissa), or, EXACT, as 3xTF32: each number is the
//           sum of two TF32 numbers, 22 bits, three of the four products are formed, and each step's sum is added with
//           rounding to nearest, which tensor cores do not do. In 3xTF32 infinity times infinity is NaN.
#pragma once
#include "cuda/conv2d_operands.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kStages = 3;
constexpr int kChunks = 4;  // of the inner dimension at a time

template <class T>
constexpr int kInner = kChunks * kWidth<T>;

template <bool LARGE>
struct Tile {
  static constexpr int size = LARGE ? 128 : 64;  // rows and columns of the result
  static constexpr int threads = LARGE ? 256 : 128;
  static constexpr int warps = LARGE ? 4 : 2;        // side by side; two above each other
  static constexpr int high = size / 32;             // a warp's tile in units of 16 rows; it is 32 = 4 x 8 columns wide
  static constexpr int bytes = size * kChunks * 16;  // of one operand
};

template <bool LARGE>
using Sums = float[Tile<LARGE>::high][4][4];

// --- Where things lie
__device__ __forceinline__ int row_chunk(int row, int chunk) { return (row * kChunks + (chunk ^ (row >> 1 & 3))) * 16; }

template <class T, bool LARGE>
__device__ __forceinline__ int column_chunk(int inner, int chunk) {  // 32-bit numbers are not read by ldmatrix
  return (inner * (Tile<LARGE>::size / kWidth<T>)+(chunk ^ (sizeof(T) == 2 ? inner & 7 : (inner & 3) * 2))) * 16;
}

// --- Loop over the inner dimension: load(buffer) begins to fill a buffer with the next numbers; a thread then changes
// what it has copied itself, arrive(buffer), before all threads read it, compute(buffer).
template <class Load, class Arrive, class Compute>
__device__ __forceinline__ void pipeline(int steps, const Load& load, const Arrive& arrive, const Compute& compute) {
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s);
    copy_async_commit();
  }
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    copy_async_wait<kStages - 2>();
    arrive(s % kStages);
    __syncthreads();  // also: all threads have done with the buffer that is filled next
    if (s + kStages - 1 < steps) load((s + kStages - 1) % kStages);
    copy_async_commit();
    compute(s % kStages);
  }
  __syncthreads();
}

// --- Products
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

// Four 8 x 8 matrices (8 x 4 of 32-bit numbers) of an operand in columns, inner numbers from `inner`, outer from `outer`;
// SECOND_INNER: the second matrix is further inside and the third further outside, else the other way round.
template <class T, bool LARGE, bool SECOND_INNER>
__device__ __forceinline__ void load_columns(uint32_t (&r)[4], const unsigned char* operand, int inner, int outer) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int in = SECOND_INNER ? lane >> 3 & 1 : lane >> 4, out = SECOND_INNER ? lane >> 4 : lane >> 3 & 1;
    const int chunk = outer / kWidth<T> + out;
    load_matrices_transposed(r, operand + column_chunk<T, LARGE>(inner + (lane & 7) + in * 8, chunk));
  } else {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int in = SECOND_INNER ? m & 1 : m >> 1, out = SECOND_INNER ? m >> 1 : m & 1;
      const int column = outer + out * 8 + lane / 4;
      const int at = column_chunk<T, LARGE>(inner + in * 4 + lane % 4, column / 4) + column % 4 * 4;
      r[m] = *reinterpret_cast<const uint32_t*>(operand + at);
    }
  }
}
template <class T, bool SECOND_INNER>
__device__ __forceinline__ void load_rows(uint32_t (&r)[4], const unsigned char* operand, int chunk, int outer) {
  const int lane = threadIdx.x % 32;
  const int in = SECOND_INNER ? lane >> 3 & 1 : lane >> 4, out = SECOND_INNER ? lane >> 4 : lane >> 3 & 1;
  load_matrices(r, operand + row_chunk(outer + (lane & 7) + out * 8, chunk + in));
}

// sums += a b over one buffer: a has Tile::size rows, b as many columns; COLUMNS: how both lie.
template <class T, bool EXACT, bool LARGE, bool COLUMNS>
__device__ __forceinline__ void multiply_tiles(Sums<LARGE>& sums, const unsigned char* a, const unsigned char* b) {
  constexpr int high = Tile<LARGE>::high;
  const int warp = threadIdx.x / 32;
  const int top = warp / Tile<LARGE>::warps * (16 * high), left = warp % Tile<LARGE>::warps * 32;
#pragma unroll
  for (int step = 0; step < kChunks / 2; ++step) {
    const int inner = step * 2 * kWidth<T>;
    Fragment<EXACT, 2> right[4];
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      if constexpr (COLUMNS)
        load_columns<T, LARGE, true>(words, b, inner, left + j * 8);
      else
        load_rows<T, true>(words, b, step * 2, left + j * 8);
#pragma unroll
      for (int r = 0; r < 4; ++r) right[j + r / 2].template set<T>(r % 2, words[r]);
    }
#pragma unroll
    for (int i = 0; i < high; ++i) {
      Fragment<EXACT, 4> fragment;
      if constexpr (COLUMNS)
        load_columns<T, LARGE, false>(words, a, inner, top + i * 16);
      else
        load_rows<T, false>(words, a, step * 2, top + i * 16);
#pragma unroll
      for (int r = 0; r < 4; ++r) fragment.template set<T>(r, words[r]);
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply<T, EXACT>(sums[i][j], fragment, right[j]);
    }
  }
}

// Calls visit(row, column, x, y) for this thread's pairs of adjacent sums.
template <bool LARGE, class Visit>
__device__ __forceinline__ void for_each_pair(const Sums<LARGE>& sums, const Visit& visit) {
  constexpr int high = Tile<LARGE>::high;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int top = warp / Tile<LARGE>::warps * (16 * high) + lane / 4;
  const int left = warp % Tile<LARGE>::warps * 32 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < high; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        visit(top + i * 16 + half * 8, left + j * 8, sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
}

// --- Launching
// Calls run(T{}, exact, large), the last two std::true_type or std::false_type.
template <class Run>
Status for_products(DType dtype, bool exact, bool large, const Run& run) {
  auto sized = [&](auto type, auto exactly) {
    return large ? run(type, exactly, std::true_type()) : run(type, exactly, std::false_type());
  };
  switch (dtype) {
    case DType::f32:
      return exact ? sized(float(), std::true_type()) : sized(float(), std::false_type());
    case DType::bf16:
      return sized(__nv_bfloat16(), std::false_type());
    case DType::f16:
      return sized(__half(), std::false_type());
    default:
      return invalid("input", "must be float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace cuda
}  // namespace pyfused
