// What the Winograd kernels share: the transforms of F(4x4, 3x3) and F(3x3, 3x3), where tiles lie, how their patches are
// read, and the matrix product in the middle. The contracts stand in conv2d_winograd.cpp and conv2d_winograd_backward_*.cpp.
//
// A tile of T x T results takes (T + 2)² products in place of 9 T²: 36 for 144, 25 for 81. Incomplete tiles cost as much
// as whole ones, so 3 is ahead for results of 1 to 3, 5, 6 or 9 pixels a side.
//
// T = 4, interpolation points 0, 1, −1, 2, −2, ∞ (Lavin & Gray 2015, arXiv:1509.09308):
//        ⎡4  0 −5  0 1 0⎤        ⎡ 1/4     0    0 ⎤
//        ⎢0 −4 −4  1 1 0⎥        ⎢−1/6  −1/6  −1/6⎥        ⎡1 1  1 1  1 0⎤
//   Bᵀ = ⎢0  4 −4 −1 1 0⎥    G = ⎢−1/6   1/6  −1/6⎥   Aᵀ = ⎢0 1 −1 2 −2 0⎥
//        ⎢0 −2 −1  2 1 0⎥        ⎢ 1/24  1/12  1/6⎥        ⎢0 1  1 4  4 0⎥
//        ⎢0  2 −1 −2 1 0⎥        ⎢ 1/24 −1/12  1/6⎥        ⎣0 1 −1 8 −8 1⎦
//        ⎣0  4  0 −5 0 1⎦        ⎣  0      0    1 ⎦
//
// T = 3, points 0, 1, −1, 2, ∞:
//        ⎡2 −1 −2  1 0⎤          ⎡ 1/2    0    0 ⎤
//        ⎢0 −2 −1  1 0⎥          ⎢−1/2  −1/2 −1/2⎥         ⎡1 1  1 1 0⎤
//   Bᵀ = ⎢0  2 −3  1 0⎥      G = ⎢−1/6   1/6 −1/6⎥    Aᵀ = ⎢0 1 −1 2 0⎥
//        ⎢0 −1  0  1 0⎥          ⎢ 1/6   1/3  2/3⎥         ⎣0 1  1 4 1⎦
//        ⎣0  2 −1 −2 1⎦          ⎣  0     0    1 ⎦
#pragma once
#include "cpu/kernels.h"
#include "cpu/kernels/conv2d_layout.h"
#include "cpu/kernels/multiply.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

template <int T>
constexpr int kPatch = T + 2;  // inputs that a tile depends on, per dimension
template <int T>
constexpr int kPoints = kPatch<T> * kPatch<T>;  // products in place of 9 * T * T
using Bytes = BytesOf<float>::type;             // the codes of a vector of channels

// --- One-dimensional transforms of vectors `s` apart (each lane is a channel).
template <int T>
struct Transform;

