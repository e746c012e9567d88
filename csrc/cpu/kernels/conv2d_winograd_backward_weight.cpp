// Gradients of weight and bias of a 3x3 convolution, stride 1, + ReLU (+ 2x2 max pool), by Winograd's F(3x3, 4x4)
// or F(3x3, 3x3); float32.
//
//   g = the gradient before ReLU (and pool);   dw_oc = Gᵀ [ ∑_tiles (A g_o Aᵀ) ⊙ (Bᵀ d_c B) ] G;   db_o = ∑ g_o
//
// Layout  grad, saved, input: torch channels_last. grad_weight [O, C, 3, 3]: any strides.
// Tiles   the tiles of g, some at a time: their transforms go to Z[K][T][O] and V[K][T][C], and the K = 36 or 25 products
//         Z[k]ᵀ · V[k] are added to D[K][O][C]. Three schedules: while D is small every thread has Z, V and D to itself
//         (correlate_apart); otherwise threads share the tiles, then the products (correlate), or, on small maps, D is
//         never whole (correlate_blocks). How a sum is split depends on the shape alone, so bits do not depend on threads.
//         db costs nothing more: the point (1, 1) of A g Aᵀ is the sum of a tile.
// Flops   2.25 (2.8) multiply-adds per element of g, output channel and input channel instead of 9, plus the transforms.
// Traffic reads grad and saved once and input 2.25 times; Z, V and D pass through the L2 or L3 cache once per T tiles.
//         Working memory 4 · K · (T · (O + C) + O · C) bytes, apart: that of Z and V per thread, of D per slice.
// Error   for random data about 2e-5 of the root mean square of dw at most: a sum goes by T tiles, then over those.
// Edges   padding 0..2; any N, H, W, C, O; no tiles at all give zeros; what no pool window covers has no gradient.
#include "cpu/kernels/conv2d_winograd.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kTiles = 64;
constexpr int64_t kOutputs = 8 * kRows;
constexpr int64_t kApartTiles = 16, kApartBytes = 1 << 20;  // of D

struct Rows {  // of Z or V, one for each tile
  const float* data;
  int64_t stride;
};

// What add_products fetches meanwhile, where it lies farther than the L2 cache; elsewhere that costs 5% instead.
enum class Fetch { nothing, rows_of_d, next_point };

// D[o][c] (+)= ∑_t Z[t][o] V[t][c] for one point, all o and `vectors` <= kVectors vectors of c. Of the next point's Z and V
// it fetches a line of every row with each block of outputs.
template <bool Add, Fetch fetch>
void add_products(Rows z, Rows v, int64_t tiles, int64_t outputs, int vectors, float* d, int64_t d_row, Rows next_z,
                  Rows next_v) {
  with_constant<kVectors>(vectors, [&](auto width) {
    int64_t o = 0;
    for (; o + kRows <= outputs; o += kRows) {
      if constexpr (fetch == Fetch::rows_of_d) {
        const float* next = d + min(o + kRows, outputs - kRows) * d_row;
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
          for (int h = 0; h < width.value; ++h) __builtin_prefetch(next + r * d_row + h * lanes<float>, 1);
      }
      if constexpr (fetch == Fetch::next_point) {
        int64_t vector = o / kRows;  // first those of V, then those of Z
        Rows ahead = vector < width.value ? next_v : next_z;
        if (vector >= width.value) vector -= width.value;
        if (ahead.data && vector * lanes<float> < outputs) {
          multiply<kRows, width.value, Add, 2>(z.data + o, 1, z.stride, v.data, lanes<float>, v.stride, tiles,
                                               d + o * d_row, d_row, ahead.data + vector * lanes<float>,
                                               sizeof(float) * ahead.stride);
          continue;
        }
      }
      multiply<kRows, width.value, Add>(z.data + o, 1, z.stride, v.data, lanes<float>, v.stride, tiles, d + o * d_row,
                                        d_row);
    }
    with_constant<kRows - 1>(static_cast<int>(outputs - o), [&](auto rows) {
      multiply<rows.value, width.value, Add>(z.data + o, 1, z.stride, v.data, lanes<float>, v.stride, tiles,
                                             d + o * d_row, d_row);
    });
  });
}

