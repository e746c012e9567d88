// 1x1 convolution, stride 1, no padding: a matrix product over pixels, with bias, residual and activation in its epilogue;
// float32.
//
//   out[p, o] = act(∑_c x[p, c] w[o, c] + b[o] [+ r[p, o]])
//
// Layout  channels_last: pixels are rows as they lie. NCHW: blocks of pixels are transposed into rows on their way into
//         cache, and results on their way out; the weight is packed into panels W[⌈outputs/16⌉][C][16], or comes so.
// Tiles   threads take blocks of pixels that fit half an L2 with their channels; 6 pixels x 4 (AVX2: 2) vectors of outputs
//         stay in registers over all of C. No sum is split over threads: the bits do not depend on their number.
// Flops   2 per pixel, C and O. Traffic: every operand once, the next rows of the input and the residual fetched ahead.
// Edges   any N, C, O, H, W; whatever passes the last whole vector goes through a buffer.
// Backward is PyTorch's: products of this kind, the mask and the bias gradient inside, took 1.2 to 1.5 times as long as
//         oneDNN's two and a pass for the mask, on most shapes and on either layout.
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
constexpr int kSoon = 8;        // steps after which the weight's next line is due: 2 to 9% less time
constexpr int64_t kColumns = kVectors * lanes<float>;

// The pixels of a tensor, cut into blocks of `size` that do not cross images.
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
  PYFUSED_INLINE int64_t count(int64_t block) const { return min(size, plane - block % per_image * size); }
  PYFUSED_INLINE float* at(int64_t block) const {  // the first channel of its first pixel
    return data + block / per_image * plane * channels + block % per_image * size * (nhwc ? channels : 1);
  }
};

// A block of an NCHW tensor as rows of `pitch` >= round_up(channels, lanes) floats, zeros past the last channel.
void read_block(float* rows, int64_t pitch, const Pixels& x, int64_t block) {
  const float* from = x.at(block);
  int64_t count = x.count(block);
  constexpr int L = lanes<float>;
  for (int64_t c = 0; c < x.channels; c += L)
    for (int64_t p = 0; p < count; p += L) {
      V square[L];
      for (int i = 0; i < L; ++i)
        square[i] = c + i < x.channels ? read<float>(from + (c + i) * x.plane + p, min<int64_t>(L, count - p)) : V{};
      transpose<float>(square);
      for (int i = 0; i < min<int64_t>(L, count - p); ++i)  // not one more: the next row may be another thread's
        store(rows + (p + i) * pitch + c, square[i]);
    }
}

// w[panel][C][16] of the weight [O, C, 1, 1].
void pack(float* packed, const View& weight, int threads) {
  int64_t outputs = weight.shape[0], channels = weight.shape[1];
  parallel_for(ceil_div(outputs, kPanel), ceil_div(4096, channels * kPanel), threads,
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t o = begin * kPanel; o < end * kPanel; ++o)
                   for (int64_t c = 0; c < channels; ++c)
                     packed[(o / kPanel * channels + c) * kPanel + o % kPanel] =
                         o < outputs ? weight.as<float>()[o * weight.strides[0] + c * weight.strides[1]] : 0.f;
               });
}

