// 3x3 convolution, stride 1, by Winograd's F(4x4, 3x3) or F(3x3, 3x3), with bias and ReLU (and 2x2 max pool) in its epilogue; float32.
//
//   out = relu(input ⋆ weight + bias),  each tile  Y = Aᵀ [ ∑_c (G g_oc Gᵀ) ⊙ (Bᵀ d_c B) ] A   (conv2d_winograd.h)
//
// Layout  input, out, gradients: torch channels_last (NHWC memory). The weight is transformed first, once per weight:
//         U[K][⌈O/16⌉][C][16], K = 36 or 25, so U has K · C · round_up(O, 16) floats, the same on every instruction set.
// Tiles   a thread takes blocks of T tiles: patches to V[K][T][C]; then, for 64 output channels at a time, K products
//         V[k] · U[k] to M[K][T][64] and back to pixels. T is such that V takes half of an L2 cache or less. Where U is
//         larger than that, other schedules: conv2d_winograd_convolve.h.
// Flops   2.25 (2.8) multiply-adds per output, input channel and output channel instead of 9; the transforms take 15 to 30%
//         of the time at 64 channels. An incomplete tile costs as much as a whole one.
// Traffic reads input 2.25 times (mostly from cache) and U once per block, writes out once.
// Saves   nothing but out, which is the ReLU's mask; or, pooled, a code of one byte per value: 0..3 = row * 2 + column of
//         the maximum in its window (the first of equals; the last NaN), 255 = not positive, so no gradient.
// Error   for random data about 3e-5 · √(1 + C/64) of the root mean square of input ⋆ weight at most, 5 times a direct
//         sum's; the gradients' 3e-5. test_conv2d_winograd.py holds them to twice that. Bits depend on neither
//         threads nor batch. An inf or NaN in the input makes its whole tile NaN, not only the pixels that see it.
// Edges   padding 0..2; any N, H, W, C, O (channels past a whole vector go through a buffer); no work for the odd last
//         row and column, which no window of the pool covers.
#include "cpu/kernels/activation.h"
#include "cpu/kernels/conv2d_winograd_convolve.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// --- Sinks: what happens to the 36 sums of products of a tile, `count` channels from o.
// ReLU, or nothing. As a case of AddAndActivate it cost 4 to 7% more instructions altogether.
struct Floor {
  float least;  // 0: ReLU; −inf: none
  PYFUSED_INLINE V operator()(V value, int64_t, int64_t) const {
    V floor = splat(least);
    return floor > value ? floor : value;  // this way round a NaN stays
  }
};

// `Epilogue` makes an output from the convolution's with its bias, given the output's offset.
template <class Epilogue>
struct Dense {
  static constexpr bool kOverlaps = false;
  float* out;
  const float* bias;  // or nullptr
  Epilogue epilogue;
  int64_t height, width, channels;
  template <int T>
  PYFUSED_INLINE void finish(const V (&products)[kPoints<T>], const Tile& tile, int64_t o, int64_t count) const {
    V y[T * T];
    transform_products<T>(products, y);
    V shift = !bias ? V{} : count >= lanes<float> ? load(bias + o) : load_first(bias + o, count);
    int64_t rows = min<int64_t>(T, height - tile.h), columns = min<int64_t>(T, width - tile.w);
    float* corner = out + ((tile.n * height + tile.h) * width + tile.w) * channels + o;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float* p = corner + (i * width + j) * channels;
        V value = epilogue(y[i * T + j] + shift, p - out, count);
        count >= lanes<float> ? store(p, value) : store_first(p, value, count);
      }
  }
};

struct Pooled {
  static constexpr bool kOverlaps = false;
  float* out;
  uint8_t* code;
  const float* bias;
  int64_t height, width, channels;  // of the pooled result
  template <int T>
  PYFUSED_INLINE void finish(const V (&products)[kPoints<T>], const Tile& tile, int64_t o, int64_t count) const {
    static_assert(T == 4, "windows of 2x2 must not cross tiles");
    V y[T * T];
    transform_products<T>(products, y);
    V shift = !bias ? V{} : count >= lanes<float> ? load(bias + o) : load_first(bias + o, count);
#pragma GCC unroll 4
    for (int window = 0; window < 4; ++window) {
      int64_t h = tile.h / 2 + window / 2, w = tile.w / 2 + window % 2;
      if (h >= height || w >= width) continue;
      const V* corner = y + window / 2 * 2 * T + window % 2 * 2;
      V best = corner[0] + shift;
      VecI32 where{};
#pragma GCC unroll 3
      for (int at = 1; at < 4; ++at) {
        V value = corner[at / 2 * T + at % 2] + shift;
        VecI32 better = (value > best) | (value != value);  // torch's rule
        best = better ? value : best;
        where = better ? VecI32{} + at : where;
      }
      V zero{};
      Bytes bytes = __builtin_convertvector(best <= zero ? VecI32{} + kDead : where, Bytes);
      best = zero > best ? zero : best;
      int64_t p = ((tile.n * height + h) * width + w) * channels + o;
      count >= lanes<float> ? store(out + p, best) : store_first(out + p, best, count);
      std::memcpy(code + p, &bytes, min<int64_t>(count, lanes<float>));
    }
  }
};

}  // namespace

