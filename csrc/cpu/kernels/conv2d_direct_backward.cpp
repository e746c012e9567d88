// Direct convolution + bias + ReLU (+ 2x2 max-pooling) for few input channels: gradients of weight and bias.
//
//   g             = grad where saved is alive (output > 0 or NaN; code != 255), at its place in the window if pooled
//   d_weight[o, c, i, j] = ∑_{n, y, x} g[n, o, y, x] · input[n, c, y·sh + i − ph, x·sw + j − pw];   d_bias[o] = ∑ g
//
// Tiles   channels of the output lie in the lanes. A band of rows of one image is the unit of work: its input is staged
//         (conv2d_direct.h), g is masked or unpooled into a strip [position][2 vectors]; then for a tile of T kernel rows
//         x KW taps x 2 vectors the sums stay in registers over all positions of the band.
// Traffic reads input, grad and saved once; the strip (L1/L2) once per tile of taps.
// Flops   2 · taps per element of g; floor: the FMA rate.
// Order   units are split into a fixed number of parts, summed in order: the bits do not depend on the threads.
#include "conv2d_direct.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kParts = 32;  // bounds both the threads that can help and the memory of partial sums
constexpr int kMaxKernelWidth = 7;

// Within L1 in NHWC; in NCHW within L2, for long runs of positions in each plane.
constexpr int64_t band_bytes(bool nhwc) { return nhwc ? 24 << 10 : 64 << 10; }

// Kernel rows in a tile, so that rows x KW x 2 accumulators fit the registers.
#if defined(__AVX512F__)
constexpr int tile_rows(int kw) { return kw <= 2 ? 4 : kw == 3 ? 3 : kw <= 5 ? 2 : 1; }
#else
constexpr int tile_rows(int kw) { return kw == 1 ? 4 : kw == 2 ? 3 : kw == 3 ? 2 : 1; }
#endif

// sums[R][KW][NV vectors] += ∑ over the band of g x input, for the kernel rows whose first staged elements are `rows`.
template <class C, int KW, int R, int NV>
PYFUSED_INLINE void correlate(C* sums, const C* const (&rows)[R], const C* g, int64_t count, const DirectSizes& s) {
  constexpr int64_t L = lanes<C>;
  Vec<C> acc[R][KW][NV] = {};
  for (int64_t y = 0; y < count; ++y) {
    const C* x[R];
    for (int r = 0; r < R; ++r) x[r] = rows[r] + y * s.stride_h * s.pitch;
    for (int64_t column = 0; column < s.columns; ++column, g += NV * L) {
      Vec<C> v[NV];
      for (int k = 0; k < NV; ++k) v[k] = load(g + k * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
        for (int j = 0; j < KW; ++j) {
          Vec<C> value = splat<C>(x[r][column * s.stride_w + j]);
          for (int k = 0; k < NV; ++k) acc[r][j][k] += value * v[k];
        }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < KW; ++j)
      for (int k = 0; k < NV; ++k) {
        C* sum = sums + ((r * KW + j) * NV + k) * L;
        store(sum, load(sum) + acc[r][j][k]);
      }
}

// All taps of one block of channels for one band: sums[c_in · kh][KW][NV vectors].
template <class C, int KW, int NV>
void correlate_band(C* sums, const C* staged, const C* g, int64_t count, const DirectSizes& s) {
  constexpr int R = tile_rows(KW);
  auto first = [&](int64_t row) { return staged + row / s.kh * s.plane + row % s.kh * s.pitch; };
  int64_t row = 0, rows = s.c_in * s.kh, step = KW * NV * lanes<C>;
  for (; row + R <= rows; row += R) {
    const C* starts[R];
    for (int r = 0; r < R; ++r) starts[r] = first(row + r);
    correlate<C, KW, R, NV>(sums + row * step, starts, g, count, s);
  }
  for (; row < rows; ++row) {
    const C* starts[1] = {first(row)};
    correlate<C, KW, 1, NV>(sums + row * step, starts, g, count, s);
  }
}

template <class C, int KW = 1>
PYFUSED_INLINE void correlate_band(C* sums, const C* staged, const C* g, int64_t count, bool narrow,
                                   const DirectSizes& s) {
  if constexpr (KW < kMaxKernelWidth)
    if (s.kw != KW) return correlate_band<C, KW + 1>(sums, staged, g, count, narrow, s);
  auto run = narrow ? correlate_band<C, KW, 1> : correlate_band<C, KW, 2>;
  run(sums, staged, g, count, s);
}

// Positions of one band and one block of channels, [position][step], read in place or through a buffer.
template <class C>
struct Strip {
  const C* data;
  int64_t step;
};
template <class C, class T>
PYFUSED_INLINE Strip<C> read_strip(C* buffer, int64_t pitch, const T* from, int64_t c_out, int64_t positions, bool nhwc,
                                   int64_t channels, int64_t count) {
  if (!nhwc) {
    planes_to_strip(buffer, pitch, from, positions, channels, count);
    return {buffer, pitch};
  }
  if constexpr (std::is_same_v<T, C>)
    if (channels % lanes<C> == 0) return {from, c_out};
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < channels; c += lanes<C>)
      store(buffer + p * pitch + c, read<C>(from + p * c_out + c, min<int64_t>(channels - c, lanes<C>)));
  return {buffer, pitch};
}

// g[position][NV vectors] for one band, and its sum over positions added to `bias`.
template <class C>
PYFUSED_INLINE void mask_strip(C* g, C* bias, Strip<C> grad, Strip<C> saved, int64_t count, int64_t width) {
  for (int64_t c = 0; c < width; c += lanes<C>) {
    Vec<C> total{};
    for (int64_t p = 0; p < count; ++p) {
      Vec<C> alive = load(saved.data + p * saved.step + c);
      Vec<C> v = alive <= Vec<C>{} ? Vec<C>{} : load(grad.data + p * grad.step + c);
      store(g + p * width + c, v);
      total += v;
    }
    store(bias + c, load(bias + c) + total);
  }
}
// The same from pooled gradients and codes: `rows` x `columns` windows of 2x2.
template <class C>
PYFUSED_INLINE void unpool_strip(C* g, C* bias, Strip<C> grad, Strip<C> code, int64_t rows, int64_t columns,
                                 int64_t width) {
  for (int64_t c = 0; c < width; c += lanes<C>) {
    Vec<C> total{};
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; ++x) {
        int64_t p = y * columns + x;
        Vec<C> v = load(grad.data + p * grad.step + c), place = load(code.data + p * code.step + c);
        C* corner = g + (4 * y * columns + 2 * x) * width + c;
        for (int k = 0; k < 4; ++k)
          store(corner + (k / 2 * 2 * columns + k % 2) * width, place == splat<C>(k) ? v : Vec<C>{});
        total += place == splat<C>(kDead) ? Vec<C>{} : v;
      }
    store(bias + c, load(bias + c) + total);
  }
}

