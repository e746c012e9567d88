// Direct convolution + bias + ReLU (+ 2x2 max-pooling) for few input channels, forward.
//
//   out[n, o, y, x] = max(0, bias[o] + ∑_{c, i, j} weight[o, c, i, j] · input[n, c, y·sh + i − ph, x·sw + j − pw])
//   pooled:  the maximum over 2x2 windows of that, and its place in the window as a one-byte code (255: it is 0)
//
// Tiles   channels of the output lie in the lanes: a register tile is R rows x Q columns x 2 vectors of channels, each
//         staged input element is broadcast once per tap and used for both. Pooling takes the maximum of a tile's four
//         corners in registers. A band of output rows of one image is the unit of work; its input is staged once, padded
//         and converted (conv2d_direct.h).
// Traffic reads the input (kh / band more often) and the packed weights (L1), writes the output once: NHWC directly, NCHW
//         through a strip of one band that is transposed in registers.
// Flops   2 · taps per output element; floor: the FMA rate.
// Edges   NaN: passes ReLU; the last NaN of a window is its maximum. Ties: the first. Any padding, stride_w 1 or 2.
#include "conv2d_direct.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// Columns of the register tile of NV vectors: up to 24 accumulators where there are 32 registers, 12 where there are 16.
#if defined(__AVX512F__)
constexpr int kPooledColumns = 6;
constexpr int plain_columns(int) { return 12; }
#else
constexpr int kPooledColumns = 2;
constexpr int plain_columns(int vectors) { return 12 / vectors; }
#endif

// Within L2. Every band stages kh - stride_h rows that the last one had too: a 7x7 filter of 64 channels takes 3% longer
// with 24 KiB in NHWC, 30% with 64 KiB in NCHW, which also wants long runs of positions in each plane.
constexpr int64_t band_bytes(bool nhwc) { return nhwc ? 64 << 10 : 256 << 10; }

// acc[r * Q + q][v] += one row of taps, for output rows r, `step` apart, and columns q from the input element `x` on. With
// KW known, its weights stay in registers and every element is broadcast once for all the taps that it meets.
template <class C, int KW, int SW, int R, int Q, int NV>
PYFUSED_INLINE void add_taps(Vec<C> (&acc)[R * Q][NV], const C* x, int64_t step, const C* weight, int64_t kw) {
  if constexpr (KW > 0) {
    Vec<C> w[KW][NV];
    for (int j = 0; j < KW; ++j)
      for (int v = 0; v < NV; ++v) w[j][v] = load(weight + (j * NV + v) * lanes<C>);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
      for (int e = 0; e < (Q - 1) * SW + KW; ++e) {
        Vec<C> value = splat<C>(x[r * step + e]);
#pragma GCC unroll 3
        for (int j = 0; j < KW; ++j)
          if (int q = (e - j) / SW; e >= j && (e - j) % SW == 0 && q < Q)
            for (int v = 0; v < NV; ++v) acc[r * Q + q][v] += value * w[j][v];
      }
  } else {
    for (int64_t j = 0; j < kw; ++j, ++x, weight += NV * lanes<C>) {
      const C* element = x;
      // Hides that the next tap reads the same elements one column on: GCC would carry them over in registers that the
      // accumulators need, and a broadcast from memory is free beside two FMAs.
      asm("" : "+r"(element));
      Vec<C> w[NV];
      for (int v = 0; v < NV; ++v) w[v] = load(weight + v * lanes<C>);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
        for (int q = 0; q < Q; ++q) {
          Vec<C> value = splat<C>(element[r * step + q * SW]);
          for (int v = 0; v < NV; ++v) acc[r * Q + q][v] += value * w[v];
        }
    }
  }
}