template <>
struct Transform<4> {
  static constexpr double kFactor[6] = {1. / 4, -1. / 6, -1. / 6, 1. / 24, 1. / 24, 1};  // of G's rows
  PYFUSED_INLINE static void times_bt(V* d, int s) {
    V x0 = d[0], x1 = d[s], x2 = d[2 * s], x3 = d[3 * s], x4 = d[4 * s], x5 = d[5 * s];
    V even = x4 - 4.f * x2, odd = x3 - 4.f * x1, even2 = x4 - x2, odd2 = 2.f * (x3 - x1);
    d[0] = 4.f * x0 + (x4 - 5.f * x2);
    d[s] = even + odd;
    d[2 * s] = even - odd;
    d[3 * s] = even2 + odd2;
    d[4 * s] = even2 - odd2;
    d[5 * s] = 4.f * x1 + (x5 - 5.f * x3);
  }
  PYFUSED_INLINE static void times_at(const V* m, int s, V* y, int ys) {
    V sum1 = m[s] + m[2 * s], dif1 = m[s] - m[2 * s], sum2 = m[3 * s] + m[4 * s], dif2 = m[3 * s] - m[4 * s];
    y[0] = m[0] + sum1 + sum2;
    y[ys] = 2.f * dif2 + dif1;
    y[2 * ys] = 4.f * sum2 + sum1;
    y[3 * ys] = 8.f * dif2 + dif1 + m[5 * s];
  }
  PYFUSED_INLINE static void times_a(const V* g, int s, V* z, int zs) {
    V even = g[0] + g[2 * s], odd = g[s] + g[3 * s];
    V even2 = 4.f * g[2 * s] + g[0], odd2 = 8.f * g[3 * s] + 2.f * g[s];
    z[0] = g[0];
    z[zs] = even + odd;
    z[2 * zs] = even - odd;
    z[3 * zs] = even2 + odd2;
    z[4 * zs] = even2 - odd2;
    z[5 * zs] = g[3 * s];
  }
  PYFUSED_INLINE static void times_b(const V* m, int s, V* x, int xs) {
    V sum1 = m[s] + m[2 * s], dif1 = m[s] - m[2 * s], sum2 = m[3 * s] + m[4 * s], dif2 = m[3 * s] - m[4 * s];
    x[0] = 4.f * m[0];
    x[xs] = 4.f * (m[5 * s] - dif1) - 2.f * dif2;
    x[2 * xs] = -5.f * m[0] - (4.f * sum1 + sum2);
    x[3 * xs] = 2.f * dif2 + (dif1 - 5.f * m[5 * s]);
    x[4 * xs] = m[0] + sum1 + sum2;
    x[5 * xs] = m[5 * s];
  }
  PYFUSED_INLINE static void times_g(const V* w, int s, V* u,
                                     int us) {  // without the factors of its rows, so without rounding
    V even = w[0] + w[2 * s], even2 = w[0] + 4.f * w[2 * s], odd2 = 2.f * w[s];
    u[0] = w[0];
    u[us] = even + w[s];
    u[2 * us] = even - w[s];
    u[3 * us] = even2 + odd2;
    u[4 * us] = even2 - odd2;
    u[5 * us] = w[2 * s];
  }
  PYFUSED_INLINE static void times_gt(const V* u, int s, V* w, int ws) {
    V sum1 = (1.f / 6) * (u[s] + u[2 * s]), sum2 = u[3 * s] + u[4 * s];
    w[0] = 0.25f * u[0] + ((1.f / 24) * sum2 - sum1);
    w[ws] = (1.f / 6) * (u[2 * s] - u[s]) + (1.f / 12) * (u[3 * s] - u[4 * s]);
    w[2 * ws] = (1.f / 6) * sum2 - sum1 + u[5 * s];
  }
};