// d_weight (any strides) and d_bias from the parts' sums: per block of channels [taps + 1][width], the last row the bias.
template <class T>
void finish(const View& d_weight, const View& d_bias, const compute_t<T>* sums, int64_t part_size, int64_t parts,
            const DirectSizes& s) {
  using C = compute_t<T>;
  constexpr int64_t block = 2 * lanes<C>;
  const int64_t* stride = d_weight.strides;
  for (int64_t o = 0; o < s.c_out; ++o) {
    int64_t first = o / block * block, width = s.c_out - first <= block / 2 ? block / 2 : block;
    for (int64_t tap = 0; tap <= s.taps(); ++tap) {
      const C* from = sums + first * (s.taps() + 1) + tap * width + o - first;
      C total = 0;
      for (int64_t part = 0; part < parts; ++part) total += from[part * part_size];
      int64_t c = tap / (s.kh * s.kw), i = tap / s.kw % s.kh, j = tap % s.kw;
      if (tap < s.taps())
        d_weight.as<T>()[o * stride[0] + c * stride[1] + i * stride[2] + j * stride[3]] = from_compute<T>(total);
      else if (d_bias)
        d_bias.as<T>()[o] = from_compute<T>(total);
    }
  }
}

template <class T>
void direct_backward(const View& d_weight, const View& d_bias, const View& grad, const View& saved, const View& input,
                     const DirectSizes& s, bool nhwc, int threads) {
  using C = compute_t<T>;
  constexpr int64_t L = lanes<C>, block = 2 * L;
  bool pooled = saved.dtype == DType::u8;
  int64_t fold = pooled ? 4 : 1, positions = grad.shape[2] * grad.shape[3];
  int64_t units = s.n * s.bands, parts = min(units, kParts);
  int64_t part_size = ceil_div(s.c_out, block) * block * (s.taps() + 1);
  int64_t staged_size = s.c_in * s.plane + L, strip_size = (ceil_div(s.band * s.columns, L) + 1) * L * block;
  int64_t per_thread = staged_size + 3 * strip_size;
  C* sums = static_cast<C*>(scratch(0, parts * part_size * sizeof(C)));
  C* buffers = static_cast<C*>(scratch(1, threads * per_thread * sizeof(C)));
  auto run_unit = [&](int64_t unit, C* part, C* staged) {
    C *g = staged + staged_size, *grad_buffer = g + strip_size, *saved_buffer = grad_buffer + strip_size;
    int64_t n = unit / s.bands, first = unit % s.bands * s.band, rows = min(s.band, s.rows - first);
    int64_t at = first * s.columns / fold, count = rows * s.columns / fold;  // this band's positions in its image
    stage_input<T>(staged, input, s, n, first, rows);
    for (int64_t o = 0; o < s.c_out; o += block) {
      int64_t channels = min(s.c_out - o, block), width = channels <= L ? L : block;
      int64_t offset = nhwc ? (n * positions + at) * s.c_out + o : (n * s.c_out + o) * positions + at;
      C *part_block = part + o * (s.taps() + 1), *bias = part_block + s.taps() * width;
      auto strip = [&](C* buffer, const auto* data) {
        return read_strip(buffer, block, data + offset, s.c_out, positions, nhwc, channels, count);
      };
      Strip<C> from = strip(grad_buffer, grad.as<T>());
      if (pooled)
        unpool_strip(g, bias, from, strip(saved_buffer, saved.as<uint8_t>()), rows / 2, s.columns / 2, width);
      else
        mask_strip(g, bias, from, strip(saved_buffer, saved.as<T>()), count, width);
      correlate_band(part_block, staged, g, rows, width == L, s);
    }
  };
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t p = begin; p < end; ++p) {
      std::memset(sums + p * part_size, 0, part_size * sizeof(C));
      for (int64_t unit = units * p / parts; unit < units * (p + 1) / parts; ++unit)
        run_unit(unit, sums + p * part_size, buffers + thread * per_thread);
    }
  });
  finish<T>(d_weight, d_bias, sums, part_size, parts, s);
}

}  // namespace

