// What the Winograd kernels share: the transforms of F(4x4, 3x3), where tiles lie, how their patches are read, and the
// matrix product in the middle. The contracts stand in conv2d_winograd.cpp and conv2d_winograd_backward_*.cpp.
//
// Interpolation points 0, 1, −1, 2, −2, ∞ (Lavin & Gray 2015, arXiv:1509.09308):
//        ⎡4  0 −5  0 1 0⎤        ⎡ 1/4     0    0 ⎤
//        ⎢0 −4 −4  1 1 0⎥        ⎢−1/6  −1/6  −1/6⎥        ⎡1 1  1 1  1 0⎤
//   Bᵀ = ⎢0  4 −4 −1 1 0⎥    G = ⎢−1/6   1/6  −1/6⎥   Aᵀ = ⎢0 1 −1 2 −2 0⎥
//        ⎢0 −2 −1  2 1 0⎥        ⎢ 1/24  1/12  1/6⎥        ⎢0 1  1 4  4 0⎥
//        ⎢0  2 −1 −2 1 0⎥        ⎢ 1/24 −1/12  1/6⎥        ⎣0 1 −1 8 −8 1⎦
//        ⎣0  4  0 −5 0 1⎦        ⎣  0      0    1 ⎦
#pragma once
#include "cpu/kernels.h"
#include "cpu/kernels/conv2d_layout.h"
#include "cpu/kernels/multiply.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int kTile = 4;             // outputs of a tile, per dimension
constexpr int kPatch = 6;            // inputs they depend on
constexpr int kPoints = 36;          // products that replace 16 * 9
using Bytes = BytesOf<float>::type;  // the codes of a vector of channels

// --- One-dimensional transforms of vectors `s` apart (each lane is a channel).
PYFUSED_INLINE void times_bt(V* d, int s) {
  V x0 = d[0], x1 = d[s], x2 = d[2 * s], x3 = d[3 * s], x4 = d[4 * s], x5 = d[5 * s];
  V even = x4 - 4.f * x2, odd = x3 - 4.f * x1, even2 = x4 - x2, odd2 = 2.f * (x3 - x1);
  d[0] = 4.f * x0 + (x4 - 5.f * x2);
  d[s] = even + odd;
  d[2 * s] = even - odd;
  d[3 * s] = even2 + odd2;
  d[4 * s] = even2 - odd2;
  d[5 * s] = 4.f * x1 + (x5 - 5.f * x3);
}
PYFUSED_INLINE void times_at(const V* m, int s, V* y, int ys) {
  V sum1 = m[s] + m[2 * s], dif1 = m[s] - m[2 * s], sum2 = m[3 * s] + m[4 * s], dif2 = m[3 * s] - m[4 * s];
  y[0] = m[0] + sum1 + sum2;
  y[ys] = 2.f * dif2 + dif1;
  y[2 * ys] = 4.f * sum2 + sum1;
  y[3 * ys] = 8.f * dif2 + dif1 + m[5 * s];
}
PYFUSED_INLINE void times_a(const V* g, int s, V* z, int zs) {
  V even = g[0] + g[2 * s], odd = g[s] + g[3 * s];
  V even2 = 4.f * g[2 * s] + g[0], odd2 = 8.f * g[3 * s] + 2.f * g[s];
  z[0] = g[0];
  z[zs] = even + odd;
  z[2 * zs] = even - odd;
  z[3 * zs] = even2 + odd2;
  z[4 * zs] = even2 - odd2;
  z[5 * zs] = g[3 * s];
}
PYFUSED_INLINE void times_b(const V* m, int s, V* x, int xs) {
  V sum1 = m[s] + m[2 * s], dif1 = m[s] - m[2 * s], sum2 = m[3 * s] + m[4 * s], dif2 = m[3 * s] - m[4 * s];
  x[0] = 4.f * m[0];
  x[xs] = 4.f * (m[5 * s] - dif1) - 2.f * dif2;
  x[2 * xs] = -5.f * m[0] - (4.f * sum1 + sum2);
  x[3 * xs] = 2.f * dif2 + (dif1 - 5.f * m[5 * s]);
  x[4 * xs] = m[0] + sum1 + sum2;
  x[5 * xs] = m[5 * s];
}
PYFUSED_INLINE void times_g(const V* w, int s, V* u, int us) {  // without the factors of its rows, so without rounding
  V even = w[0] + w[2 * s], even2 = w[0] + 4.f * w[2 * s], odd2 = 2.f * w[s];
  u[0] = w[0];
  u[us] = even + w[s];
  u[2 * us] = even - w[s];
  u[3 * us] = even2 + odd2;
  u[4 * us] = even2 - odd2;
  u[5 * us] = w[2 * s];
}
constexpr double kFactor[6] = {1. / 4, -1. / 6, -1. / 6, 1. / 24, 1. / 24, 1};  // of G's rows
PYFUSED_INLINE void times_gt(const V* u, int s, V* w, int ws) {
  V sum1 = (1.f / 6) * (u[s] + u[2 * s]), sum2 = u[3 * s] + u[4 * s];
  w[0] = 0.25f * u[0] + ((1.f / 24) * sum2 - sum1);
  w[ws] = (1.f / 6) * (u[2 * s] - u[s]) + (1.f / 12) * (u[3 * s] - u[4 * s]);
  w[2 * ws] = (1.f / 6) * sum2 - sum1 + u[5 * s];
}

