// One warp's product d[16 x 8] = a[16 x K] b[K x 8], for tests of the instructions in ptx.cuh and of their twins here:
// fragments filled number by number as the PTX ISA tables them (sections "Matrix Fragments for mma.m16n8k16" and
// ".m16n8k8"), or by ldmatrix from shared memory, to which cp.async copies. b is given as [8][K].
#include "cuda/common.cuh"
#include "planted.h"

namespace pyfused {
namespace cuda {
namespace {

enum How { by_table, by_rows, by_columns };

template <class T>
__global__ void product(float* d, const T* a, const T* b, How how) {
  constexpr int per = 4 / sizeof(T), K = 8 * per;  // numbers in a register
  const int lane = threadIdx.x, group = lane >> 2, in_group = lane % 4;
  uint32_t left[4], right[4];
  T as[4][per], bs[2][per];
  for (int i = 0; i < 4 * per; ++i) {  // a_i of the tables
    const bool lower = i / per % 2, second = i / per >= 2;
    as[i / per][i % per] = a[(group + 8 * lower) * K + in_group * per + i % per + 4 * per * second];
  }
  for (int i = 0; i < 2 * per; ++i)  // b_i
    bs[i / per][i % per] = b[group * K + in_group * per + i % per + 4 * per * (i >= per)];
  memcpy(left, as, sizeof as);
  memcpy(right, bs, sizeof bs);

  // Rows of 32 bytes; of a's row 3 nothing is copied, it becomes zeros.
  __shared__ __align__(16) unsigned char memory[48 * 32];  // not of T, whose constructor is not for shared memory
  T* const rows_a = reinterpret_cast<T*>(memory);
  T *const rows_b = rows_a + 16 * K, *const columns_a = rows_b + 8 * K, *const columns_b = columns_a + 16 * K;
  if (lane < 24) {
    const T* const from = lane < 16 ? a + lane * K : b + (lane - 16) * K;
    T* const to = lane < 16 ? rows_a + lane * K : rows_b + (lane - 16) * K;
    copy_async<16>(to, from, lane != 3);
    copy_async_commit();
    copy_async<8>(to + K / 2, from + K / 2, lane != 3);
    copy_async<4>(to + K / 4 * 3, from + K / 4 * 3, lane != 3);
    copy_async<4>(to + K / 8 * 7, from + K / 8 * 7, lane != 3);
    copy_async_commit();
  }
  copy_async_wait<0>();
  __syncwarp();
  for (int i = lane; i < 16 * K; i += 32) columns_a[i % K * 16 + i / K] = rows_a[i];
  for (int i = lane; i < 8 * K; i += 32) columns_b[i % K * 8 + i / K] = rows_b[i];
  __syncwarp();
  if (how == by_rows) {  // matrices: a at rows 0, 8 and the same 16 bytes on; b at the first and the second 16 bytes
    load_matrices(left, rows_a + (lane % 16) * K + lane / 16 * (K / 2));
    load_matrices(right, rows_b + lane % 8 * K + lane / 8 % 2 * (K / 2));
  } else if (how == by_columns) {
    load_matrices_transposed(left, columns_a + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    load_matrices_transposed(right, columns_b + lane % 16 * 8);
  }
  float sum[4] = {1, 2, 3, 4};  // c is added
  const uint32_t b_fragment[2] = {right[0], right[1]};
  mma(sum, left, b_fragment, T());
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i >= 2)) * 8 + in_group * 2 + i % 2] = sum[i];
}

}  // namespace

Status fragments(View d, View a, View b, int how, Stream stream) {
  return for_dtype(a.dtype, [&](auto type) -> Status {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>)
      return invalid("a", "must be float32, bfloat16 or float16");
    else
      return launch(product<T>, 1, 32, 0, stream, d.as<float>(), a.as<T>(), b.as<T>(), static_cast<How>(how));
  });
}

}  // namespace cuda
}  // namespace pyfused
