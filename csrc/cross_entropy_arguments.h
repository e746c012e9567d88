// What cross_entropy's kernels of every backend agree on: the reductions by number, and what they are given.
#pragma once
#include <cstdint>

#include "tensor_view.h"

namespace pyfused {

enum Reduction { none, mean, sum };

// The kernels' own check of what they are given. Losses, statistics and weights have the dtype of the arithmetic.
PYFUSED_INLINE Status check_cross_entropy(const View& loss, const View& lse, const View& stats, const View& total,
                                          const View& input, const View& target, const View& weight, int reduction) {
  PYFUSED_REQUIRE(input.ndim == 2 || input.ndim == 3, "input", "must be [R, C] or [N, C, P]");
  PYFUSED_REQUIRE(input.shape[1] < INT32_MAX - 1024, "input", "must have fewer than 2^31 - 1025 classes");
  const int64_t rows = input.shape[0] * (input.ndim == 3 ? input.shape[2] : 1);
  const DType arithmetic = input.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (target.dtype == DType::i64) {
    PYFUSED_REQUIRE(target.contiguous() && target.numel() == rows, "target", "must be one contiguous label per row");
  } else {
    PYFUSED_REQUIRE(target.dtype == input.dtype || target.dtype == arithmetic, "target", "must have the logits' dtype");
    PYFUSED_REQUIRE(same_shape(target, input), "target", "must have the logits' shape");
  }
  PYFUSED_REQUIRE(stats.ndim == 2 && stats.contiguous() && stats.shape[0] == 3 && stats.shape[1] == rows &&
                      stats.dtype == arithmetic,
                  "stats", "must be [3, rows]");
  PYFUSED_REQUIRE(total.numel() == 1 && total.dtype == arithmetic, "total", "must be one number");
  PYFUSED_REQUIRE(loss.contiguous() && loss.dtype == arithmetic && loss.numel() == (reduction == none ? rows : 1),
                  "loss", "must be contiguous, one number or one per row");
  PYFUSED_REQUIRE(!lse || (lse.contiguous() && lse.dtype == arithmetic && lse.numel() == rows), "lse",
                  "must be contiguous, one per row");
  PYFUSED_REQUIRE(!weight || (weight.contiguous() && weight.dtype == arithmetic && weight.numel() == input.shape[1]),
                  "weight", "must be contiguous, one per class");
  return {};
}

}  // namespace pyfused