// --- Two-dimensional transforms; the first pass goes down columns.
PYFUSED_INLINE void transform_patch(V (&d)[kPoints]) {  // Bᵀ d B, in place
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) times_bt(d + j, 6);
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) times_bt(d + 6 * i, 1);
}
PYFUSED_INLINE void transform_products(const V (&m)[kPoints], V (&y)[16]) {  // Aᵀ m A
  V half[24];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) times_at(m + j, 6, half + j, 6);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) times_at(half + 6 * i, 1, y + 4 * i, 1);
}
PYFUSED_INLINE void transform_patch(V (&g)[16], V (&z)[kPoints]) {  // A g Aᵀ
  V half[24];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) times_a(g + j, 4, half + j, 4);
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) times_a(half + 4 * i, 1, z + 6 * i, 1);
}
PYFUSED_INLINE void transform_products_to_patch(const V (&m)[kPoints], V (&x)[kPoints]) {  // B m Bᵀ
  V half[kPoints];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) times_b(m + j, 6, half + j, 6);
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) times_b(half + 6 * i, 1, x + 6 * i, 1);
}
PYFUSED_INLINE void transform_filter(const V (&w)[9], V (&u)[kPoints]) {  // G w Gᵀ
  V half[18];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) times_g(w + j, 3, half + j, 3);
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) times_g(half + 3 * i, 1, u + 6 * i, 1);
#pragma GCC unroll 36
  for (int k = 0; k < kPoints; ++k) u[k] *= static_cast<float>(kFactor[k / 6] * kFactor[k % 6]);
}
PYFUSED_INLINE void transform_filter_back(const V (&u)[kPoints], V (&w)[9]) {  // Gᵀ u G
  V half[18];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) times_gt(u + j, 6, half + j, 6);
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) times_gt(half + 6 * i, 1, w + 3 * i, 1);
}

// --- Sources: what a patch is read from, [images, height, width, channels]. load() gives the channels c to c + lanes
// of one pixel, or, if not Whole, the first `count` of them and zeros.
template <bool Whole>
PYFUSED_INLINE V load_channels(const float* p, int64_t count) {
  return Whole ? load(p) : load_first(p, count);
}
struct Plain {
  const float* data;
  int64_t height, width, channels;
  template <bool Whole>
  PYFUSED_INLINE V load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t count) const {
    return load_channels<Whole>(data + ((n * height + h) * width + w) * channels + c, count);
  }
  PYFUSED_INLINE void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    __builtin_prefetch(data + ((n * height + h) * width + w) * channels + c);
  }
};
struct Masked {  // the gradient before the ReLU; zero where the ReLU's output was (a NaN passes, as in torch)
  const float *grad, *output;
  int64_t height, width, channels;
  template <bool Whole>
  PYFUSED_INLINE V load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t count) const {
    int64_t at = ((n * height + h) * width + w) * channels + c;
    return load_channels<Whole>(output + at, count) <= 0.f ? V{} : load_channels<Whole>(grad + at, count);
  }
  PYFUSED_INLINE void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    int64_t at = ((n * height + h) * width + w) * channels + c;
    __builtin_prefetch(output + at);
    __builtin_prefetch(grad + at);
  }
};
struct Unpooled {  // the gradient before ReLU and pool: each pooled value goes to the one pixel that its code names
  const float* grad;
  const uint8_t* code;
  int64_t height, width, channels;  // of the pixels that windows cover: twice the pooled size
  template <bool Whole>
  PYFUSED_INLINE V load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t count) const {
    int64_t at = ((n * (height / 2) + h / 2) * (width / 2) + w / 2) * channels + c;
    Bytes bytes{};
    std::memcpy(&bytes, code + at, Whole ? sizeof bytes : count);
    VecI32 here = __builtin_convertvector(bytes, VecI32) == static_cast<int32_t>(h % 2 * 2 + w % 2);
    return here ? load_channels<Whole>(grad + at, count) : V{};
  }
  PYFUSED_INLINE void prefetch(int64_t, int64_t, int64_t, int64_t) const {}  // a quarter of the bytes: no gain
};

