// 1x1 convolution, stride 1, no padding: a matrix product over pixels, with bias and ReLU in its epilogue; float32.
//
//   out[p, o] = relu(∑_c x[p, c] w[o, c] + b[o]);   g = grad where saved > 0 (or NaN), else 0
//   dx[p, c] = ∑_o g[p, o] w[o, c];   dw[o, c] = ∑_p g[p, o] x[p, c];   db[o] = ∑_p g[p, o]
//
// Layout  channels_last: pixels are rows as they lie. NCHW: blocks of pixels are transposed into rows on their way into
//         cache, and results on their way out; the weight is packed into panels W[⌈columns/16⌉][depth][16].
// Tiles   forward: threads take blocks of pixels that fit half an L2 with their channels; 6 pixels x 4 (AVX2: 2) vectors of
//         outputs stay in registers over all of C. Backward: steps of kStep pixels. Threads share its blocks of kBlock
//         pixels: mask grad, sum it for db, multiply for dx, copy x; then the 6 x 4 blocks of dw, each of which goes over
//         the step's pixels. No sum is split over threads: the bits do not depend on their number.
// Flops   2 per pixel, C and O; three times that with the backward. Traffic: every operand once.
// Edges   any N, C, O, H, W; whatever passes the last whole vector goes through a buffer. `saved` absent: g = grad.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/kernels/conv2d_layout.h"
#include "cpu/kernels/multiply.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kBlock = 48;  // pixels
constexpr int64_t kStep = 8 * kBlock;
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

// A block as rows of `pitch` >= round_up(channels, lanes) floats, zeros past the last channel; masked by `saved` if there
// is one.
void read_block(float* rows, int64_t pitch, const Pixels& x, const float* saved, int64_t block) {
  const float* from = x.at(block);
  const float* mask = saved ? saved + (from - x.data) : nullptr;
  int64_t count = x.count(block);
  constexpr int L = lanes<float>;
  auto value = [&](int64_t at, int64_t n) {
    V v = read<float>(from + at, n);
    return mask ? (read<float>(mask + at, n) <= 0.f ? V{} : v) : v;
  };
  if (x.nhwc) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < x.channels; c += L)
        store(rows + p * pitch + c, value(p * x.channels + c, min<int64_t>(L, x.channels - c)));
    return;
  }
  for (int64_t c = 0; c < x.channels; c += L)
    for (int64_t p = 0; p < count; p += L) {
      V square[L];
      for (int i = 0; i < L; ++i)
        square[i] = c + i < x.channels ? value((c + i) * x.plane + p, min<int64_t>(L, count - p)) : V{};
      transpose<float>(square);
      for (int i = 0; i < min<int64_t>(L, count - p); ++i)  // not one more: the next row may be another thread's
        store(rows + (p + i) * pitch + c, square[i]);
    }
}

// w[panel][depth][16] of the matrix [depth][columns] whose element lies at depth * depth_stride + column * column_stride.
void pack(float* packed, const float* w, int64_t depth, int64_t columns, int64_t depth_stride, int64_t column_stride,
          int threads) {
  parallel_for(ceil_div(columns, kPanel), ceil_div(4096, depth * kPanel), threads,
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t panel = begin; panel < end; ++panel)
                   for (int64_t i = 0; i < kPanel; ++i) {
                     int64_t column = panel * kPanel + i;
                     for (int64_t k = 0; k < depth; ++k)
                       packed[(panel * depth + k) * kPanel + i] =
                           column < columns ? w[k * depth_stride + column * column_stride] : 0.f;
                   }
               });
}

// block of `to` = rows[count][depth] times the packed matrix, then epilogue(value, column). `buffer` has room for the
// block as rows of round_up(channels, 16).
template <class Epilogue>
void multiply_block(const Pixels& to, int64_t block, const float* rows, int64_t pitch, int64_t depth,
                    const float* packed, float* buffer, const Epilogue& epilogue) {
  int64_t count = to.count(block), padded = round_up(to.channels, kPanel);
  constexpr int per_panel = kPanel / lanes<float>;
  int64_t next = per_panel == 1 ? depth * kPanel : lanes<float>;  // to the next vector of columns
  float* out = to.nhwc ? to.at(block) : buffer;
  int64_t out_row = to.nhwc ? to.channels : padded, whole = to.nhwc ? to.channels : padded;
  for (int64_t c = 0; c < padded; c += kColumns) {
    const float* b = packed + c / kPanel * depth * kPanel + c % kPanel;
    with_constant<kVectors>(static_cast<int>(min(kColumns, padded - c) / lanes<float>), [&](auto vectors) {
      auto run = [&](auto row_count, int64_t r) {
        float* p = out + r * out_row + c;
        auto finish = [&](int i, int h, V sum) __attribute__((always_inline)) {
          int64_t column = c + h * lanes<float>;
          V value = epilogue(sum, column);
          if (column + lanes<float> <= whole)
            store(p + i * out_row + h * lanes<float>, value);
          else if (column < whole)
            store_first(p + i * out_row + h * lanes<float>, value, whole - column);
        };
        multiply_with<row_count.value, vectors.value>(rows + r * pitch, pitch, 1, b, next, kPanel, depth, finish);
      };
      int64_t r = 0;
      for (; r + kRows <= count; r += kRows) run(std::integral_constant<int, kRows>{}, r);
      with_constant<kRows - 1>(static_cast<int>(count - r), [&](auto rest) { run(rest, r); });
    });
  }
  if (!to.nhwc) strip_to_planes<float>(to.at(block), to.plane, buffer, padded, to.channels, count);
}