// block of `to` = epilogue(rows[count][depth] times the packed matrix, plus shift, offset in `to`, channels left). `buffer`
// has room for the block as rows of round_up(channels, 16); from there offsets are not those in `to`.
template <class Epilogue>
void multiply_block(const Pixels& to, int64_t block, const float* rows, int64_t pitch, int64_t depth,
                    const float* packed, const float* shift, float* buffer, const Epilogue& epilogue) {
  int64_t count = to.count(block), padded = round_up(to.channels, kPanel);
  constexpr int per_panel = kPanel / lanes<float>;
  int64_t next = per_panel == 1 ? depth * kPanel : lanes<float>;  // to the next vector of columns
  float* out = to.nhwc ? to.at(block) : buffer;
  int64_t out_row = to.nhwc ? to.channels : padded, whole = to.nhwc ? to.channels : padded;
  for (int64_t c = 0; c < padded; c += kColumns) {
    const float* b = packed + c / kPanel * depth * kPanel + c % kPanel;
    with_constant<kVectors>(static_cast<int>(min(kColumns, padded - c) / lanes<float>), [&](auto vectors) {
      // The first time over rows that lie in memory the next ones are fetched ahead: six rows at once are too many streams
      // for the hardware to foresee, and waiting for them took up to 45% of the time.
      bool first = c == 0 && to.nhwc;
      auto run = [&](auto row_count, int64_t r) {
        float* p = out + r * out_row + c;
        auto finish = [&](int i, int h, V sum) __attribute__((always_inline)) {
          int64_t column = c + h * lanes<float>;
          if (column >= whole) return;
          float* at = p + i * out_row + h * lanes<float>;
          V value = epilogue(sum + load(shift + column), at - to.data, whole - column);
          whole - column >= lanes<float> ? store(at, value) : store_first(at, value, whole - column);
        };
        const float* a = rows + r * pitch;
#pragma GCC unroll 6
        for (int i = 0; i < row_count.value; ++i)
#pragma GCC unroll 4
          for (int h = 0; h < vectors.value; ++h) epilogue.prefetch(p + i * out_row + h * lanes<float> - to.data);
        if (first)
          multiply_with<row_count.value, vectors.value, 3, kSoon>(a, pitch, 1, b, next, kPanel, depth, finish,
                                                                  a + kRows * pitch, sizeof(float) * row_count.value);
        else
          multiply_with<row_count.value, vectors.value, 0, kSoon>(a, pitch, 1, b, next, kPanel, depth, finish);
      };
      int64_t r = 0;
      for (; r + kRows <= count; r += kRows) run(std::integral_constant<int, kRows>{}, r);
      with_constant<kRows - 1>(static_cast<int>(count - r), [&](auto rest) { run(rest, r); });
    });
  }
  if (!to.nhwc) strip_to_planes<float>(to.at(block), to.plane, buffer, padded, to.channels, count);
}

PYFUSED_INLINE bool dense(const View& x) { return x.dtype == DType::f32 && x.ndim == 4 && (is_nchw(x) || is_nhwc(x)); }
PYFUSED_INLINE bool same_pixels(const View& a, const View& b) {
  return a.shape[0] == b.shape[0] && a.shape[2] == b.shape[2] && a.shape[3] == b.shape[3];
}
PYFUSED_INLINE bool is_weight(const View& w, int64_t outputs, int64_t channels) {
  return w.dtype == DType::f32 && w.ndim == 4 && w.shape[0] == outputs && w.shape[1] == channels && w.shape[2] == 1 &&
         w.shape[3] == 1;
}
PYFUSED_INLINE bool is_packed(const View& w, int64_t outputs, int64_t channels) {
  return w.dtype == DType::f32 && w.contiguous() && w.numel() == round_up(outputs, kPanel) * channels;
}
PYFUSED_INLINE bool is_bias(const View& b, int64_t outputs) {
  return !b || (b.dtype == DType::f32 && b.ndim == 1 && b.numel() == outputs && b.contiguous());
}

struct Relu {
  PYFUSED_INLINE V operator()(V value, int64_t, int64_t) const { return relu<float>(value); }
  PYFUSED_INLINE void prefetch(int64_t) const {}
};

