// What the kernels that read rows of embedding tables stand on: ids of two widths, tables, 16 bytes of a row per thread.
#pragma once
#include "cuda/common.cuh"
#include "cuda/index_errors.cuh"

namespace pyfused {
namespace cuda {

constexpr int kBlock = 256;

// int32 or int64 ids. The branch in [] goes the same way for all threads.
struct Ids {
  const void* data;
  bool wide;
  explicit Ids(const View& v) : data(v.data), wide(v.dtype == DType::i64) {}
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

template <class T>
struct Table {
  const T* data;
  int64_t rows, stride;
  int dim;
  explicit Table(const View& v)
      : data(v.as<T>()), rows(v.shape[0]), stride(v.strides[0]), dim(static_cast<int>(v.shape[1])) {}
  __device__ __forceinline__ const T* row(int64_t id) const { return data + id * stride; }
  __device__ __forceinline__ bool has(int64_t id) const {
    return static_cast<uint64_t>(id) < static_cast<uint64_t>(rows);
  }
  // Every row is whole 16-byte blocks.
  bool whole_vectors() const { return is_aligned(data) && stride % kWidth<T> == 0 && dim % kWidth<T> == 0; }
};

// Threads to a row, a power of two: enough for one load of `width` numbers each, in [4, most].
inline int lanes_for(int64_t dim, int width, int most) {
  int lanes = 4;
  while (lanes < most && lanes * width < dim) lanes *= 2;
  return lanes;
}

inline bool is_packed(const View& v) { return v.contiguous() || v.numel() == 0; }
inline bool is_table(const View& v) {
  return v.ndim == 2 && (v.strides[1] == 1 || v.shape[1] <= 1) && v.shape[1] < INT32_MAX / 2;
}
inline bool are_ids(const View& v) { return v.index() && is_packed(v); }
inline bool is_bias(const View& bias, const View& weight) {
  return !bias || (bias.dtype == weight.dtype && is_packed(bias) && bias.numel() == weight.shape[0]);
}

}  // namespace cuda
}  // namespace pyfused