// d[o][c] += ∑_p g[p][o] x[p][c] for outputs [first, last), all vectors of channels.
void add_products(float* d, int64_t d_row, const float* g, int64_t g_row, const float* x, int64_t x_row, int64_t pixels,
                  int64_t first, int64_t last) {
  for (int64_t c = 0; c < d_row; c += kColumns)
    with_constant<kVectors>(static_cast<int>(min(kColumns, d_row - c) / lanes<float>), [&](auto vectors) {
      auto run = [&](auto rows, int64_t o) {
        multiply<rows.value, vectors.value, true>(g + o, 1, g_row, x + c, lanes<float>, x_row, pixels,
                                                  d + o * d_row + c, d_row);
      };
      int64_t o = first;
      for (; o + kRows <= last; o += kRows) run(std::integral_constant<int, kRows>{}, o);
      with_constant<kRows - 1>(static_cast<int>(last - o), [&](auto rest) { run(rest, o); });
    });
}

PYFUSED_INLINE bool dense(const View& x) { return x.dtype == DType::f32 && x.ndim == 4 && (is_nchw(x) || is_nhwc(x)); }
PYFUSED_INLINE bool same_pixels(const View& a, const View& b) {
  return a.shape[0] == b.shape[0] && a.shape[2] == b.shape[2] && a.shape[3] == b.shape[3];
}
PYFUSED_INLINE bool is_weight(const View& w, int64_t outputs, int64_t channels) {
  return w.dtype == DType::f32 && w.ndim == 4 && w.shape[0] == outputs && w.shape[1] == channels && w.shape[2] == 1 &&
         w.shape[3] == 1;
}
PYFUSED_INLINE bool is_bias(const View& b, int64_t outputs) {
  return !b || (b.dtype == DType::f32 && b.ndim == 1 && b.numel() == outputs && b.contiguous());
}

}  // namespace

// out [N, O, H, W] from input [N, C, H, W], both contiguous or both channels_last; weight [O, C, 1, 1] of any strides.
Status conv2d_1x1(View out, View input, View weight, View bias, int threads) {
  PYFUSED_REQUIRE(dense(input), "input", "must be float32, contiguous or channels_last");
  PYFUSED_REQUIRE(dense(out) && same_pixels(out, input), "out", "must be float32 with the input's N, H and W");
  bool nhwc = is_nhwc(input) && is_nhwc(out);
  PYFUSED_REQUIRE(nhwc || (is_nchw(input) && is_nchw(out)), "out", "must have the layout of input");
  int64_t channels = input.shape[1], outputs = out.shape[1];
  PYFUSED_REQUIRE(is_weight(weight, outputs, channels), "weight", "must be float32 [O, C, 1, 1]");
  PYFUSED_REQUIRE(is_bias(bias, outputs), "bias", "must be O contiguous float32");
  int64_t size = max<int64_t>(kBlock, (32 << 10) / (channels + 1) / kBlock * kBlock),
          padded = round_up(outputs, kPanel);
  Pixels x(input, nhwc, min<int64_t>(size, 4 * kBlock)), y(out, nhwc, min<int64_t>(size, 4 * kBlock));
  int64_t pitch = round_up(channels, lanes<float>), buffer = nhwc ? 0 : x.size * (pitch + padded);
  auto* packed = static_cast<float*>(scratch(0, sizeof(float) * (padded * (channels + 1) + threads * buffer)));
  float *shift = packed + padded * channels, *memory = shift + padded;
  pack(packed, weight.as<float>(), channels, outputs, weight.strides[1], weight.strides[0], threads);
  for (int64_t o = 0; o < padded; ++o) shift[o] = bias && o < outputs ? bias.as<float>()[o] : 0.f;
  parallel_for(x.blocks, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    float *rows = memory + thread * buffer, *results = rows + x.size * pitch;
    for (int64_t block = begin; block < end; ++block) {
      if (!nhwc) read_block(rows, pitch, x, nullptr, block);
      multiply_block(y, block, nhwc ? x.at(block) : rows, nhwc ? channels : pitch, channels, packed, results,
                     [&](V v, int64_t o) __attribute__((always_inline)) { return relu<float>(v + load(shift + o)); });
    }
  });
  return {};
}