// U for a tile from weight [O, C, 3, 3] of any strides: (tile + 2)² * (C * round_up(O, 16) + 16) floats.
Status conv2d_winograd_transform_weight(View transformed, View weight, int tile, int threads) {
  PYFUSED_REQUIRE(weight.ndim == 4 && weight.dtype == DType::f32 && weight.shape[2] == 3 && weight.shape[3] == 3,
                  "weight", "must be float32 [O, C, 3, 3]");
  int64_t panels = ceil_div(weight.shape[0], kPanel);
  PYFUSED_REQUIRE(transformed.dtype == DType::f32 && transformed.contiguous() &&
                      transformed.numel() == (tile + 2) * (tile + 2) * point_stride(panels, weight.shape[1]),
                  "transformed", "must be (tile + 2)² * (C * round_up(O, 16) + 16) contiguous float32");
  return with_tile(tile, [&](auto tag) {
    transform_weight<tag.value>({weight, false}, 0, panels, 0, weight.shape[1], transformed.as<float>(), threads);
    return Status{};
  });
}

namespace {

template <class Epilogue>
Status forward(View out, View input, View weight, View bias, const Epilogue& epilogue, int pad_h, int pad_w, int tile,
               int threads) {
  PYFUSED_REQUIRE(channels_last(input, DType::f32), "input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(out, DType::f32), "out", "must be channels_last float32");
  int64_t n = input.shape[0], outputs = out.shape[1];
  int64_t height = input.shape[2] + 2 * pad_h - 2, width = input.shape[3] + 2 * pad_w - 2;
  if (Status status = check({weight, false}, tile, input.shape[1], outputs, pad_h, pad_w); status.code) return status;
  PYFUSED_REQUIRE(has_shape(out, n, outputs, height, width), "out", "must be [N, O, H + 2 pad - 2, W + 2 pad - 2]");
  PYFUSED_REQUIRE(is_channel_vector(bias, outputs), "bias", "must be O contiguous float32");
  Plain source{input.as<float>(), input.shape[2], input.shape[3], input.shape[1]};
  Dense<Epilogue> sink{out.as<float>(), bias.as<float>(), epilogue, height, width, outputs};
  return with_tile(tile, [&](auto tag) {
    Grid grid(n, height, width, tag.value);
    convolve<tag.value, kPatch<tag.value>>(source, sink, grid, {weight, false}, pad_h, pad_w, threads);
    return Status{};
  });
}

}  // namespace

// out [N, O, OH, OW] = input ⋆ weight + bias, through the ReLU if `relu`.
Status conv2d_winograd(View out, View input, View weight, View bias, int pad_h, int pad_w, bool relu, int tile,
                       int threads) {
  return forward(out, input, weight, bias, Floor{relu ? 0.f : -__builtin_inff()}, pad_h, pad_w, tile, threads);
}

// out [N, O, OH, OW] = act(input ⋆ weight + bias + residual); the residual has the shape and layout of out. Activations
// are those of activation.h.
Status conv2d_winograd_act(View out, View input, View weight, View bias, View residual, int pad_h, int pad_w,
                           int activation, double slope, int tile, int threads) {
  PYFUSED_REQUIRE(!residual || (channels_last(residual, DType::f32) && out.ndim == 4 &&
                                has_shape(residual, out.shape[0], out.shape[1], out.shape[2], out.shape[3])),
                  "residual", "must be like out");
  PYFUSED_REQUIRE(activation >= 0 && activation < kActivations, "activation", "is unknown");
  AddAndActivate epilogue{residual.as<float>(), activation, static_cast<float>(slope)};
  return forward(out, input, weight, bias, epilogue, pad_h, pad_w, tile, threads);
}

// out [N, O, PH, PW] = max_pool2d(relu(input ⋆ weight + bias), 2), and its code (uint8, same shape).
Status conv2d_winograd_pool(View out, View code, View input, View weight, View bias, int pad_h, int pad_w,
                            int threads) {
  PYFUSED_REQUIRE(channels_last(input, DType::f32), "input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(out, DType::f32), "out", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(code, DType::u8), "code", "must be channels_last uint8");
  int64_t n = input.shape[0], outputs = out.shape[1];
  int64_t height = (input.shape[2] + 2 * pad_h - 2) / 2, width = (input.shape[3] + 2 * pad_w - 2) / 2;
  if (Status status = check({weight, false}, 4, input.shape[1], outputs, pad_h, pad_w); status.code) return status;
  PYFUSED_REQUIRE(has_shape(out, n, outputs, height, width), "out", "must be [N, O, (H + 2 pad - 2) / 2, ...]");
  PYFUSED_REQUIRE(has_shape(code, n, outputs, height, width), "code", "must have the shape of out");
  PYFUSED_REQUIRE(is_channel_vector(bias, outputs), "bias", "must be O contiguous float32");
  Plain source{input.as<float>(), input.shape[2], input.shape[3], input.shape[1]};
  Pooled sink{out.as<float>(), code.as<uint8_t>(), bias.as<float>(), height, width, outputs};
  convolve<4, 6>(source, sink, Grid(n, 2 * height, 2 * width, 4), {weight, false}, pad_h, pad_w, threads);
  return {};
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
