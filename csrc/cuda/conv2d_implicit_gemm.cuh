// What the implicit-GEMM convolutions share: tiles of 64 x 64 or 128 x 128 numbers, an inner dimension that is read 64
// bytes at a time (kInner numbers) through kStages buffers, and the products of one such tile.
//
// Operands lie in shared memory in one of two ways, both in 16-byte chunks that are swizzled so that the eight rows of an
// ldmatrix lie in different banks:
//   rows     [64 or 128][kInner], a panel of tensor_cores.cuh: the inner dimension is adjacent, as in NHWC inputs and
//            weights
//   columns  [kInner][64 or 128]: the outer dimension is, as for the weight gradient, whose inner dimension is pixels
#pragma once
#include "cuda/conv2d_operands.cuh"
#include "cuda/tensor_cores.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kStages = 3;

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