// acc[r * Q + q][v] = bias + ∑ taps, for output rows r and columns q from the staged element `x` on.
template <class C, int KW, int SW, int R, int Q, int NV>
PYFUSED_INLINE void accumulate(Vec<C> (&acc)[R * Q][NV], const C* x, const C* weight, const C* bias,
                               const DirectSizes& s) {
  for (int v = 0; v < NV; ++v)
    for (int p = 0; p < R * Q; ++p) acc[p][v] = load(bias + v * lanes<C>);
  int64_t kw = KW ? KW : s.kw, step = s.stride_h * s.pitch, next_plane = s.plane - s.kh * s.pitch;
  for (int64_t c = s.c_in; c > 0; --c, x += next_plane)
    for (int64_t i = s.kh; i > 0; --i, x += s.pitch, weight += kw * NV * lanes<C>)
      add_taps<C, KW, SW, R, Q, NV>(acc, x, step, weight, kw);
}

// Where a block of channels of a band goes: vectors over channels, position by position. B = uint8_t: codes go straight
// to an NHWC tensor; B = C: to a strip, as numbers. No code: no pooling.
template <class C, class B>
struct Target {
  C* out;
  B* code;
  int64_t step;  // elements from one position to the next
};

// One row of a band, columns [from, from + Q·k): whole tiles of Q columns, as many as fit; returns the next column.
template <class C, int KW, int SW, int Q, int NV, class B>
PYFUSED_INLINE int64_t plain_tiles(int64_t column, const C* row, const C* weight, const C* bias, Target<C, B> to,
                                   int64_t channels, const DirectSizes& s) {
  for (; column + Q <= s.columns; column += Q) {
    Vec<C> acc[Q][NV];
    accumulate<C, KW, SW, 1, Q, NV>(acc, row + column * SW, weight, bias, s);
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < NV; ++v)
        write<C>(to.out + (column + q) * to.step + v * lanes<C>, relu<C>(acc[q][v]),
                 min<int64_t>(channels - v * lanes<C>, lanes<C>));
  }
  return column;
}

// The same for two rows and pooled columns: tiles of 2 x 2Q conv outputs, Q windows.
template <class C, int KW, int SW, int Q, int NV, class B>
PYFUSED_INLINE int64_t pooled_tiles(int64_t column, const C* row, const C* weight, const C* bias, Target<C, B> to,
                                    int64_t channels, const DirectSizes& s) {
  for (; column + Q <= s.columns / 2; column += Q) {
    Vec<C> acc[4 * Q][NV];
    accumulate<C, KW, SW, 2, 2 * Q, NV>(acc, row + 2 * column * SW, weight, bias, s);
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < NV; ++v) {
        Vec<C> best = acc[2 * q][v], place{};
        for (int k = 1; k < 4; ++k) {
          Vec<C> value = acc[k / 2 * 2 * Q + 2 * q + k % 2][v];
          auto better = (value > best) | (value != value);
          best = better ? value : best;
          place = better ? splat<C>(k) : place;
        }
        place = best <= Vec<C>{} ? splat<C>(kDead) : place;
        int64_t n = min<int64_t>(channels - v * lanes<C>, lanes<C>);
        write<C>(to.out + (column + q) * to.step + v * lanes<C>, relu<C>(best), n);
        write<C>(to.code + (column + q) * to.step + v * lanes<C>, place, n);
      }
  }
  return column;
}

template <class C, int KW, int SW, int NV, class B>
void direct_band(const C* staged, const C* weight, Target<C, B> to, int64_t rows, int64_t channels,
                 const DirectSizes& sizes) {
  DirectSizes s = sizes;  // a local copy cannot alias the stores, so it stays in registers
  const C* bias = weight + s.taps() * NV * lanes<C>;
  for (int64_t r = 0; r < rows; r += to.code ? 2 : 1) {
    const C* row = staged + r * s.stride_h * s.pitch;
    if (to.code) {
      int64_t column = pooled_tiles<C, KW, SW, kPooledColumns / 2, NV>(0, row, weight, bias, to, channels, s);
      if constexpr (kPooledColumns > 2) pooled_tiles<C, KW, SW, 1, NV>(column, row, weight, bias, to, channels, s);
      to.out += s.columns / 2 * to.step;
      to.code += s.columns / 2 * to.step;
    } else {
      int64_t column = plain_tiles<C, KW, SW, plain_columns(NV), NV>(0, row, weight, bias, to, channels, s);
      column = plain_tiles<C, KW, SW, 8 / NV, NV>(column, row, weight, bias, to, channels, s);
      column = plain_tiles<C, KW, SW, 4 / NV, NV>(column, row, weight, bias, to, channels, s);
      plain_tiles<C, KW, SW, 1, NV>(column, row, weight, bias, to, channels, s);
      to.out += s.columns * to.step;
    }
  }
}