// bias[o] += ∑_t Z[t][o] of the point (1, 1), a tile's sum. `outputs` is rounded up to whole vectors.
template <int T>
void add_bias(float* bias, const float* z, int64_t z_row, int64_t z_point, int64_t tiles, int64_t outputs) {
  const float* sums = z + (kPatch<T> + 1) * z_point;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t o = 0; o < outputs; o += lanes<float>) store(bias + o, load(bias + o) + load(sums + t * z_row + o));
}

// w's first `count` lanes to the filters of output o and the channels from c on.
PYFUSED_INLINE void store_filters(const V (&w)[9], int64_t count, const View& out, int64_t o, int64_t c) {
  float* to = out.as<float>() + o * out.strides[0] + c * out.strides[1];
  int64_t place[9];
  for (int tap = 0; tap < 9; ++tap) place[tap] = tap / 3 * out.strides[2] + tap % 3 * out.strides[3];
  if (count == lanes<float> && out.strides[1] == 1) {
    for (int tap = 0; tap < 9; ++tap) store(to + place[tap], w[tap]);
    return;
  }
  float taps[9][lanes<float>];
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) store(taps[tap], w[tap]);
  for (int64_t i = 0; i < count; ++i)
    for (int tap = 0; tap < 9; ++tap) to[i * out.strides[1] + place[tap]] = taps[tap][i];
}

// grad_weight = Gᵀ (∑_slices D) G for `rows` outputs from `first` on and channels [c_begin, c_end), where `d` starts.
template <int T>
void transform_back(const float* d, int64_t d_row, int64_t d_point, int64_t slices, int64_t d_slice, int64_t first,
                    int64_t rows, int64_t c_begin, int64_t c_end, const View& out) {
  for (int64_t o = first; o < first + rows; ++o, d += d_row)
    for (int64_t c = c_begin; c < c_end; c += lanes<float>) {
      V u[kPoints<T>], w[9];
#pragma GCC unroll 36
      for (int k = 0; k < kPoints<T>; ++k) u[k] = load(d + k * d_point + c - c_begin);
      for (int64_t slice = 1; slice < slices; ++slice)
#pragma GCC unroll 36
        for (int k = 0; k < kPoints<T>; ++k) u[k] += load(d + slice * d_slice + k * d_point + c - c_begin);
      transform_filter_back<T>(u, w);
      store_filters(w, min<int64_t>(lanes<float>, c_end - c), out, o, c);
    }
}

