// The pass between the gradient of an activation's output and the gradients of the convolution before it: both layouts,
// any activation.
//
//   g = derive(grad, saved);   d_bias[c] = ∑ g[:, c]
//
// Reads grad and saved once and writes g (unless it is absent) once. Sums of d_bias run over fixed parts of the rows, so
// the bits do not depend on the threads.
#pragma once
#include "conv2d_layout.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {

constexpr int64_t kRowsPerPart = 512;  // NHWC rows summed in float before their sum joins the others

// NHWC: parts of kRowsPerPart rows; sums[part][channel] in the compute type.
template <class T, class S, class Derive>
void grad_nhwc(T* g, compute_t<T>* sums, const T* grad, const S* saved, int64_t rows, int64_t channels, int threads,
               const Derive& derive) {
  using C = compute_t<T>;
  constexpr int64_t L = lanes<C>, unroll = 8;  // rows whose sum stays in a register
  parallel_for(ceil_div(rows, kRowsPerPart), 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t part = begin; part < end; ++part) {
      C* sum = sums + part * channels;
      for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
      int64_t last = min(rows, (part + 1) * kRowsPerPart);
      for (int64_t r = part * kRowsPerPart; r < last; r += unroll)
        for (int64_t c = 0; c < channels; c += L) {
          int64_t n = min(channels - c, L);
          Vec<C> total{};
          for (int64_t row = r; row < min(last, r + unroll); ++row) {
            Vec<C> v =
                derive.template of<C, S>(read<C>(grad + row * channels + c, n), read<C>(saved + row * channels + c, n));
            if (g) write<C>(g + row * channels + c, v, n);
            total += v;
          }
          write<C>(sum + c, read<C>(sum + c, n) + total, n);
        }
    }
  });
}

// NCHW: one part per image; sums[image][channel].
template <class T, class S, class Derive>
void grad_nchw(T* g, compute_t<T>* sums, const T* grad, const S* saved, int64_t planes, int64_t plane, int threads,
               const Derive& derive) {
  using C = compute_t<T>;
  constexpr int64_t L = lanes<C>, block = 64 * L;
  parallel_for(planes, ceil_div(4096, max<int64_t>(plane, 1)), threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      C sum = 0;
      for (int64_t first = 0; first < plane; first += block) {  // a block's sum stays in registers
        Vec<C> total[2] = {};
        for (int64_t i = first; i < min(plane, first + block); i += L) {
          int64_t n = min(plane - i, L), at = p * plane + i;
          Vec<C> v = derive.template of<C, S>(read<C>(grad + at, n), read<C>(saved + at, n));
          if (g) write<C>(g + at, v, n);
          total[i / L % 2] += v;
        }
        sum += reduce_add(total[0] + total[1]);
      }
      sums[p] = sum;
    }
  });
}

// Adds up the parts in double: there may be many, of either sign.
template <class T>
void finish_bias(const View& d_bias, const compute_t<T>* sums, int64_t parts) {
  int64_t channels = d_bias.shape[0];
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += sums[part * channels + c];
    d_bias.as<T>()[c] = from_compute<T>(static_cast<compute_t<T>>(total));
  }
}

// `derive.of<C, S>(grad, saved)` on vectors of the compute type C; S: how `saved` is stored, T or uint8_t (codes).
template <bool Codes, class Derive>
Status grad_pass(const View& g, const View& d_bias, const View& grad, const View& saved, int threads,
                 const Derive& derive) {
  bool nhwc = is_nhwc(grad) && is_nhwc(saved);
  PYFUSED_REQUIRE(same_shape(grad, saved) && (nhwc || (is_nchw(grad) && is_nchw(saved))), "saved",
                  "must have the shape and the layout of grad");
  PYFUSED_REQUIRE(saved.dtype == (Codes ? DType::u8 : grad.dtype), "saved", "must be an output or codes");
  PYFUSED_REQUIRE(!g || (g.dtype == grad.dtype && same_shape(g, grad) && (nhwc ? is_nhwc(g) : is_nchw(g))), "g",
                  "must be like grad");
  PYFUSED_REQUIRE(!d_bias || (d_bias.dtype == grad.dtype && d_bias.ndim == 1 && d_bias.shape[0] == grad.shape[1] &&
                              d_bias.contiguous()),
                  "d_bias", "must be (C,) of grad's dtype");
  int64_t batch = grad.shape[0], channels = grad.shape[1], plane = grad.shape[2] * grad.shape[3];
  int64_t parts = nhwc ? ceil_div(batch * plane, kRowsPerPart) : batch;
  return for_dtype(grad.dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = std::conditional_t<Codes, uint8_t, T>;
    auto* sums = static_cast<compute_t<T>*>(scratch(0, (parts * channels + 1) * sizeof(compute_t<T>)));
    nhwc ? grad_nhwc(g.as<T>(), sums, grad.as<T>(), saved.as<S>(), batch * plane, channels, threads, derive)
         : grad_nchw(g.as<T>(), sums, grad.as<T>(), saved.as<S>(), batch * channels, plane, threads, derive);
    if (d_bias) finish_bias<T>(d_bias, sums, parts);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
