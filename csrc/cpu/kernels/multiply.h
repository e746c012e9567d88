// The matrix product that the convolutions are made of: a block of rows times vectors of columns, held in registers.
#pragma once
#include <type_traits>

#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int kPanel = 16;  // columns that lie together in a packed matrix, on every instruction set
constexpr int kSkew = 16;   // floats added to a stride that might be a power of two: such lines share one set of the L1
using V = Vec<float>;

PYFUSED_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// body(std::integral_constant<int, n>) for 1 <= n <= Max: register blocks need their size at compile time.
template <int Max, class Body>
PYFUSED_INLINE void with_constant(int n, const Body& body) {
  if (n == Max)
    body(std::integral_constant<int, Max>{});
  else if constexpr (Max > 1)
    with_constant<Max - 1>(n, body);
}

// 6 rows by 4 vectors fill 32 registers, 6 by 2 fill 16.
constexpr int kRows = 6;
constexpr int kVectors = lanes<float> == 16 ? 4 : 2;

// sum[r][h] += left(r) * b[h], one step of a product.
template <int R, int B, class Left>
PYFUSED_INLINE void add_products(V (&sum)[R][B], const Left& left, const float* b, int64_t b_vector) {
  V right[B];
#pragma GCC unroll 4
  for (int h = 0; h < B; ++h) right[h] = load(b + h * b_vector);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    V number = splat(left(r));
#pragma GCC unroll 4
    for (int h = 0; h < B; ++h) sum[r][h] += number * right[h];
  }
}

// finish(r, h, ∑_k a[r, k] * b[k, h]) for R rows and B vectors. Meanwhile what is `ahead`, from k on `ahead_bytes` * k
// bytes farther, is prefetched with the locality `Ahead` of __builtin_prefetch (0: nothing is), and of b, if it is not
// in the L1 cache, what is due in `Soon` steps, a line of kPanel at a time.
template <int R, int B, int Ahead = 0, int Soon = 0, class Finish>
PYFUSED_INLINE void multiply_with(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_vector,
                                  int64_t b_step, int64_t depth, const Finish& finish, const void* ahead = nullptr,
                                  int64_t ahead_bytes = 0) {
  V sum[R][B] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    if constexpr (Ahead > 0) __builtin_prefetch(static_cast<const char*>(ahead) + k * ahead_bytes, 0, Ahead);
    if constexpr (Soon > 0)
#pragma GCC unroll 4
      for (int h = 0; h < B; h += kPanel / lanes<float>) __builtin_prefetch(b + Soon * b_step + h * b_vector);
    add_products<R, B>(sum, [&](int r) __attribute__((always_inline)) { return a[r * a_row]; }, b, b_vector);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int h = 0; h < B; ++h) finish(r, h, sum[r][h]);
}

// m[r][h] (+)= that.
template <int R, int B, bool Add, int Ahead = 0>
PYFUSED_INLINE void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_vector,
                             int64_t b_step, int64_t depth, float* m, int64_t m_row, const void* ahead = nullptr,
                             int64_t ahead_bytes = 0) {
  auto finish = [&](int r, int h, V sum) __attribute__((always_inline)) {
    float* p = m + r * m_row + h * lanes<float>;
    store(p, Add ? load(p) + sum : sum);
  };
  multiply_with<R, B, Ahead>(a, a_row, a_step, b, b_vector, b_step, depth, finish, ahead, ahead_bytes);
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