// Where D is small. Each thread by itself, on a slice of the tiles and a group of outputs, kApartTiles at a time: its Z, V
// and D stay in its cache, and V is made once for every group. Slices depend on the shape alone, so bits do not depend on
// threads. 64 tiles at a time are as fast by themselves, but in MNIST's training step, where every kernel finds its cache
// full of other things, they cost 4% of the step.
template <int T, class Source>
void correlate_apart(const View& grad_weight, float* grad_bias, const Source& gradient, const Plain& input,
                     const Grid& grid, int pad_h, int pad_w, int threads) {
  int64_t outputs = gradient.channels, channels = input.channels, vectors = ceil_div(outputs, lanes<float>);
  int64_t slices = grid.count < 4 * kApartTiles ? 1 : grid.count < 128 * kApartTiles ? 2 : 8;
  int64_t groups = min(vectors, ceil_div(int64_t{threads}, slices)), tiles = ceil_div(grid.count, slices);
  if (tiles > 2 * kApartTiles) tiles = kApartTiles;
  int64_t d_row = round_up(channels, lanes<float>), v_row = d_row + kSkew;
  int64_t z_row = ceil_div(vectors, groups) * lanes<float> + kSkew, b_row = vectors * lanes<float>;
  int64_t z_point = tiles * z_row + kSkew, v_point = tiles * v_row + kSkew, d_point = outputs * d_row + kSkew;
  int64_t d_slice = kPoints<T> * d_point, width = kVectors * lanes<float>;
  auto* memory = static_cast<float*>(scratch(0, sizeof(float) * threads * kPoints<T> * (z_point + v_point)));
  auto* all_d = static_cast<float*>(scratch(1, sizeof(float) * slices * (d_slice + b_row)));
  float* all_bias = all_d + slices * d_slice;
  parallel_for(slices * groups, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    float *z = memory + thread * kPoints<T> * (z_point + v_point), *v = z + kPoints<T> * z_point;
    for (int64_t item = begin; item < end; ++item) {
      int64_t slice = item / groups, group = item % groups;
      int64_t o_begin = vectors * group / groups * lanes<float>;
      int64_t o_end = min(outputs, vectors * (group + 1) / groups * lanes<float>);
      int64_t first = grid.count * slice / slices, last = grid.count * (slice + 1) / slices;
      float *d = all_d + slice * d_slice + o_begin * d_row, *bias = all_bias + slice * b_row + o_begin;
      std::memset(bias, 0, sizeof(float) * round_up(o_end - o_begin, lanes<float>));
      for (int64_t tile = first; tile < last; tile += tiles) {
        int64_t count = min(tiles, last - tile);
        transform_tiles<T, T>(gradient, grid, tile, count, 0, 0, z, z_row, z_point, o_begin, o_end);
        transform_tiles<T, kPatch<T>>(input, grid, tile, count, pad_h, pad_w, v, v_row, v_point);
        auto* add = tile == first ? add_products<false, Fetch::nothing> : add_products<true, Fetch::nothing>;
        for (int64_t k = 0; k < kPoints<T>; ++k)
          for (int64_t c = 0; c < d_row; c += width)
            add({z + k * z_point, z_row}, {v + k * v_point + c, v_row}, count, o_end - o_begin,
                static_cast<int>(min(width, d_row - c) / lanes<float>), d + k * d_point + c, d_row, {}, {});
        add_bias<T>(bias, z, z_row, z_point, count, o_end - o_begin);
      }
    }
  });
  parallel_for(outputs, 4, threads, [&](int64_t begin, int64_t end, int) {
    transform_back<T>(all_d + begin * d_row, d_row, d_point, slices, d_slice, begin, end - begin, 0, channels,
                      grad_weight);
  });
  for (int64_t o = 0; grad_bias && o < outputs; ++o) {
    grad_bias[o] = all_bias[o];
    for (int64_t slice = 1; slice < slices; ++slice) grad_bias[o] += all_bias[slice * b_row + o];
  }
}