// --- Tiles of a [images, height, width] result, row by row.
struct Grid {
  int64_t height, width, down, across, count;
  PYFUSED_INLINE Grid(int64_t images, int64_t height, int64_t width)
      : height(height),
        width(width),
        down(ceil_div(height, kTile)),
        across(ceil_div(width, kTile)),
        count(images * down * across) {}
};
struct Tile {
  int64_t n, h, w;  // image, first row, first column
  PYFUSED_INLINE Tile(const Grid& grid, int64_t id)
      : n(id / (grid.down * grid.across)), h(id / grid.across % grid.down * kTile), w(id % grid.across * kTile) {}
};

// Reads the P x P patch whose corner is (h, w) (parts of it may lie outside: zeros), transforms it and stores its 36
// points `point_stride` apart.
template <int P, bool Whole, class Source>
PYFUSED_INLINE void transform_one(const Source& source, int64_t n, int64_t h, int64_t w, int64_t c, float* out,
                                  int64_t point_stride) {
  int64_t count = source.channels - c;
  auto finish = [&](V(&d)[P* P]) {
    if constexpr (P == kPatch) {
      transform_patch(d);
#pragma GCC unroll 36
      for (int k = 0; k < kPoints; ++k) store(out + k * point_stride, d[k]);
    } else {
      V z[kPoints];
      transform_patch(d, z);
#pragma GCC unroll 36
      for (int k = 0; k < kPoints; ++k) store(out + k * point_stride, z[k]);
    }
  };
  int64_t top = max<int64_t>(0, -h), bottom = min<int64_t>(P, source.height - h);
  int64_t left = max<int64_t>(0, -w), right = min<int64_t>(P, source.width - w);
  V d[P * P];
  if (Whole && top == 0 && left == 0 && bottom == P && right == P) {  // this copy of the code keeps d in registers
    V inner[P * P];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < P; ++j) inner[i * P + j] = source.template load<true>(n, h + i, w + j, c, count);
    // The next tile's new pixels: its rows lie too far apart for the hardware to foresee.
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
      for (int j = P - kTile; j < P; ++j) source.prefetch(n, h + i, w + kTile + j, c);
    return finish(inner);
  }
  for (int k = 0; k < P * P; ++k) d[k] = V{};
  for (int64_t i = top; i < bottom; ++i)
    for (int64_t j = left; j < right; ++j) d[i * P + j] = source.template load<Whole>(n, h + i, w + j, c, count);
  finish(d);
}

// Channels [begin, end) (begin and, but for the last, end: whole vectors) of tiles [first, first + count) of the grid into
// out[36][count][round_up(end - begin, lanes)].
template <int P, class Source>
void transform_tiles(const Source& source, const Grid& grid, int64_t first, int64_t count, int pad_h, int pad_w,
                     float* out, int64_t row_stride, int64_t point_stride, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < count; ++t, out += row_stride) {
    Tile tile(grid, first + t);
    int64_t c = begin;
    for (; c + lanes<float> <= end; c += lanes<float>)
      transform_one<P, true>(source, tile.n, tile.h - pad_h, tile.w - pad_w, c, out + c - begin, point_stride);
    if (c < end)
      transform_one<P, false>(source, tile.n, tile.h - pad_h, tile.w - pad_w, c, out + c - begin, point_stride);
  }
}

// All channels.
template <int P, class Source>
void transform_tiles(const Source& source, const Grid& grid, int64_t first, int64_t count, int pad_h, int pad_w,
                     float* out, int64_t row_stride, int64_t point_stride) {
  transform_tiles<P>(source, grid, first, count, pad_h, pad_w, out, row_stride, point_stride, 0, source.channels);
}

// --- Checks
PYFUSED_INLINE bool channels_last(const View& x, DType dtype) { return x.dtype == dtype && is_nhwc(x); }
PYFUSED_INLINE bool has_shape(const View& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  return x.shape[0] == n && x.shape[1] == c && x.shape[2] == h && x.shape[3] == w;
}
PYFUSED_INLINE bool is_channel_vector(const View& x, int64_t channels) {  // or absent
  return !x || (x.dtype == DType::f32 && x.contiguous() && x.numel() == channels);
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
