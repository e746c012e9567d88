// What the convolutions of every backend agree on: the two dense layouts of an (N, C, H, W) tensor, the code of "dead".
#pragma once
#include <initializer_list>

#include "tensor_view.h"

namespace pyfused {

// A code is the place of a maximum in its pooling window, row by row; kDead: the maximum is 0, nothing flows back (DEAD
// in pyfused/ops/conv2d_relu_max_pool2d.py).
constexpr int kDead = 255;

// Where both layouts fit (C = 1, H = W = 1, no element), either reading is right.
PYFUSED_INLINE bool is_nchw(const View& v) { return v.ndim == 4 && v.contiguous(); }
PYFUSED_INLINE bool is_nhwc(const View& v) {
  if (v.ndim != 4) return false;
  if (v.numel() == 0) return true;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (v.shape[d] != 1 && v.strides[d] != expected) return false;
    expected *= v.shape[d];
  }
  return true;
}

}  // namespace pyfused