// The same bits where the map is small and D would outgrow the transforms of all tiles: those are kept, and D exists only
// for kOutputs outputs and kVectors vectors of channels at a time, in each thread's L2 cache.
template <int T, class Source>
void correlate_blocks(const View& grad_weight, float* grad_bias, const Source& gradient, const Plain& input,
                      const Grid& grid, int pad_h, int pad_w, int threads) {
  int64_t outputs = gradient.channels, channels = input.channels, width = kVectors * lanes<float>;
  int64_t z_row = round_up(outputs, lanes<float>) + kSkew, v_row = round_up(channels, lanes<float>) + kSkew;
  int64_t z_point = grid.count * z_row + kSkew, v_point = grid.count * v_row + kSkew;
  int64_t d_point = kOutputs * width + kSkew, groups = ceil_div(channels, width);
  auto* z = static_cast<float*>(scratch(0, sizeof(float) * kPoints<T> * (z_point + v_point)));
  auto* memory = static_cast<float*>(scratch(1, sizeof(float) * kPoints<T> * d_point * threads));
  float* v = z + kPoints<T> * z_point;
  parallel_for(grid.count, 4, threads, [&](int64_t begin, int64_t end, int) {
    transform_tiles<T, T>(gradient, grid, begin, end - begin, 0, 0, z + begin * z_row, z_row, z_point);
    transform_tiles<T, kPatch<T>>(input, grid, begin, end - begin, pad_h, pad_w, v + begin * v_row, v_row, v_point);
  });
  parallel_for(ceil_div(outputs, kOutputs) * groups, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    float* d = memory + thread * kPoints<T> * d_point;
    for (int64_t item = begin; item < end; ++item) {
      int64_t o = item / groups * kOutputs, rows = min(kOutputs, outputs - o), c = item % groups * width;
      int vectors = static_cast<int>(ceil_div(min(width, channels - c), lanes<float>));
      Rows z_rows{z + o, z_row}, v_rows{v + c, v_row};
      for (int64_t k = 0; k < kPoints<T>; ++k) {
        Rows next_z{z_rows.data + z_point, z_row}, next_v{v_rows.data + v_point, v_row};
        if (k + 1 == kPoints<T>) next_z = next_v = {};
        add_products<false, Fetch::next_point>(z_rows, v_rows, grid.count, rows, vectors, d + k * d_point, width,
                                               next_z, next_v);
        z_rows = next_z, v_rows = next_v;
      }
      transform_back<T>(d, width, d_point, 1, 0, o, rows, c, min(c + width, channels), grad_weight);
    }
  });
  const float* sums = z + (kPatch<T> + 1) * z_point;  // the point (1, 1)
  for (int64_t o = 0; grad_bias && o < outputs; ++o) {
    float total = 0;
    for (int64_t t = 0; t < grid.count; ++t) total += sums[t * z_row + o];
    grad_bias[o] = total;
  }
}

template <int T, class Source>
void correlate(const View& grad_weight, float* grad_bias, const Source& gradient, const Plain& input, int64_t images,
               int pad_h, int pad_w, int threads) {
  Grid grid(images, gradient.height, gradient.width, T);
  int64_t outputs = gradient.channels, channels = input.channels, tiles = min(kTiles, grid.count);
  if (grid.count && kPoints<T> * sizeof(float) * outputs * channels <= kApartBytes)
    return correlate_apart<T>(grad_weight, grad_bias, gradient, input, grid, pad_h, pad_w, threads);
  // With more tiles, added to D in several steps, this was slower: 1.4 instead of 1.6 times eager's speed at 8x256x14x14.
  if (grid.count && grid.count <= kTiles && grid.count * (outputs + channels) <= outputs * channels)
    return correlate_blocks<T>(grad_weight, grad_bias, gradient, input, grid, pad_h, pad_w, threads);
  // Rows of Z and V are skewed too: a product goes down a column of both.
  int64_t d_row = round_up(channels, lanes<float>), z_row = round_up(outputs, lanes<float>) + kSkew,
          v_row = d_row + kSkew;
  int64_t z_point = tiles * z_row + kSkew, v_point = tiles * v_row + kSkew, d_point = outputs * d_row + kSkew;
  auto* z = static_cast<float*>(scratch(0, sizeof(float) * (kPoints<T> * (z_point + v_point + d_point) + z_row)));
  float *v = z + kPoints<T> * z_point, *d = v + kPoints<T> * v_point, *bias = d + kPoints<T> * d_point;
  std::memset(bias, 0, sizeof(float) * z_row);
  if (!grid.count) std::memset(d, 0, sizeof(float) * kPoints<T> * d_point);
  int64_t width = kVectors * lanes<float>, groups = ceil_div(d_row, width);
  for (int64_t first = 0; first < grid.count; first += kTiles) {
    int64_t count = min(kTiles, grid.count - first);
    parallel_for(count, 4, threads, [&](int64_t begin, int64_t end, int) {
      transform_tiles<T, T>(gradient, grid, first + begin, end - begin, 0, 0, z + begin * z_row, z_row, z_point);
      transform_tiles<T, kPatch<T>>(input, grid, first + begin, end - begin, pad_h, pad_w, v + begin * v_row, v_row,
                                    v_point);
    });
    parallel_for(kPoints<T> * groups, 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t item = begin; item < end; ++item) {
        int64_t k = item / groups, c = item % groups * width;
        int vectors = static_cast<int>(min(width, d_row - c) / lanes<float>);
        // The first overwrites D: it is large, so no pass to clear it.
        auto* add = first == 0 ? add_products<false, Fetch::rows_of_d> : add_products<true, Fetch::rows_of_d>;
        add({z + k * z_point, z_row}, {v + k * v_point + c, v_row}, count, outputs, vectors, d + k * d_point + c, d_row,
            {}, {});
      }
    });
    add_bias<T>(bias, z, z_row, z_point, count, outputs);
  }
  parallel_for(outputs, 4, threads, [&](int64_t begin, int64_t end, int) {
    transform_back<T>(d + begin * d_row, d_row, d_point, 1, 0, begin, end - begin, 0, channels, grad_weight);
  });
  if (grad_bias) std::memcpy(grad_bias, bias, sizeof(float) * outputs);
}

}  // namespace