template <>
struct Transform<3> {
  static constexpr double kFactor[5] = {1. / 2, -1. / 2, -1. / 6, 1. / 6, 1};
  PYFUSED_INLINE static void times_bt(V* d, int s) {
    V x0 = d[0], x1 = d[s], x2 = d[2 * s], x3 = d[3 * s], x4 = d[4 * s];
    V odd = x3 - x1;
    d[0] = 2.f * (x0 - x2) + odd;
    d[s] = x3 - 2.f * x1 - x2;
    d[2 * s] = x3 + 2.f * x1 - 3.f * x2;
    d[3 * s] = odd;
    d[4 * s] = x4 - x2 - 2.f * odd;
  }
  PYFUSED_INLINE static void times_at(const V* m, int s, V* y, int ys) {
    V sum = m[s] + m[2 * s];
    y[0] = m[0] + sum + m[3 * s];
    y[ys] = 2.f * m[3 * s] + (m[s] - m[2 * s]);
    y[2 * ys] = 4.f * m[3 * s] + sum + m[4 * s];
  }
  PYFUSED_INLINE static void times_a(const V* g, int s, V* z, int zs) {
    V even = g[0] + g[2 * s];
    z[0] = g[0];
    z[zs] = even + g[s];
    z[2 * zs] = even - g[s];
    z[3 * zs] = 4.f * g[2 * s] + (2.f * g[s] + g[0]);
    z[4 * zs] = g[2 * s];
  }
  PYFUSED_INLINE static void times_b(const V* m, int s, V* x, int xs) {
    V twice = 2.f * (m[2 * s] - m[s] + m[4 * s]);
    x[0] = 2.f * m[0];
    x[xs] = twice - (m[0] + m[3 * s]);
    x[2 * xs] = -2.f * m[0] - m[s] - 3.f * m[2 * s] - m[4 * s];
    x[3 * xs] = m[0] + m[s] + m[2 * s] + m[3 * s] - 2.f * m[4 * s];
    x[4 * xs] = m[4 * s];
  }
  PYFUSED_INLINE static void times_g(const V* w, int s, V* u, int us) {
    V even = w[0] + w[2 * s];
    u[0] = w[0];
    u[us] = even + w[s];
    u[2 * us] = even - w[s];
    u[3 * us] = w[0] + 4.f * w[2 * s] + 2.f * w[s];
    u[4 * us] = w[2 * s];
  }
  PYFUSED_INLINE static void times_gt(const V* u, int s, V* w, int ws) {
    V half = 0.5f * u[s], sixth = (1.f / 6) * u[2 * s];
    w[0] = 0.5f * u[0] - half + ((1.f / 6) * u[3 * s] - sixth);
    w[ws] = sixth - half + (1.f / 3) * u[3 * s];
    w[2 * ws] = (2.f / 3) * u[3 * s] - half - sixth + u[4 * s];
  }
};

// --- Two-dimensional transforms; the first pass goes down columns. P: T + 2.
template <int T, int P = kPatch<T>>
PYFUSED_INLINE void transform_patch(V (&d)[P * P]) {  // Bᵀ d B, in place
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) Transform<T>::times_bt(d + j, P);
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) Transform<T>::times_bt(d + P * i, 1);
}
template <int T, int P = kPatch<T>>
PYFUSED_INLINE void transform_products(const V (&m)[P * P], V (&y)[T * T]) {  // Aᵀ m A
  V half[T * P];
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) Transform<T>::times_at(m + j, P, half + j, P);
#pragma GCC unroll 4
  for (int i = 0; i < T; ++i) Transform<T>::times_at(half + P * i, 1, y + T * i, 1);
}
template <int T, int P = kPatch<T>>
PYFUSED_INLINE void transform_gradient(const V (&g)[T * T], V (&z)[P * P]) {  // A g Aᵀ
  V half[T * P];
#pragma GCC unroll 4
  for (int j = 0; j < T; ++j) Transform<T>::times_a(g + j, T, half + j, T);
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) Transform<T>::times_a(half + T * i, 1, z + P * i, 1);
}
template <int T, int P = kPatch<T>>
PYFUSED_INLINE void transform_products_to_patch(const V (&m)[P * P], V (&x)[P * P]) {  // B m Bᵀ
  V half[P * P];
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) Transform<T>::times_b(m + j, P, half + j, P);
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) Transform<T>::times_b(half + P * i, 1, x + P * i, 1);
}
template <int T, int P = kPatch<T>>
PYFUSED_INLINE void transform_filter(const V (&w)[9], V (&u)[P * P]) {  // G w Gᵀ
  V half[3 * P];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) Transform<T>::times_g(w + j, 3, half + j, 3);
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) Transform<T>::times_g(half + 3 * i, 1, u + P * i, 1);
  constexpr auto& factor = Transform<T>::kFactor;