template <class Epilogue>
Status convolve_1x1(View out, View input, View weight, View bias, const Epilogue& epilogue, int threads) {
  PYFUSED_REQUIRE(dense(input), "input", "must be float32, contiguous or channels_last");
  PYFUSED_REQUIRE(dense(out) && same_pixels(out, input), "out", "must be float32 with the input's N, H and W");
  bool nhwc = is_nhwc(input) && is_nhwc(out);
  PYFUSED_REQUIRE(nhwc || (is_nchw(input) && is_nchw(out)), "out", "must have the layout of input");
  int64_t channels = input.shape[1], outputs = out.shape[1];
  int64_t padded = round_up(outputs, kPanel);
  bool finished = weight.ndim == 1;
  PYFUSED_REQUIRE(finished ? is_packed(weight, outputs, channels) : is_weight(weight, outputs, channels), "weight",
                  "must be float32 [O, C, 1, 1], or packed");
  PYFUSED_REQUIRE(is_bias(bias, outputs), "bias", "must be O contiguous float32");
  int64_t size = max<int64_t>(kBlock, (32 << 10) / (channels + 1) / kBlock * kBlock);
  int64_t share = round_up(ceil_div(out.shape[0] * out.shape[2] * out.shape[3], max(threads, 1)), kRows);
  if (nhwc) size = max<int64_t>(kRows, min(size, share));  // few pixels: some for every thread
  Pixels x(input, nhwc, min<int64_t>(size, 4 * kBlock)), y(out, nhwc, min<int64_t>(size, 4 * kBlock));
  int64_t pitch = round_up(channels, lanes<float>), buffer = nhwc ? 0 : x.size * (pitch + padded);
  int64_t own = finished ? 0 : padded * channels;
  auto* room = static_cast<float*>(scratch(0, sizeof(float) * (own + padded + threads * buffer)));
  float *shift = room + own, *memory = shift + padded;
  if (!finished) pack(room, weight, threads);
  const float* packed = finished ? weight.as<float>() : room;
  for (int64_t o = 0; o < padded; ++o) shift[o] = bias && o < outputs ? bias.as<float>()[o] : 0.f;
  parallel_for(x.blocks, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    float *rows = memory + thread * buffer, *results = rows + x.size * pitch;
    for (int64_t block = begin; block < end; ++block) {
      if (!nhwc) read_block(rows, pitch, x, block);
      multiply_block(y, block, nhwc ? x.at(block) : rows, nhwc ? channels : pitch, channels, packed, shift, results,
                     epilogue);
    }
  });
  return {};
}

}  // namespace

// The weight [O, C, 1, 1] of any strides as the products take it: round_up(O, 16) * C floats.
Status conv2d_1x1_pack(View packed, View weight, int threads) {
  PYFUSED_REQUIRE(weight.ndim == 4 && is_weight(weight, weight.shape[0], weight.shape[1]), "weight",
                  "must be float32 [O, C, 1, 1]");
  PYFUSED_REQUIRE(packed.ndim == 1 && is_packed(packed, weight.shape[0], weight.shape[1]), "packed",
                  "must be round_up(O, 16) * C contiguous float32");
  pack(packed.as<float>(), weight, threads);
  return {};
}

// out [N, O, H, W] from input [N, C, H, W], both contiguous or both channels_last, through the ReLU; weight [O, C, 1, 1]
// of any strides, or packed.
Status conv2d_1x1(View out, View input, View weight, View bias, int threads) {
  return convolve_1x1(out, input, weight, bias, Relu{}, threads);
}

// The same in channels_last with a residual like `out`, or none, and one of the activations of activation.h.
Status conv2d_1x1_act(View out, View input, View weight, View bias, View residual, int activation, double slope,
                      int threads) {
  PYFUSED_REQUIRE(out.ndim == 4 && is_nhwc(out) && is_nhwc(input), "out", "must be channels_last, like input");
  PYFUSED_REQUIRE(!residual || (residual.dtype == DType::f32 && same_shape(residual, out) && is_nhwc(residual)),
                  "residual", "must be like out");
  PYFUSED_REQUIRE(activation >= 0 && activation < kActivations, "activation", "is unknown");
  AddAndActivate epilogue{residual.as<float>(), activation, static_cast<float>(slope)};
  return convolve_1x1(out, input, weight, bias, epilogue, threads);
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