template <class C, class B>
void direct_band(const C* staged, const C* weight, Target<C, B> to, int64_t rows, int64_t channels,
                 const DirectSizes& s) {
  bool narrow = channels <= lanes<C>;
  auto run = s.kw == 3 && s.stride_w == 1 ? (narrow ? direct_band<C, 3, 1, 1, B> : direct_band<C, 3, 1, 2, B>)
             : s.stride_w == 1            ? (narrow ? direct_band<C, 0, 1, 1, B> : direct_band<C, 0, 1, 2, B>)
                                          : (narrow ? direct_band<C, 0, 2, 1, B> : direct_band<C, 0, 2, 2, B>);
  run(staged, weight, to, rows, channels, s);
}

// Blocks of 2 vectors of output channels, the last one of 1 where that is enough; each packed as [taps][channels], then
// its bias. Padded channels are 0.
template <class T>
PYFUSED_INLINE void pack_weights(compute_t<T>* packed, const View& weight, const View& bias, const DirectSizes& s) {
  constexpr int block = 2 * lanes<compute_t<T>>;
  const int64_t* stride = weight.strides;
  for (int64_t first = 0; first < s.c_out; first += block, packed += (s.taps() + 1) * block) {
    int64_t width = s.c_out - first <= block / 2 ? block / 2 : block, channels = min<int64_t>(s.c_out - first, width);
    compute_t<T>* to = packed;
    for (int64_t c = 0; c < s.c_in; ++c)
      for (int64_t i = 0; i < s.kh; ++i)
        for (int64_t j = 0; j < s.kw; ++j, to += width)
          for (int64_t o = 0; o < width; ++o)
            to[o] = o < channels
                        ? to_compute(
                              weight.as<T>()[(first + o) * stride[0] + c * stride[1] + i * stride[2] + j * stride[3]])
                        : compute_t<T>(0);
    for (int64_t o = 0; o < width; ++o)
      to[o] = bias && o < channels ? to_compute(bias.as<T>()[(first + o) * bias.strides[0]]) : compute_t<T>(0);
  }
}

// From the strips of one band to its place in the tensors, NHWC.
template <class C, class T>
PYFUSED_INLINE void strip_to_rows(T* out, int64_t c_out, const C* strip, int64_t pitch, int64_t channels,
                                  int64_t count) {
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < channels; c += lanes<C>)
      write<C>(out + p * c_out + c, load(strip + p * pitch + c), min<int64_t>(channels - c, lanes<C>));
}

