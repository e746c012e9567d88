// Depthwise convolution + bias + ReLU in channels_last, backward; float32.
//
//   g = grad where out > 0 (or NaN), else 0;   d_bias = ∑ g
//   d_input[n, y, x, c] = ∑_{i, j} weight[c, i, j] · g[n, (y + p − i) / s, (x + p − j) / s, c]  where s divides
//   d_weight[c, i, j]   = ∑_{n, y, x} g[n, y, x, c] · input[n, y·s + i − p, x·s + j − p, c]
//
// Tiles   bands of rows of an image: g of a band goes to a buffer in L2, and all three gradients are made from it. The
//         data gradient is the forward's sum with the kernel turned round; with stride 2, two such sums, of the even and
//         of the odd columns, each with its half of the taps.
// Traffic reads grad, saved and input and writes d_input once, a few rows between bands twice.
// Order   bands are split into a fixed number of parts, summed in order: the bits do not depend on the threads.
// Edges   as in conv2d_depthwise.cpp: outside the map there are zeros, whose product with an infinite gradient is NaN.
#include "conv2d_depthwise.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kParts = 32;  // bounds the threads that can help and the memory of partial sums
constexpr int64_t kBandBytes = 256 << 10;

// sums[k][j][vector] += ∑_x g[x] · row k [x · S − pad + j] for R rows of the kernel.
template <int Taps, int S, int R>
void add_products(float* sums, const float* g, const Rows& rows, int64_t k, const Sizes& s, const float* zeros) {
  constexpr int Q = kColumns, E = (Q - 1) * S + Taps;
  const float *pixel[kMaxHeight][E], *gradient[Q];
  int64_t vectors = ceil_div(s.channels, L);
  Rows here{R, {}, {}};
  for (int r = 0; r < R; ++r) here.from[r] = rows.from[k + r];
  for (int64_t first = 0; first < s.out_width; first += Q) {
    locate<E>(pixel, here, first * S - s.pad_w, s.width, s.channels, zeros);
    for (int q = 0; q < Q; ++q) gradient[q] = first + q < s.out_width ? g + (first + q) * s.channels : zeros;
    for (int64_t v = 0; v < vectors; ++v) {
      int64_t c = first_channel(v, s.channels);
      V values[Q], sum[R][Taps];
      float* to = sums + v * L;
      for (int q = 0; q < Q; ++q) values[q] = load(gradient[q] + c);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
        for (int j = 0; j < Taps; ++j) sum[r][j] = load(to + (r * Taps + j) * vectors * L);
#pragma GCC unroll 32
      for (int e = 0; e < E; ++e)
#pragma GCC unroll 3
        for (int r = 0; r < R; ++r) {
          V value = load(pixel[r][e] + c);
#pragma GCC unroll 7
          for (int j = 0; j < Taps; ++j)
            if (int q = (e - j) / S; e >= j && (e - j) % S == 0 && q < Q) sum[r][j] += value * values[q];
        }
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
        for (int j = 0; j < Taps; ++j) store(to + (r * Taps + j) * vectors * L, sum[r][j]);
    }
  }
}

// --- Backward, one band: output rows [first, last) of an image, and the input rows [first · stride, last · stride).
struct Band {
  int64_t n, first, last, begin, end;  // g holds rows [begin, end)
  Band(int64_t unit, int64_t size, const Sizes& s) {
    int64_t bands = ceil_div(s.out_height, size);
    n = unit / bands, first = unit % bands * size, last = min(s.out_height, first + size);
    int64_t top = first * s.stride + s.pad_h - s.kh + 1, bottom = (input_end(s) - 1 + s.pad_h) / s.stride;
    begin = min(first, ceil_div(max<int64_t>(top, 0), s.stride)), end = min(s.out_height, max(last, bottom + 1));
  }
  PYFUSED_INLINE int64_t input_end(const Sizes& s) const {
    return last == s.out_height ? s.height : min(s.height, last * s.stride);
  }
};

void mask_rows(float* g, const float* grad, const float* saved, int64_t count) {
  int64_t i = 0;
  for (; i + L <= count; i += L) store(g + i, load(saved + i) <= V{} ? V{} : load(grad + i));
  for (; i < count; ++i) g[i] = saved[i] <= 0 ? 0 : grad[i];
}

// sums: [kh · kw + 1][vectors of channels], the last row for the bias.
template <int Taps, int S>
void add_weight_gradient(float* sums, const float* g, const float* image, const Band& band, const Sizes& s,
                         const float* zeros) {
  constexpr int R = Taps == 3 ? 3 : Taps == 5 || L == 16 ? 2 : 1;  // rows of the kernel whose sums fit the registers
  int64_t vectors = ceil_div(s.channels, L), row = Taps * vectors * L;
  for (int64_t y = band.first; y < band.last; ++y) {
    const float* from = g + (y - band.begin) * s.out_row();
    int64_t first, k = 0;
    Rows rows = rows_under(image, nullptr, y, s, &first);
    for (; k + R <= rows.count; k += R) add_products<Taps, S, R>(sums + (first + k) * row, from, rows, k, s, zeros);
    for (; k < rows.count; ++k) add_products<Taps, S, 1>(sums + (first + k) * row, from, rows, k, s, zeros);
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t v = 0; v < vectors; ++v) {
        float* to = sums + s.kh * row + v * L;
        store(to, load(to) + load(from + x * s.channels + first_channel(v, s.channels)));
      }
  }
}

// The last tap j of those that reach columns `phase`, phase + stride, ... of the input: stride | phase + pad − j.
PYFUSED_INLINE int64_t last_tap(int64_t phase, const Sizes& s) {
  return s.kw - 1 - (s.kw - 1 + s.stride - (phase + s.pad_w) % s.stride) % s.stride;
}

