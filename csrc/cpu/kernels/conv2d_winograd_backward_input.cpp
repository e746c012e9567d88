// Gradient of the input of a 3x3 convolution, stride 1, + ReLU (+ 2x2 max pool), by Winograd's F(4x4, 3x3) or F(3x3, 3x3)
// transposed; float32.
//
//   g = the gradient before ReLU (and pool);   dx_c = ∑_tiles B [ ∑_o (G w_oc Gᵀ) ⊙ (A g_o Aᵀ) ] Bᵀ
//
// A convolution with rotated filters would do too, but it has tiles of dx instead of g: 4 times as many at 5x5 -> 3x3.
// Layout, flops, error and edges are the forward's (conv2d_winograd.cpp), with O and C exchanged. ReLU's mask or the pool's
// code is applied while tiles of g are read; the patches that come out overlap by two rows and columns and add up.
#include "cpu/kernels/conv2d_winograd_convolve.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// The data gradient: patches, two rows and columns of which are a neighbour's too, are added up.
struct Overlapping {
  static constexpr bool kOverlaps = true;
  float* out;
  int pad_h, pad_w;
  int64_t height, width, channels;
  PYFUSED_INLINE void clear(int64_t first, int64_t last, int64_t begin, int64_t end) const {  // images, channels
    int64_t pixels = height * width, run = end - begin == channels ? pixels : 1;
    for (int64_t p = first * pixels; p < last * pixels; p += run)
      std::memset(out + p * channels + begin, 0, sizeof(float) * run * (end - begin));
  }
  template <int T>
  PYFUSED_INLINE void finish(const V (&products)[kPoints<T>], const Tile& tile, int64_t c, int64_t count) const {
    constexpr int P = kPatch<T>;
    V patch[kPoints<T>];
    transform_products_to_patch<T>(products, patch);
    int64_t h = tile.h - pad_h, w = tile.w - pad_w;
    int64_t bottom = min<int64_t>(P, height - h), right = min<int64_t>(P, width - w);
    for (int64_t i = max<int64_t>(0, -h); i < bottom; ++i)
      for (int64_t j = max<int64_t>(0, -w); j < right; ++j) {
        float* p = out + ((tile.n * height + h + i) * width + w + j) * channels + c;
        if (count >= lanes<float>)
          store(p, load(p) + patch[i * P + j]);
        else
          store_first(p, load_first(p, count) + patch[i * P + j], count);
      }
  }
};

}  // namespace

// grad_input [N, C, H, W] from grad (dL/dout); `saved` is the forward's output (float32), its code (uint8) where it
// pooled, or absent where grad is the convolution's own.
Status conv2d_winograd_backward_input(View grad_input, View grad, View saved, View weight, int pad_h, int pad_w,
                                      int tile, int threads) {
  bool pooled = saved.dtype == DType::u8;
  PYFUSED_REQUIRE(channels_last(grad_input, DType::f32), "grad_input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(grad, DType::f32), "grad", "must be channels_last float32");
  PYFUSED_REQUIRE(!saved || channels_last(saved, pooled ? DType::u8 : DType::f32), "saved", "must be channels_last");
  int64_t n = grad_input.shape[0], inputs = grad_input.shape[1], outputs = grad.shape[1], factor = pooled ? 2 : 1;
  int64_t height = grad_input.shape[2], width = grad_input.shape[3];
  int64_t grad_height = (height + 2 * pad_h - 2) / factor, grad_width = (width + 2 * pad_w - 2) / factor;
  if (Status status = check({weight, true}, tile, outputs, inputs, pad_h, pad_w); status.code) return status;
  PYFUSED_REQUIRE(has_shape(grad, n, outputs, grad_height, grad_width), "grad", "must have the shape of out");
  PYFUSED_REQUIRE(!saved || has_shape(saved, n, outputs, grad_height, grad_width), "saved",
                  "must have the shape of out");
  Overlapping sink{grad_input.as<float>(), pad_h, pad_w, height, width, inputs};
  return with_tile(tile, [&](auto tag) {
    Grid grid(n, factor * grad_height, factor * grad_width, tag.value);
    if (!grid.count) {  // no pixel reaches the output
      std::memset(grad_input.data, 0, sizeof(float) * grad_input.numel());
      return Status{};
    }
    auto convolve_from = [&](const auto& source) {
      convolve<tag.value, tag.value>(source, sink, grid, {weight, true}, 0, 0, threads);
      return Status{};
    };
    const float* g = grad.as<float>();
    if (pooled) return convolve_from(Unpooled{g, saved.as<uint8_t>(), grid.height, grid.width, outputs});
    if (!saved) return convolve_from(Plain{g, grid.height, grid.width, outputs});
    return convolve_from(Masked{g, saved.as<float>(), grid.height, grid.width, outputs});
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