Status conv2d_direct_backward_weight(View d_weight, View d_bias, View grad, View saved, View input, int64_t stride_h,
                                     int64_t stride_w, int64_t pad_h, int64_t pad_w, int threads) {
  PYFUSED_REQUIRE(input.ndim == 4 && d_weight.ndim == 4 && d_weight.shape[1] == input.shape[1], "d_weight",
                  "must be (C_out, C_in, KH, KW) for the input's C_in");
  PYFUSED_REQUIRE(d_weight.shape[3] <= kMaxKernelWidth, "d_weight", "must be at most 7 wide");
  bool nhwc = is_nhwc(grad) && is_nhwc(saved), pooled = saved.dtype == DType::u8;
  PYFUSED_REQUIRE(same_shape(grad, saved) && (nhwc || (is_nchw(grad) && is_nchw(saved))), "saved",
                  "must have the shape and the layout of grad, contiguous or channels_last");
  PYFUSED_REQUIRE(grad.shape[0] == input.shape[0] && grad.shape[1] == d_weight.shape[0], "grad",
                  "must be (N, C_out, ...)");
  PYFUSED_REQUIRE(grad.dtype == input.dtype && d_weight.dtype == input.dtype &&
                      (pooled || saved.dtype == input.dtype) && (!d_bias || d_bias.dtype == input.dtype),
                  "d_weight", "all tensors must have the input's dtype, codes uint8");
  PYFUSED_REQUIRE(!d_bias || (d_bias.ndim == 1 && d_bias.shape[0] == d_weight.shape[0] && d_bias.contiguous()),
                  "d_bias", "must be (C_out,)");
  PYFUSED_REQUIRE(stride_h >= 1 && stride_w >= 1 && pad_h >= 0 && pad_w >= 0, "stride", "must be positive");
  int64_t fold = pooled ? 2 : 1, rows = fold * grad.shape[2], columns = fold * grad.shape[3];
  PYFUSED_REQUIRE(rows > 0 && columns > 0 && (rows - 1) * stride_h + d_weight.shape[2] <= input.shape[2] + 2 * pad_h &&
                      (columns - 1) * stride_w + d_weight.shape[3] <= input.shape[3] + 2 * pad_w,
                  "grad", "is not of the convolution's output");
  return for_low_precision(input.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t item = sizeof(compute_t<T>);
    DirectSizes s = direct_sizes(input, d_weight, rows, columns, stride_h, stride_w, pad_h, pad_w, fold, item,
                                 4 * lanes<compute_t<T>>, band_bytes(nhwc), 1);
    direct_backward<T>(d_weight, d_bias, grad, saved, input, s, nhwc, threads);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
