// Convolution as a matrix product that finds its rows by pointers (implicit GEMM), with bias, residual and activation in
// its epilogue; float32, any kernel, stride, padding and dilation.
//
//   out[p, o] = act(∑_{t, c} x[pixel under tap t of p, c] w[o, t, c] + b[o] [+ r[p, o]])
//
// Rows    of each output pixel and tap a pointer to the channels of an input pixel, or, in the padding, to zeros (the
//         indirect convolution of Dukhan, 2019): no im2col matrix.
// Layout  channels_last: pixels are rows as they lie. NCHW: the input pixels of a block are transposed into rows on their
//         way into cache, and results on their way out. The weight is packed into panels w[⌈O/16⌉][KH][KW][C][16], or
//         comes so.
// Tiles   blocks of output pixels, which fit half an L2 with their channels, by groups of 64 (AVX2: 16) outputs; of those 6
//         pixels x 4 (AVX2: 2) vectors stay in registers over all taps and C. Threads divide pixels, or outputs where the
//         weight is larger than the maps. No sum is split: the bits do not depend on the number of threads.
// Flops   2 per output pixel, tap, C and O. Traffic: every operand once; the residual, and for 1x1 kernels the next rows
//         of the input, fetched ahead.
// Edges   any N, C, H, W, O; whatever passes the last whole vector goes through a buffer or a mask.
// Backward is PyTorch's: for 1x1, products of this kind, the mask and the bias gradient inside, took 1.2 to 1.5 times as
//         long as oneDNN's two and a pass for the mask, on most shapes and on either layout.
#include "cpu/kernels.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/conv2d_layout.h"
#include "cpu/kernels/multiply.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kBlock = 48;  // pixels
constexpr int kSoon = 8;        // steps of a product that a line takes to come from the L2 cache
constexpr int64_t kColumns = kVectors * lanes<float>;