// grad_weight [O, C, 3, 3] and grad_bias [O] (or absent) from grad (dL/dout); `saved` is the forward's output
// (float32), its code (uint8) where it pooled, or absent where grad is the convolution's own.
Status conv2d_winograd_backward_weight(View grad_weight, View grad_bias, View grad, View saved, View input, int pad_h,
                                       int pad_w, int tile, int threads) {
  bool pooled = saved.dtype == DType::u8;
  PYFUSED_REQUIRE(channels_last(input, DType::f32), "input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(grad, DType::f32), "grad", "must be channels_last float32");
  PYFUSED_REQUIRE(!saved || channels_last(saved, pooled ? DType::u8 : DType::f32), "saved", "must be channels_last");
  PYFUSED_REQUIRE(pad_h >= 0 && pad_h <= 2 && pad_w >= 0 && pad_w <= 2, "padding", "must lie in 0..2");
  int64_t n = input.shape[0], channels = input.shape[1], outputs = grad.shape[1], factor = pooled ? 2 : 1;
  int64_t height = (input.shape[2] + 2 * pad_h - 2) / factor, width = (input.shape[3] + 2 * pad_w - 2) / factor;
  PYFUSED_REQUIRE(has_shape(grad, n, outputs, height, width), "grad", "must have the shape of out");
  PYFUSED_REQUIRE(!saved || has_shape(saved, n, outputs, height, width), "saved", "must have the shape of out");
  PYFUSED_REQUIRE(
      grad_weight.ndim == 4 && grad_weight.dtype == DType::f32 && has_shape(grad_weight, outputs, channels, 3, 3),
      "grad_weight", "must be float32 [O, C, 3, 3]");
  PYFUSED_REQUIRE(is_channel_vector(grad_bias, outputs), "grad_bias", "must be O contiguous float32");
  Plain source{input.as<float>(), input.shape[2], input.shape[3], channels};
  return with_tile(tile, [&](auto tag) {
    auto correlate_with = [&](const auto& gradient) {
      correlate<tag.value>(grad_weight, grad_bias.as<float>(), gradient, source, n, pad_h, pad_w, threads);
      return Status{};
    };
    const auto* g = grad.as<float>();
    if (pooled) return correlate_with(Unpooled{g, saved.as<uint8_t>(), 2 * height, 2 * width, outputs});
    if (!saved) return correlate_with(Plain{g, height, width, outputs});
    return correlate_with(Masked{g, saved.as<float>(), height, width, outputs});
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