// Columns `phase`, phase + S, ... of the band's rows of d_input. `flipped`: the weights of their taps, the last first.
template <int Taps, int S>
void data_gradient(float* image, int64_t phase, const float* g, const float* flipped, const Band& band, const Sizes& s,
                   const float* zeros) {
  int64_t count = ceil_div(s.width - phase, int64_t{S}), pad = (last_tap(phase, s) - phase - s.pad_w) / S;
  for (int64_t y = band.first * S; y < band.input_end(s); ++y) {
    Rows rows{};
    for (int64_t i = (y + s.pad_h) % S; i < s.kh; i += S) {
      int64_t from = (y + s.pad_h - i) / S;
      if (y + s.pad_h < i || from >= s.out_height) continue;
      rows.from[rows.count] = g + (from - band.begin) * s.out_row();
      rows.weight[rows.count++] = flipped + i * s.kw * s.channels;
    }
    correlate_row<Taps, 1>(image + (y * s.width + phase) * s.channels, S * s.channels, count, rows, nullptr,
                           -__builtin_inff(), s.out_width, pad, s.channels, zeros);
  }
}

// flipped[phase][kh][kw][C] as data_gradient takes it.
void flip(float* flipped, const View& weight, const Sizes& s) {
  for (int64_t phase = 0; phase < s.stride; ++phase)
    for (int64_t i = 0; i < s.kh; ++i)
      for (int64_t j = last_tap(phase, s), k = 0; j >= 0; j -= s.stride, ++k)
        for (int64_t c = 0; c < s.channels; ++c)
          flipped[((phase * s.kh + i) * s.kw + k) * s.channels + c] =
              weight.as<float>()[c * weight.strides[0] + i * weight.strides[2] + j * weight.strides[3]];
}

template <int Taps, int S>
void backward(float* d_input, const View& d_weight, float* d_bias, const float* grad, const float* saved,
              const float* input, const View& weight, const Sizes& s, int threads) {
  int64_t taps = s.kh * s.kw, padded = ceil_div(s.channels, L) * L;
  int64_t size = min(s.out_height, max<int64_t>(4, kBandBytes / (sizeof(float) * s.out_row())));
  int64_t buffer = (size + s.kh + s.pad_h + 2) * s.out_row(), part_size = (taps + 1) * padded;
  int64_t units = s.n * ceil_div(s.out_height, size), parts = min(units, kParts);
  auto* zeros = static_cast<float*>(scratch(0, sizeof(float) * (S * taps + 1) * s.channels));
  auto* sums = static_cast<float*>(scratch(1, sizeof(float) * parts * part_size));
  auto* buffers = static_cast<float*>(scratch(2, sizeof(float) * threads * buffer));
  float* flipped = zeros + s.channels;
  std::memset(zeros, 0, sizeof(float) * s.channels);
  if (d_input) flip(flipped, weight, s);
  auto run_unit = [&](int64_t unit, float* part, float* g) {
    Band band(unit, size, s);
    int64_t from = (band.n * s.out_height + band.begin) * s.out_row(), image = band.n * s.height * s.row();
    mask_rows(g, grad + from, saved + from, (band.end - band.begin) * s.out_row());
    add_weight_gradient<Taps, S>(part, g, input + image, band, s, zeros);
    if (!d_input) return;
    for (int64_t phase = 0; phase < min<int64_t>(S, s.width); ++phase) {
      auto run = S == 1 || last_tap(phase, s) / S + 1 == (Taps + S - 1) / S ? data_gradient<(Taps + S - 1) / S, S>
                                                                            : data_gradient<Taps / S, S>;
      run(d_input + image, phase, g, flipped + phase * taps * s.channels, band, s, zeros);
    }
  };
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t p = begin; p < end; ++p) {
      std::memset(sums + p * part_size, 0, sizeof(float) * part_size);
      for (int64_t unit = units * p / parts; unit < units * (p + 1) / parts; ++unit)
        run_unit(unit, sums + p * part_size, buffers + thread * buffer);
    }
  });
  for (int64_t tap = 0; tap <= taps; ++tap)
    for (int64_t c = 0; c < s.channels; ++c) {
      const float* from = sums + tap * padded + c / L * L + c - first_channel(c / L, s.channels);
      float total = 0;
      for (int64_t p = 0; p < parts; ++p) total += from[p * part_size];
      if (tap < taps)
        d_weight.as<float>()[c * d_weight.strides[0] + tap / s.kw * d_weight.strides[2] +
                             tap % s.kw * d_weight.strides[3]] = total;
      else if (d_bias)
        d_bias[c] = total;
    }
}

}  // namespace

// d_input (or absent), d_weight, d_bias (or absent) from grad; `saved` is the forward's output.
Status conv2d_depthwise_backward(View d_input, View d_weight, View d_bias, View grad, View saved, View input,
                                 View weight, int64_t stride, int64_t pad_h, int64_t pad_w, int threads) {
  Sizes s;
  if (Status bad = measure(&s, input, weight, grad, d_bias, stride, pad_h, pad_w); bad.code != Status::ok) return bad;
  PYFUSED_REQUIRE(is_map(saved) && same_shape(saved, grad), "saved", "must be like grad");
  PYFUSED_REQUIRE(!d_input || (is_map(d_input) && same_shape(d_input, input)), "d_input", "must be like input");
  PYFUSED_REQUIRE(d_weight.dtype == DType::f32 && same_shape(d_weight, weight), "d_weight", "must be like weight");
  return for_sizes(s, [&](auto taps, auto step) {
    backward<taps.value, step.value>(d_input.as<float>(), d_weight, d_bias.as<float>(), grad.as<float>(),
                                     saved.as<float>(), input.as<float>(), weight, s, threads);
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
