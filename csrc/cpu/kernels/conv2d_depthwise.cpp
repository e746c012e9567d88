// Depthwise convolution (as many groups as channels) + bias + ReLU in channels_last, forward; float32.
//
//   out[n, y, x, c] = max(0, bias[c] + ∑_{i, j} weight[c, i, j] · input[n, y·s + i − p, x·s + j − p, c])
//
// Tiles   channels lie in the lanes. A tile is kColumns results of a row for one vector of channels, in registers; vectors
//         follow one another fastest, so memory is read in order.
// Traffic reads input and writes out once. Flops 2 · kh · kw a value: for 3x3 memory is the floor.
// Edges   what lies outside the map is read from a row of zeros, so there an infinite weight gives NaN. Any padding, kernels
//         up to 16 high and 3, 5 or 7 wide, stride 1 or 2 (each way the same), at least one vector of channels. The last
//         vector of channels overlaps the one before and computes the same again.
#include "conv2d_depthwise.h"

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// packed[kh][kw][C] of the weight [C, 1, kh, kw].
void pack(float* packed, const View& weight, const Sizes& s) {
  for (int64_t i = 0; i < s.kh; ++i)
    for (int64_t j = 0; j < s.kw; ++j)
      for (int64_t c = 0; c < s.channels; ++c)
        *packed++ = weight.as<float>()[c * weight.strides[0] + i * weight.strides[2] + j * weight.strides[3]];
}

template <int Taps, int S>
void forward(float* out, const float* input, const View& weight, const float* bias, const Sizes& s, int threads) {
  auto* packed = static_cast<float*>(scratch(0, sizeof(float) * (s.kh * s.kw + 1) * s.channels));
  float* zeros = packed + s.kh * s.kw * s.channels;
  std::memset(zeros, 0, sizeof(float) * s.channels);
  pack(packed, weight, s);
  int64_t grain = ceil_div(4096, s.out_row());
  parallel_for(s.n * s.out_height, grain, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t first;
      Rows rows = rows_under(input + row / s.out_height * s.height * s.row(), packed, row % s.out_height, s, &first);
      correlate_row<Taps, S>(out + row * s.out_row(), s.channels, s.out_width, rows, bias, 0, s.width, s.pad_w,
                             s.channels, zeros);
    }
  });
}

}  // namespace

// out [N, C, OH, OW] from input [N, C, H, W], both channels_last; weight [C, 1, kh, kw] of any strides, bias [C] or absent.
Status conv2d_depthwise(View out, View input, View weight, View bias, int64_t stride, int64_t pad_h, int64_t pad_w,
                        int threads) {
  Sizes s;
  if (Status bad = measure(&s, input, weight, out, bias, stride, pad_h, pad_w); bad.code != Status::ok) return bad;
  return for_sizes(s, [&](auto taps, auto step) {
    forward<taps.value, step.value>(out.as<float>(), input.as<float>(), weight, bias.as<float>(), s, threads);
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