// d_input, d_weight (any strides) and d_bias, each or none, from grad = dL/dout and the forward's output `saved`.
Status conv2d_1x1_backward(View d_input, View d_weight, View d_bias, View grad, View saved, View input, View weight,
                           int threads) {
  PYFUSED_REQUIRE(dense(input), "input", "must be float32, contiguous or channels_last");
  PYFUSED_REQUIRE(dense(grad) && same_pixels(grad, input), "grad", "must be float32 with the input's N, H and W");
  PYFUSED_REQUIRE(!saved || (dense(saved) && same_shape(saved, grad)), "saved", "must be float32 like grad");
  PYFUSED_REQUIRE(!d_input || (dense(d_input) && same_shape(d_input, input)), "d_input", "must be float32 like input");
  auto all = [&](auto is) { return is(input) && is(grad) && (!saved || is(saved)) && (!d_input || is(d_input)); };
  bool nhwc = all([](const View& x) { return is_nhwc(x); });
  PYFUSED_REQUIRE(nhwc || all([](const View& x) { return is_nchw(x); }), "input", "all must have one layout");
  int64_t channels = input.shape[1], outputs = grad.shape[1];
  PYFUSED_REQUIRE(is_weight(weight, outputs, channels), "weight", "must be float32 [O, C, 1, 1]");
  PYFUSED_REQUIRE(!d_weight || is_weight(d_weight, outputs, channels), "d_weight", "must be float32 [O, C, 1, 1]");
  PYFUSED_REQUIRE(is_bias(d_bias, outputs), "d_bias", "must be O contiguous float32");

  Pixels x(input, nhwc, kBlock), g(grad, nhwc, kBlock), dx(d_input ? d_input : input, nhwc, kBlock);
  int64_t g_row = round_up(outputs, lanes<float>) + kSkew, x_row = round_up(channels, lanes<float>) + kSkew;
  int64_t d_row = x_row - kSkew, padded = round_up(channels, kPanel);
  int64_t sizes[] = {kStep * g_row, kStep * x_row, outputs * d_row,          padded * outputs,
                     8 * g_row,     g_row,         threads * kBlock * padded};
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  float* part[7] = {static_cast<float*>(scratch(0, sizeof(float) * total))};
  for (int i = 1; i < 7; ++i) part[i] = part[i - 1] + sizes[i - 1];
  auto [gs, xs, d, packed, sums, bias, buffers] = part;
  std::memset(d, 0, sizeof(float) * sizes[2]);
  std::memset(bias, 0, sizeof(float) * g_row);
  if (d_input) pack(packed, weight.as<float>(), outputs, channels, weight.strides[0], weight.strides[1], threads);

  for (int64_t first = 0; first < g.blocks; first += 8) {
    int64_t blocks = min<int64_t>(8, g.blocks - first), offset[9] = {};
    for (int64_t i = 0; i < blocks; ++i) offset[i + 1] = offset[i] + g.count(first + i);
    parallel_for(
        blocks, 1, threads,
        [&, gs = gs, xs = xs, packed = packed, sums = sums, buffers = buffers](int64_t begin, int64_t end, int thread) {
          for (int64_t i = begin; i < end; ++i) {
            float *rows = gs + offset[i] * g_row, *sum = sums + i * g_row;
            read_block(rows, g_row, g, saved.as<float>(), first + i);
            if (d_weight) read_block(xs + offset[i] * x_row, x_row, x, nullptr, first + i);
            if (d_bias)
              for (int64_t o = 0; o < outputs; o += lanes<float>) {
                V total{};
                for (int64_t p = 0; p < g.count(first + i); ++p) total += load(rows + p * g_row + o);
                store(sum + o, total);
              }
            if (d_input)
              multiply_block(dx, first + i, rows, g_row, outputs, packed, buffers + thread * kBlock * padded,
                             [](V v, int64_t) __attribute__((always_inline)) { return v; });
          }
        });
    for (int64_t i = 0; d_bias && i < blocks; ++i)
      for (int64_t o = 0; o < outputs; o += lanes<float>) store(bias + o, load(bias + o) + load(sums + i * g_row + o));
    if (d_weight)
      parallel_for(ceil_div(outputs, kRows), 1, threads, [&, gs = gs, xs = xs, d = d](int64_t begin, int64_t end, int) {
        add_products(d, d_row, gs, g_row, xs, x_row, offset[blocks], begin * kRows, min(outputs, end * kRows));
      });
  }
  for (int64_t o = 0; d_weight && o < outputs; ++o)
    for (int64_t c = 0; c < channels; ++c)
      d_weight.as<float>()[o * d_weight.strides[0] + c * d_weight.strides[1]] = d[o * d_row + c];
  if (d_bias) std::memcpy(d_bias.data, bias, sizeof(float) * outputs);
  return {};
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
