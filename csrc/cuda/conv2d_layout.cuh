// The two dense layouts of an (N, C, H, W) tensor, and the codes of max-pooling.
#pragma once
#include "cuda/common.cuh"

namespace pyfused {
namespace cuda {
namespace {

// A code is the place of a maximum in its pooling window, row by row; kDead: the maximum is 0, nothing flows back (DEAD
// in pyfused/ops/conv2d_relu_max_pool2d.py).
constexpr int kDead = 255;

// Where both layouts fit (C = 1, H = W = 1, no element), either reading is right.
inline bool is_nchw(const View& v) { return v.ndim == 4 && v.contiguous(); }
inline bool is_nhwc(const View& v) {
  if (v.ndim != 4) return false;
  if (v.numel() == 0) return true;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (v.shape[d] != 1 && v.strides[d] != expected) return false;
    expected *= v.shape[d];
  }
  return true;
}
inline bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

// ReLU that keeps NaN, as PyTorch's does.
template <class C>
__device__ __forceinline__ C relu(C x) {
  return x <= 0 ? C(0) : x;
}

// The maximum of a window, met number by number, and its place: the first of equal ones; the last NaN.
template <class C>
struct Maximum {
  C best;
  int place;
  __device__ __forceinline__ void begin(C first) { best = first, place = 0; }
  __device__ __forceinline__ void meet(C x, int at) {
    const bool better = x > best || x != x;
    best = better ? x : best;
    place = better ? at : place;
  }
  __device__ __forceinline__ uint8_t code() const { return static_cast<uint8_t>(best <= 0 ? kDead : place); }
};

}  // namespace
}  // namespace cuda
}  // namespace pyfused
