// What the depthwise convolution's forward and backward share: its sizes, and the sums along one row of a map.
#pragma once
#include "conv2d_layout.h"
#include "cpu/kernels.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t L = lanes<float>;
constexpr int kColumns = L == 16 ? 8 : 4;  // results of a tile, with the sums of 3x3 weights in the registers
constexpr int kMaxHeight = 16;             // of the kernel

struct Sizes {
  int64_t n, channels, height, width, out_height, out_width, kh, kw, stride, pad_h, pad_w;
  PYFUSED_INLINE int64_t row() const { return width * channels; }
  PYFUSED_INLINE int64_t out_row() const { return out_width * channels; }
};

// The rows of a map that rows of weights are laid on: from[k] · weight[k], k < count.
struct Rows {
  int64_t count;
  const float *from[kMaxHeight], *weight[kMaxHeight];
};

// pixel[k][e]: column first + e of row k, zeros where that lies outside.
template <int E>
PYFUSED_INLINE void locate(const float* (&pixel)[kMaxHeight][E], const Rows& rows, int64_t first, int64_t width,
                           int64_t channels, const float* zeros) {
  for (int64_t k = 0; k < rows.count; ++k)
    for (int e = 0; e < E; ++e) {
      int64_t column = first + e;
      pixel[k][e] = column >= 0 && column < width ? rows.from[k] + column * channels : zeros;
    }
}

// The first channel of vector `v` of `channels`: the last one ends with them.
PYFUSED_INLINE int64_t first_channel(int64_t v, int64_t channels) { return min(v * L, channels - L); }

// out[q · out_step] = max(least, bias + ∑_k ∑_j weight[k][j] · row k [q · S − pad + j]) for `count` results of one row.
template <int Taps, int S>
void correlate_row(float* out, int64_t out_step, int64_t count, const Rows& rows, const float* bias, float least,
                   int64_t width, int64_t pad, int64_t channels, const float* zeros) {
  constexpr int Q = kColumns, E = (Q - 1) * S + Taps;
  const float* pixel[kMaxHeight][E];
  for (int64_t q0 = 0; q0 < count; q0 += Q) {
    int64_t first = max<int64_t>(min(q0, count - Q), 0), results = min<int64_t>(Q, count);
    locate<E>(pixel, rows, first * S - pad, width, channels, zeros);
    for (int64_t v = 0; v < ceil_div(channels, L); ++v) {
      int64_t c = first_channel(v, channels);
      V sum[Q];
      for (int q = 0; q < Q; ++q) sum[q] = bias ? load(bias + c) : V{};
      for (int64_t k = 0; k < rows.count; ++k) {
        V weight[Taps];
        for (int j = 0; j < Taps; ++j) weight[j] = load(rows.weight[k] + j * channels + c);
#pragma GCC unroll 32
        for (int e = 0; e < E; ++e) {
          V value = load(pixel[k][e] + c);
#pragma GCC unroll 7
          for (int j = 0; j < Taps; ++j)
            if (int q = (e - j) / S; e >= j && (e - j) % S == 0 && q < Q) sum[q] += value * weight[j];
        }
      }
      V floor = splat(least);
      float* to = out + first * out_step + c;
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q)
        if (q < results) store(to + q * out_step, floor > sum[q] ? floor : sum[q]);  // this way round a NaN stays
    }
  }
}

// The rows of the input under row y of the output, with the kernel's rows.
PYFUSED_INLINE Rows rows_under(const float* image, const float* weight, int64_t y, const Sizes& s, int64_t* first) {
  Rows rows{};
  *first = max<int64_t>(0, s.pad_h - y * s.stride);
  for (int64_t i = *first; i < min(s.kh, s.height + s.pad_h - y * s.stride); ++i, ++rows.count) {
    rows.from[rows.count] = image + (y * s.stride + i - s.pad_h) * s.row();
    rows.weight[rows.count] = weight + i * s.kw * s.channels;
  }
  return rows;
}

// run(std::integral_constant Taps, stride) for the kernel's width and the stride.
template <class Run>
Status for_sizes(const Sizes& s, const Run& run) {
  auto with_stride = [&](auto taps) {
    s.stride == 1 ? run(taps, std::integral_constant<int, 1>{}) : run(taps, std::integral_constant<int, 2>{});
    return Status{};
  };
  if (s.kw == 3) return with_stride(std::integral_constant<int, 3>{});
  if (s.kw == 5) return with_stride(std::integral_constant<int, 5>{});
  return with_stride(std::integral_constant<int, 7>{});
}

PYFUSED_INLINE bool is_map(const View& x) { return x.dtype == DType::f32 && is_nhwc(x); }

// The sizes, if these tensors are of one depthwise convolution.
Status measure(Sizes* s, const View& input, const View& weight, const View& out, const View& bias, int64_t stride,
               int64_t pad_h, int64_t pad_w) {
  PYFUSED_REQUIRE(is_map(input) && input.shape[1] >= L, "input", "must be channels_last float32 of a vector or more");
  PYFUSED_REQUIRE(weight.dtype == DType::f32 && weight.ndim == 4 && weight.shape[0] == input.shape[1] &&
                      weight.shape[1] == 1 && weight.shape[2] >= 1 && weight.shape[2] <= kMaxHeight &&
                      (weight.shape[3] == 3 || weight.shape[3] == 5 || weight.shape[3] == 7),
                  "weight", "must be float32 [C, 1, 1..16, 3 or 5 or 7]");
  PYFUSED_REQUIRE((stride == 1 || stride == 2) && pad_h >= 0 && pad_w >= 0, "stride", "must be 1 or 2");
  PYFUSED_REQUIRE(!bias || (bias.dtype == DType::f32 && bias.contiguous() && bias.numel() == input.shape[1]), "bias",
                  "must be C contiguous float32");
  *s = {input.shape[0],  input.shape[1],  input.shape[2], input.shape[3], 0,    0,
        weight.shape[2], weight.shape[3], stride,         pad_h,          pad_w};
  s->out_height = (s->height + 2 * pad_h - s->kh) / stride + 1;
  s->out_width = (s->width + 2 * pad_w - s->kw) / stride + 1;
  PYFUSED_REQUIRE(is_map(out) && out.shape[0] == s->n && out.shape[1] == s->channels && out.shape[2] == s->out_height &&
                      out.shape[3] == s->out_width,
                  "out", "must be channels_last float32 of the convolution's size");
  return {};
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