struct Geometry {  // heights, then widths
  int64_t image[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
  PYFUSED_INLINE int64_t taps() const { return kernel[0] * kernel[1]; }
  PYFUSED_INLINE bool pointwise() const {
    return taps() == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
};

// The pixels of a tensor, cut into blocks of `size`, which in NCHW do not cross images.
struct Pixels {
  float* data;
  bool nhwc;
  int64_t channels, plane, images, size, per_image, blocks;
  Pixels(const View& x, bool nhwc, int64_t size)
      : data(x.as<float>()),
        nhwc(nhwc),
        channels(x.shape[1]),
        plane(x.shape[2] * x.shape[3] * (nhwc ? x.shape[0] : 1)),
        images(nhwc ? 1 : x.shape[0]),
        size(size),
        per_image(ceil_div(plane, size)),
        blocks(x.numel() ? images * per_image : 0) {}
  PYFUSED_INLINE int64_t first(int64_t block) const { return block % per_image * size; }
  PYFUSED_INLINE int64_t count(int64_t block) const { return min(size, plane - first(block)); }
  PYFUSED_INLINE float* at(int64_t block) const {  // the first channel of its first pixel
    return data + block / per_image * plane * channels + first(block) * (nhwc ? channels : 1);
  }
};

// Input pixels as rows of `pitch` floats: of all images (channels_last), or those of one block.
struct Rows {
  const float* data;
  int64_t pitch, top, left, width;  // the first pixel; pixels a row of the image
  PYFUSED_INLINE const float* at(int64_t y, int64_t x) const { return data + ((y - top) * width + x - left) * pitch; }
};

// Which input rows (axis 0) or columns (axis 1) the outputs [first, last] need: [begin, end).
PYFUSED_INLINE void needed(const Geometry& g, int axis, int64_t first, int64_t last, int64_t& begin, int64_t& end) {
  begin = max<int64_t>(0, first * g.stride[axis] - g.padding[axis]);
  end = last * g.stride[axis] - g.padding[axis] + (g.kernel[axis] - 1) * g.dilation[axis] + 1;
  end = max(begin, min(end, g.image[axis]));
}

// Room for the input pixels of a block of `size` outputs.
PYFUSED_INLINE int64_t most_needed(const Geometry& g, int64_t size) {
  int64_t lines = min(g.out[0], (size - 2 + g.out[1]) / g.out[1] + 1), across = min(size, g.out[1]);
  int64_t height = min(g.image[0], (lines - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1);
  int64_t width =
      lines > 1 ? g.image[1] : min(g.image[1], (across - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1);
  return height * width + lanes<float>;  // squares are written whole
}

// The input pixels that the outputs [first, first + count) of an NCHW image need, transposed into rows at `room`.
PYFUSED_INLINE Rows gather(const Geometry& g, const float* image, int64_t channels, int64_t first, int64_t count,
                           float* room, int64_t pitch) {
  int64_t last = first + count - 1, y0 = first / g.out[1], y1 = last / g.out[1], top, bottom, left, right;
  needed(g, 0, y0, y1, top, bottom);
  bool one = y0 == y1;
  needed(g, 1, one ? first % g.out[1] : 0, one ? last % g.out[1] : g.out[1] - 1, left, right);
  Rows rows{room, pitch, top, left, right - left};
  if (rows.width == g.image[1])  // whole lines
    planes_to_strip<float>(room, pitch, image + top * g.image[1], g.image[0] * g.image[1], channels,
                           (bottom - top) * rows.width);
  else
    for (int64_t y = top; y < bottom; ++y)
      planes_to_strip<float>(room + (y - top) * rows.width * pitch, pitch, image + y * g.image[1] + left,
                             g.image[0] * g.image[1], channels, rows.width);
  return rows;
}

// pointers[p / 6][tap][p % 6] to the rows of the outputs [first, first + count), counted over all images.
PYFUSED_INLINE void point(const float** pointers, const Geometry& g, const Rows& rows, int64_t first, int64_t count,
                          const float* zeros) {
  int64_t x = first % g.out[1], line = first / g.out[1], y = line % g.out[0], image = line / g.out[0];
  if (g.pointwise()) {
    const float* row = rows.at(image, x);
    for (int64_t p = 0; p < count; ++p, row += rows.pitch) pointers[p] = row;
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    const float** at = pointers + p / kRows * g.taps() * kRows + p % kRows;
    for (int64_t i = 0; i < g.kernel[0]; ++i) {
      int64_t from_y = y * g.stride[0] - g.padding[0] + i * g.dilation[0];
      bool inside = from_y >= 0 && from_y < g.image[0];
      for (int64_t j = 0; j < g.kernel[1]; ++j, at += kRows) {
        int64_t from_x = x * g.stride[1] - g.padding[1] + j * g.dilation[1];
        *at = inside && from_x >= 0 && from_x < g.image[1] ? rows.at(image * g.image[0] + from_y, from_x) : zeros;
      }
    }
    if (++x < g.out[1]) continue;
    x = 0;
    if (++y < g.out[0]) continue;
    y = 0;
    ++image;
  }
}

// w[panel][tap][C][16] of the weight [O, C, KH, KW].
void pack(float* packed, const View& weight, int threads) {
  int64_t outputs = weight.shape[0], channels = weight.shape[1], across = weight.shape[3];
  int64_t taps = weight.shape[2] * across;
  parallel_for(ceil_div(outputs, kPanel) * taps, ceil_div(4096, channels * kPanel), threads,
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t i = begin; i < end; ++i) {
                   int64_t first = i / taps * kPanel, tap = i % taps;
                   const float* from = weight.as<float>() + first * weight.strides[0] +
                                       tap / across * weight.strides[2] + tap % across * weight.strides[3];
                   float* to = packed + i * channels * kPanel;
                   for (int64_t o = 0; o < kPanel; ++o)
                     for (int64_t c = 0; c < channels; ++c)
                       to[c * kPanel + o] =
                           first + o < outputs ? from[o * weight.strides[0] + c * weight.strides[1]] : 0.f;
                 }
               });
}

// finish(r, h, ∑_{t, k} pointers[t][r][k] * b[t, k, h]) for R rows and B vectors. What is due soon of b is prefetched
// (2 to 10% less time); Ahead: so are the R rows that lie behind these.
template <int R, int B, bool Ahead, class Finish>
PYFUSED_INLINE void multiply_rows(const float* const* pointers, int64_t taps, int64_t channels, const float* b,
                                  int64_t b_vector, const Finish& finish) {
  V sum[R][B] = {};
  for (int64_t t = 0; t < taps; ++t, pointers += kRows) {
    const float* a[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) a[r] = pointers[r];
    for (int64_t k = 0; k < channels; ++k, b += kPanel) {
      if constexpr (Ahead) __builtin_prefetch(a[R - 1] + channels + k * R);
#pragma GCC unroll 4
      for (int h = 0; h < B; h += kPanel / lanes<float>) __builtin_prefetch(b + kSoon * kPanel + h * b_vector);
      add_products<R, B>(sum, [&](int r) __attribute__((always_inline)) { return a[r][k]; }, b, b_vector);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int h = 0; h < B; ++h) finish(r, h, sum[r][h]);
}

// Columns [c, c + 64) of the outputs of one block: epilogue(rows times the packed matrix, plus shift, offset, columns
// left), with offsets in `out`, whose rows are `out_row` apart and end after `left` columns. Ahead: see multiply_rows.
template <bool Ahead, class Epilogue>
PYFUSED_INLINE void multiply_block(float* out, int64_t out_row, int64_t left, int64_t count, int64_t columns,
                                   const float* const* pointers, int64_t taps, int64_t channels, const float* b,
                                   int64_t b_vector, const float* shift, const Epilogue& epilogue) {
  with_constant<kVectors>(static_cast<int>(columns / lanes<float>), [&](auto vectors) {
    auto run = [&](auto row_count, int64_t r) {
      float* p = out + r * out_row;
      auto finish = [&](int i, int h, V sum) __attribute__((always_inline)) {
        int64_t column = h * lanes<float>;
        if (column >= left) return;
        float* at = p + i * out_row + column;
        V value = epilogue(sum + load(shift + column), at - out, left - column);
        left - column >= lanes<float> ? store(at, value) : store_first(at, value, left - column);
      };
#pragma GCC unroll 6
      for (int i = 0; i < row_count.value; ++i)
#pragma GCC unroll 4
        for (int h = 0; h < vectors.value; ++h) epilogue.prefetch(p + i * out_row + h * lanes<float> - out);
      multiply_rows<row_count.value, vectors.value, Ahead>(pointers + r * taps, taps, channels, b, b_vector, finish);
    };
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) run(std::integral_constant<int, kRows>{}, r);
    with_constant<kRows - 1>(static_cast<int>(count - r), [&](auto rest) { run(rest, r); });
  });
}

struct Relu {  // AddAndActivate without its choices, which cost shallow products a tenth of their time
  const float* residual = nullptr;
  PYFUSED_INLINE V operator()(V value, int64_t, int64_t) const { return relu<float>(value); }
  PYFUSED_INLINE void prefetch(int64_t) const {}
};

PYFUSED_INLINE bool dense(const View& x) { return x.dtype == DType::f32 && x.ndim == 4 && (is_nchw(x) || is_nhwc(x)); }
PYFUSED_INLINE bool is_packed(const View& w, int64_t outputs, int64_t channels) {
  return w.ndim == 5 && w.shape[0] == ceil_div(outputs, kPanel) && w.shape[3] == channels && w.shape[4] == kPanel &&
         w.contiguous();
}
PYFUSED_INLINE bool is_weight(const View& w, int64_t outputs, int64_t channels) {
  return w.ndim == 4 && w.shape[0] == outputs && w.shape[1] == channels;
}
PYFUSED_INLINE bool is_bias(const View& b, int64_t outputs) {
  return !b || (b.dtype == DType::f32 && b.ndim == 1 && b.numel() == outputs && b.contiguous());
}

}  // namespace

// The weight [O, C, KH, KW] of any strides as the products take it: [⌈O/16⌉, KH, KW, C, 16].
Status conv2d_implicit_gemm_pack(View packed, View weight, int threads) {
  PYFUSED_REQUIRE(weight.dtype == DType::f32 && weight.ndim == 4, "weight", "must be float32 [O, C, KH, KW]");
  PYFUSED_REQUIRE(packed.dtype == DType::f32 && is_packed(packed, weight.shape[0], weight.shape[1]) &&
                      packed.shape[1] == weight.shape[2] && packed.shape[2] == weight.shape[3],
                  "packed", "must be contiguous float32 [⌈O/16⌉, KH, KW, C, 16]");
  pack(packed.as<float>(), weight, threads);
  return {};
}

// out [N, O, OH, OW] from input [N, C, H, W] and a residual like `out`, or none, all contiguous or all channels_last,
// through one of the activations of activation.h; weight [O, C, KH, KW] of any strides, or packed.
Status conv2d_implicit_gemm(View out, View input, View weight, View bias, View residual, int64_t stride_h,
                            int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                            int activation, double slope, int threads) {
  PYFUSED_REQUIRE(dense(input), "input", "must be float32, contiguous or channels_last");
  PYFUSED_REQUIRE(dense(out) && out.shape[0] == input.shape[0], "out", "must be float32 with the input's N");
  bool nhwc = is_nhwc(input) && is_nhwc(out);
  PYFUSED_REQUIRE(nhwc || (is_nchw(input) && is_nchw(out)), "out", "must have the layout of input");
  int64_t channels = input.shape[1], outputs = out.shape[1];
  bool ready = weight.ndim == 5;
  PYFUSED_REQUIRE(weight.dtype == DType::f32 &&
                      (ready ? is_packed(weight, outputs, channels) : is_weight(weight, outputs, channels)),
                  "weight", "must be float32 [O, C, KH, KW], or packed");
  PYFUSED_REQUIRE(is_bias(bias, outputs), "bias", "must be O contiguous float32");
  PYFUSED_REQUIRE(!residual || (residual.dtype == DType::f32 && same_shape(residual, out) &&
                                (nhwc ? is_nhwc(residual) : is_nchw(residual))),
                  "residual", "must be like out");
  PYFUSED_REQUIRE(activation >= 0 && activation < kActivations, "activation", "is unknown");
  const int64_t* kernel = weight.shape + (ready ? 1 : 2);
  Geometry g{{input.shape[2], input.shape[3]},
             {out.shape[2], out.shape[3]},
             {kernel[0], kernel[1]},
             {stride_h, stride_w},
             {pad_h, pad_w},
             {dilation_h, dilation_w}};
  for (int d = 0; d < 2; ++d)
    PYFUSED_REQUIRE(
        g.stride[d] > 0 && g.dilation[d] > 0 && g.padding[d] >= 0 && g.kernel[d] > 0 &&
            g.out[d] == (g.image[d] + 2 * g.padding[d] - g.dilation[d] * (g.kernel[d] - 1) - 1) / g.stride[d] + 1,
        "out", "must have the convolution's height and width");
  if (g.pointwise())  // lines follow each other: one line
    for (int64_t* size : {g.image, g.out}) {
      size[1] *= size[0];
      size[0] = 1;
    }
  int64_t padded = round_up(outputs, kPanel), pitch = nhwc ? channels : round_up(channels, lanes<float>);
  int64_t depth = g.taps() * channels, groups = ceil_div(padded, kColumns), most = max(threads, 1);
  // Threads divide the pixels, and each reads all of the weight; or the columns, where the weight is larger. In NCHW not
  // even then: every group of columns would transpose the input anew.
  bool by_columns = nhwc && padded * depth > input.numel();
  int64_t size = min(4 * kBlock, max(kBlock, (32 << 10) / (channels + 1) / kBlock * kBlock));
  if (nhwc) {  // blocks of about the same size, as many for each thread
    int64_t pixels = max<int64_t>(1, out.shape[0] * out.shape[2] * out.shape[3]);
    int64_t share = ceil_div(pixels, by_columns ? ceil_div(most, groups) : most);
    size = round_up(ceil_div(share, ceil_div(share, size)), kRows);
  }
  Pixels to(out, nhwc, size), from(input, nhwc, 1), add(residual ? residual : out, nhwc, size);
  // Of all threads: the packed weight, the bias, zeros. Of each: pointers, the block's input, residual and results.
  int64_t own = ready ? 0 : padded * depth, of_block = nhwc ? 0 : (size + lanes<float>)*kColumns;
  int64_t input_rows = nhwc ? 0 : most_needed(g, size) * pitch, each = input_rows + 2 * of_block;
  int64_t pointers = round_up(size, kRows) * g.taps();
  auto* room = static_cast<float*>(
      scratch(0, sizeof(float) * (own + padded + channels + most * each) + sizeof(float*) * most * pointers));
  auto* table = reinterpret_cast<const float**>(room);
  room += most * pointers * sizeof(float*) / sizeof(float);
  float *shift = room + own, *zeros = shift + padded, *memory = zeros + channels;
  if (!ready) pack(room, weight, threads);
  const float* packed = ready ? weight.as<float>() : room;
  for (int64_t o = 0; o < padded; ++o) shift[o] = bias && o < outputs ? bias.as<float>()[o] : 0.f;
  for (int64_t c = 0; c < channels; ++c) zeros[c] = 0.f;
  int64_t b_vector = lanes<float> == kPanel ? depth * kPanel : lanes<float>;  // to the next vector of columns
  auto run = [&](auto epilogue, int64_t begin, int64_t end, int thread) {
    float *rows = memory + thread * each, *results = rows + input_rows, *added = results + of_block;
    const float** of_pixels = table + thread * pointers;
    for (int64_t i = begin, pointed = -1; i < end; ++i) {
      int64_t block = by_columns ? i % to.blocks : i / groups, c = (by_columns ? i / to.blocks : i % groups) * kColumns;
      int64_t first = to.first(block), count = to.count(block), plane = to.plane;
      if (block != pointed) {
        Rows x{from.data, pitch, 0, 0, g.image[1]};
        if (!nhwc)
          x = gather(g, from.data + block / to.per_image * from.plane * channels, channels, first, count, rows, pitch);
        point(of_pixels, g, x, first, count, zeros);
        pointed = block;
      }
      int64_t columns = min(kColumns, padded - c), left = min(kColumns, outputs - c);
      if (residual && nhwc) epilogue.residual = add.at(block) + c;
      if (residual && !nhwc) {
        planes_to_strip<float>(added, kColumns, add.at(block) + c * plane, plane, left, count);
        epilogue.residual = added;
      }
      float* y = nhwc ? to.at(block) + c : results;
      int64_t y_row = nhwc ? outputs : kColumns, y_left = nhwc ? outputs - c : columns;
      const float* b = packed + c / kPanel * depth * kPanel + c % kPanel;
      // The first time over rows that lie in memory the next ones are fetched ahead: six rows at once are too many streams
      // for the hardware to foresee, and waiting for them took up to 45% of the time.
      auto multiply = [&](auto ahead) {
        multiply_block<ahead.value>(y, y_row, y_left, count, columns, of_pixels, g.taps(), channels, b, b_vector,
                                    shift + c, epilogue);
      };
      nhwc&& g.pointwise() && c == 0 ? multiply(std::true_type{}) : multiply(std::false_type{});
      if (!nhwc) strip_to_planes<float>(to.at(block) + c * plane, plane, results, kColumns, left, count);
    }
  };
  parallel_for(to.blocks * groups, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    if (activation == kRelu && !residual)
      run(Relu{}, begin, end, thread);
    else
      run(AddAndActivate{nullptr, activation, static_cast<float>(slope)}, begin, end, thread);
  });
  return {};
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
