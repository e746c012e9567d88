// ReLU and the maxima of pooling windows, number by number.
#pragma once
#include "cuda/common.cuh"
#include "image_layout.h"

namespace pyfused {
namespace cuda {
namespace {

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