#pragma GCC unroll 36
  for (int k = 0; k < P * P; ++k) u[k] *= static_cast<float>(factor[k / P] * factor[k % P]);
}
template <int T, int P = kPatch<T>>
PYFUSED_INLINE void transform_filter_back(const V (&u)[P * P], V (&w)[9]) {  // Gᵀ u G
  V half[3 * P];
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) Transform<T>::times_gt(u + j, P, half + j, P);
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) Transform<T>::times_gt(half + P * i, 1, w + 3 * i, 1);
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
  int64_t height, width, tile, down, across, count;
  PYFUSED_INLINE Grid(int64_t images, int64_t height, int64_t width, int tile)
      : height(height),
        width(width),
        tile(tile),
        down(ceil_div(height, tile)),
        across(ceil_div(width, tile)),
        count(images * down * across) {}
};
struct Tile {
  int64_t n, h, w;  // image, first row, first column
  PYFUSED_INLINE Tile(const Grid& grid, int64_t id)
      : n(id / (grid.down * grid.across)),
        h(id / grid.across % grid.down * grid.tile),
        w(id % grid.across * grid.tile) {}
};

// Reads the P x P patch whose corner is (h, w) (parts of it may lie outside: zeros), transforms it and stores its points
// `point_stride` apart. P: T + 2 for an input, T for a gradient.
template <int T, int P, bool Whole, class Source>
PYFUSED_INLINE void transform_one(const Source& source, int64_t n, int64_t h, int64_t w, int64_t c, float* out,
                                  int64_t point_stride) {
  int64_t count = source.channels - c;
  auto finish = [&](V(&d)[P* P]) {
    if constexpr (P == kPatch<T>) {
      transform_patch<T>(d);
#pragma GCC unroll 36
      for (int k = 0; k < kPoints<T>; ++k) store(out + k * point_stride, d[k]);
    } else {
      V z[kPoints<T>];
      transform_gradient<T>(d, z);
#pragma GCC unroll 36
      for (int k = 0; k < kPoints<T>; ++k) store(out + k * point_stride, z[k]);
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
      for (int j = P - T; j < P; ++j) source.prefetch(n, h + i, w + T + j, c);
    return finish(inner);
  }
  for (int k = 0; k < P * P; ++k) d[k] = V{};
  for (int64_t i = top; i < bottom; ++i)
    for (int64_t j = left; j < right; ++j) d[i * P + j] = source.template load<Whole>(n, h + i, w + j, c, count);
  finish(d);
}

// Channels [begin, end) (begin and, but for the last, end: whole vectors) of tiles [first, first + count) of the grid into
// out[points][count][round_up(end - begin, lanes)].
template <int T, int P, class Source>
void transform_tiles(const Source& source, const Grid& grid, int64_t first, int64_t count, int pad_h, int pad_w,
                     float* out, int64_t row_stride, int64_t point_stride, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < count; ++t, out += row_stride) {
    Tile tile(grid, first + t);
    int64_t c = begin;
    for (; c + lanes<float> <= end; c += lanes<float>)
      transform_one<T, P, true>(source, tile.n, tile.h - pad_h, tile.w - pad_w, c, out + c - begin, point_stride);
    if (c < end)
      transform_one<T, P, false>(source, tile.n, tile.h - pad_h, tile.w - pad_w, c, out + c - begin, point_stride);
  }
}

// All channels.
template <int T, int P, class Source>
void transform_tiles(const Source& source, const Grid& grid, int64_t first, int64_t count, int pad_h, int pad_w,
                     float* out, int64_t row_stride, int64_t point_stride) {
  transform_tiles<T, P>(source, grid, first, count, pad_h, pad_w, out, row_stride, point_stride, 0, source.channels);
}

// body(std::integral_constant<int, tile>) for a tile that there is.
template <class Body>
Status with_tile(int tile, const Body& body) {
  PYFUSED_REQUIRE(tile == 3 || tile == 4, "tile", "must be 3 or 4");
  return tile == 3 ? body(std::integral_constant<int, 3>{}) : body(std::integral_constant<int, 4>{});
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