template <class T>
void direct_forward(const View& out, const View& code, const View& input, const View& weight, const View& bias,
                    const DirectSizes& s, bool nhwc, int threads) {
  using C = compute_t<T>;
  constexpr int64_t L = lanes<C>, block = 2 * L;
  int64_t fold = code ? 4 : 1;  // conv positions per output position
  int64_t positions = out.shape[2] * out.shape[3];
  int64_t staged_size = s.c_in * s.plane + L, strip_size = (ceil_div(s.band * s.columns, L) + 1) * L * block;
  int64_t per_thread = staged_size + 2 * strip_size;
  C* packed = static_cast<C*>(scratch(0, ceil_div(s.c_out, block) * (s.taps() + 1) * block * sizeof(C)));
  C* buffers = static_cast<C*>(scratch(1, threads * per_thread * sizeof(C)));
  pack_weights<T>(packed, weight, bias, s);
  parallel_for(s.n * s.bands, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    C *staged = buffers + thread * per_thread, *strip = staged + staged_size, *code_strip = strip + strip_size;
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t n = unit / s.bands, first = unit % s.bands * s.band, rows = min(s.band, s.rows - first);
      int64_t at = first * s.columns / fold, count = rows * s.columns / fold;  // this band's positions in its image
      stage_input<T>(staged, input, s, n, first, rows);
      for (int64_t o = 0; o < s.c_out; o += block) {
        const C* w = packed + o * (s.taps() + 1);
        int64_t channels = min(s.c_out - o, block), pitch = nhwc ? s.c_out : positions;
        int64_t offset = nhwc ? (n * positions + at) * s.c_out + o : (n * s.c_out + o) * positions + at;
        T* to = out.as<T>() + offset;
        uint8_t* to_code = code ? code.as<uint8_t>() + offset : nullptr;
        if constexpr (std::is_same_v<T, C>)
          if (nhwc) {
            direct_band<C, uint8_t>(staged, w, {to, to_code, s.c_out}, rows, channels, s);
            continue;
          }
        direct_band<C, C>(staged, w, {strip, code ? code_strip : nullptr, block}, rows, channels, s);
        auto place = [&](auto* target, const C* from) {
          nhwc ? strip_to_rows(target, pitch, from, block, channels, count)
               : strip_to_planes(target, pitch, from, block, channels, count);
        };
        place(to, strip);
        if (code) place(to_code, code_strip);
      }
    }
  });
}

}  // namespace

Status conv2d_direct(View out, View code, View input, View weight, View bias, int64_t stride_h, int64_t stride_w,
                     int64_t pad_h, int64_t pad_w, int threads) {
  PYFUSED_REQUIRE(input.ndim == 4 && weight.ndim == 4 && weight.shape[1] == input.shape[1], "weight",
                  "must be (C_out, C_in, KH, KW) for the input's C_in");
  bool nhwc = is_nhwc(out);
  PYFUSED_REQUIRE(nhwc || is_nchw(out), "out", "must be dense, contiguous or channels_last");
  PYFUSED_REQUIRE(out.shape[0] == input.shape[0] && out.shape[1] == weight.shape[0], "out", "must be (N, C_out, ...)");
  PYFUSED_REQUIRE(!code || (code.dtype == DType::u8 && same_shape(code, out) && (nhwc ? is_nhwc(code) : is_nchw(code))),
                  "code", "must be uint8 with the shape and layout of out");
  PYFUSED_REQUIRE(out.dtype == input.dtype && weight.dtype == input.dtype && (!bias || bias.dtype == input.dtype),
                  "weight", "all tensors must have the input's dtype");
  PYFUSED_REQUIRE(!bias || (bias.ndim == 1 && bias.shape[0] == weight.shape[0]), "bias", "must be (C_out,)");
  PYFUSED_REQUIRE(stride_h >= 1 && (stride_w == 1 || stride_w == 2), "stride", "must be 1 or 2 along W");
  PYFUSED_REQUIRE(pad_h >= 0 && pad_w >= 0, "padding", "must not be negative");
  int64_t fold = code ? 2 : 1, rows = fold * out.shape[2], columns = fold * out.shape[3];
  PYFUSED_REQUIRE((rows - 1) * stride_h + weight.shape[2] <= input.shape[2] + 2 * pad_h &&
                      (columns - 1) * stride_w + weight.shape[3] <= input.shape[3] + 2 * pad_w,
                  "out", "is larger than the convolution's output");
  if (out.numel() == 0) return {};
  return for_low_precision(input.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t item = sizeof(compute_t<T>);
    bool strip = !nhwc || !std::is_same_v<T, compute_t<T>>;
    DirectSizes s =
        direct_sizes(input, weight, rows, columns, stride_h, stride_w, pad_h, pad_w, fold, item,
                     strip ? 2 * lanes<compute_t<T>> : 0, band_bytes(nhwc), ceil_div(2 * threads, input.shape[0]));
    direct_forward<T>(out, code, input, weight, bias, s, nhwc, threads);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
