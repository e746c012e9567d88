// 3x3 convolution, stride 1, by Winograd's F(4x4, 3x3), with bias and ReLU (and 2x2 max pool) in its epilogue; float32.
//
//   out = relu(input ⋆ weight + bias),  each 4x4 tile  Y = Aᵀ [ ∑_c (G g_oc Gᵀ) ⊙ (Bᵀ d_c B) ] A   (conv2d_winograd.h)
//
// Layout  input, out, gradients: torch channels_last (NHWC memory). The weight is transformed first, once per weight:
//         U[36][⌈O/16⌉][C][16], so U has 36 · C · round_up(O, 16) floats, the same on every instruction set.
// Tiles   a thread takes blocks of T tiles: patches to V[36][T][C]; then, for 64 output channels at a time, 36 products
//         V[k] · U[k] to M[36][T][64] and back to pixels. T is such that V takes half of an L2 cache or less.
// Flops   2.25 multiply-adds per output, input channel and output channel instead of 9; the transforms take 15 to 30%
//         of the time at 64 channels. An incomplete tile costs as much as a whole one.
// Traffic reads input 2.25 times (mostly from cache) and U once per block, writes out once.
// Saves   nothing but out, which is the ReLU's mask; or, pooled, a code of one byte per value: 0..3 = row * 2 + column of
//         the maximum in its window (the first of equals; the last NaN), 255 = not positive, so no gradient.
// Error   for random data about 3e-5 · √(1 + C/64) of the root mean square of input ⋆ weight at most, 5 times a direct
//         sum's; the gradients' 3e-5. test_conv2d_winograd.py holds them to twice that. Bits depend on neither
//         threads nor batch. An inf or NaN in the input makes its whole tile NaN, not only the pixels that see it.
// Edges   padding 0..2; any N, H, W, C, O (channels past a whole vector go through a buffer); no work for the odd last
//         row and column, which no window of the pool covers.
#include "cpu/kernels/conv2d_winograd.h"

#include "cpu/kernels/activation.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int kGroup = 64;  // output channels between two transforms: M of one group stays in the cache
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kLargeWeight = 2 << 20;  // bytes of U that outgrow a core's cache
constexpr int64_t kSharedBytes = 4 << 20;  // of V and M where all threads work on the same tiles
constexpr int64_t kSharedRows = 48;        // tiles of one point's product that a thread takes at a time

// --- Sinks: what happens to the 36 sums of products of a tile, `count` channels from o.
// ReLU, or nothing. As a case of the next one it cost 4 to 7% more instructions altogether.
struct Floor {
  float least;  // 0: ReLU; −inf: none
  PYFUSED_INLINE V operator()(V value, int64_t, int64_t) const {
    V floor = splat(least);
    return floor > value ? floor : value;  // this way round a NaN stays
  }
};

struct AddAndActivate {
  const float* residual;  // or nullptr
  int activation;
  float slope;
  PYFUSED_INLINE V operator()(V value, int64_t offset, int64_t count) const {
    const float* add = residual + offset;
    if (residual) value += count >= lanes<float> ? load(add) : load_first(add, count);
    return activate<float>(activation, slope, value);
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
  PYFUSED_INLINE void finish(const V (&products)[kPoints], const Tile& tile, int64_t o, int64_t count) const {
    V y[16];
    transform_products(products, y);
    V shift = !bias ? V{} : count >= lanes<float> ? load(bias + o) : load_first(bias + o, count);
    int64_t rows = min<int64_t>(kTile, height - tile.h), columns = min<int64_t>(kTile, width - tile.w);
    float* corner = out + ((tile.n * height + tile.h) * width + tile.w) * channels + o;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float* p = corner + (i * width + j) * channels;
        V value = epilogue(y[i * kTile + j] + shift, p - out, count);
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
  PYFUSED_INLINE void finish(const V (&products)[kPoints], const Tile& tile, int64_t o, int64_t count) const {
    V y[16];
    transform_products(products, y);
    V shift = !bias ? V{} : count >= lanes<float> ? load(bias + o) : load_first(bias + o, count);
#pragma GCC unroll 4
    for (int window = 0; window < 4; ++window) {
      int64_t h = tile.h / 2 + window / 2, w = tile.w / 2 + window % 2;
      if (h >= height || w >= width) continue;
      const V* corner = y + window / 2 * 2 * kTile + window % 2 * 2;
      V best = corner[0] + shift;
      VecI32 where{};
#pragma GCC unroll 3
      for (int at = 1; at < 4; ++at) {
        V value = corner[at / 2 * kTile + at % 2] + shift;
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

// The data gradient: 6x6 patches, two rows and columns of which are a neighbour's too, are added up.
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
  PYFUSED_INLINE void finish(const V (&products)[kPoints], const Tile& tile, int64_t c, int64_t count) const {
    V patch[kPoints];
    transform_products_to_patch(products, patch);
    int64_t h = tile.h - pad_h, w = tile.w - pad_w;
    int64_t bottom = min<int64_t>(kPatch, height - h), right = min<int64_t>(kPatch, width - w);
    for (int64_t i = max<int64_t>(0, -h); i < bottom; ++i)
      for (int64_t j = max<int64_t>(0, -w); j < right; ++j) {
        float* p = out + ((tile.n * height + h + i) * width + w + j) * channels + c;
        if (count >= lanes<float>)
          store(p, load(p) + patch[i * kPatch + j]);
        else
          store_first(p, load_first(p, count) + patch[i * kPatch + j], count);
      }
  }
};

// M[t][64] = V[t][:] · U for `panels` panels (at most 4) of one point.
PYFUSED_INLINE void multiply_group(const float* v, int64_t v_row, int64_t tiles, const float* u, int64_t depth,
                                   int panels, float* m) {
  constexpr int per_panel = kPanel / lanes<float>;
  int64_t next = per_panel == 1 ? depth * kPanel : lanes<float>;  // to the next vector of channels
  for (int j = 0; j < panels * per_panel; j += kVectors) {
    const float* b = u + j / per_panel * depth * kPanel + j % per_panel * lanes<float>;
    with_constant<kVectors>(min(kVectors, panels * per_panel - j), [&](auto vectors) {
      float* out = m + j * lanes<float>;
      int64_t t = 0;
      for (; t + kRows <= tiles; t += kRows)
        multiply<kRows, vectors.value, false>(v + t * v_row, v_row, 1, b, next, kPanel, depth, out + t * kGroup,
                                              kGroup);
      with_constant<kRows - 1>(static_cast<int>(tiles - t), [&](auto rows) {
        multiply<rows.value, vectors.value, false>(v + t * v_row, v_row, 1, b, next, kPanel, depth, out + t * kGroup,
                                                   kGroup);
      });
    });
  }
}

// --- The weight as the products take it. View of [O, C, 3, 3] in any strides; transposed: O and C exchanged, for the
// data gradient. Or the finished U.
struct Weight {
  const View& view;
  bool transposed;
  PYFUSED_INLINE bool finished() const { return view.ndim == 1; }
};

PYFUSED_INLINE int64_t point_stride(int64_t panels, int64_t depth) { return panels * depth * kPanel + kSkew; }

// U of `panels` panels from panel `first` on: u[36][panels][depth][16], points `point_stride(panels, depth)` apart.
void transform_weight(const Weight& weight, int64_t first, int64_t panels, float* u, int threads) {
  const View& view = weight.view;
  int64_t outputs = view.shape[weight.transposed], depth = view.shape[!weight.transposed];
  int64_t output_stride = view.strides[weight.transposed], depth_stride = view.strides[!weight.transposed];
  int64_t point = point_stride(panels, depth), offset[9];
  for (int tap = 0; tap < 9; ++tap) offset[tap] = tap / 3 * view.strides[2] + tap % 3 * view.strides[3];
  parallel_for(panels * depth, 64, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {  // in the order in which the filters lie
      int64_t panel = output_stride < depth_stride ? row % panels : row / depth;
      int64_t c = output_stride < depth_stride ? row / panels : row % depth;
      int64_t o = (first + panel) * kPanel, count = min<int64_t>(kPanel, outputs - o);
      const float* from = view.as<float>() + o * output_stride + c * depth_stride;
      float taps[9][kPanel] = {};
      for (int64_t i = 0; i < count; ++i, from += output_stride)
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) taps[tap][i] = from[offset[tap]];
      for (int i = 0; i < kPanel; i += lanes<float>) {
        V w[9], points[kPoints];
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) w[tap] = load(taps[tap] + i);
        transform_filter(w, points);
        float* to = u + (panel * depth + c) * kPanel + i;
#pragma GCC unroll 36
        for (int k = 0; k < kPoints; ++k) store(to + k * point, points[k]);
      }
    }
  });
}

// The results of tiles [first, first + count) of the grid for channels [begin, end), from m[36][count][kGroup] whose
// rows start with channel `origin`.
template <class Sink>
void finish_tiles(const Sink& sink, const Grid& grid, int64_t first, int64_t count, int64_t begin, int64_t end,
                  const float* m, int64_t m_point, int64_t origin) {
  for (int64_t t = 0; t < count; ++t) {
    Tile tile(grid, first + t);
    for (int64_t o = begin; o < end; o += lanes<float>) {
      V products[kPoints];
      const float* p = m + t * kGroup + (o - origin);
#pragma GCC unroll 36
      for (int k = 0; k < kPoints; ++k) products[k] = load(p + k * m_point);
      sink.finish(products, tile, o, sink.channels - o);
    }
  }
}

// --- Two schedules of  sink <- tiles of `source` (patches of P x P at the grid's tiles, less the padding) times U.  Every
// sum has the same order in both: the same bits.

// Each thread by itself, with blocks of tiles whose V and M stay in its cache, and every block reads all of U: a thread has
// a part of the tiles (those that overlap in the result are one thread's), or, by_outputs, all of them for a part of the
// output channels, whose U it makes for itself: V is made once for every part, but U never goes from core to core.
template <int P, class Source, class Sink>
void convolve_apart(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, const float* u,
                    bool by_outputs, int pad_h, int pad_w, int threads) {
  int64_t depth = source.channels, channels = sink.channels, all_panels = ceil_div(channels, kPanel);
  int64_t v_row = round_up(depth, lanes<float>), unit = Sink::kOverlaps ? grid.down * grid.across : 1;
  int64_t most = max<int64_t>(kRows, kBlockBytes / (kPoints * 4 * v_row) / kRows * kRows);
  most = min(most, round_up(grid.count, kRows));
  int64_t v_point = most * v_row + kSkew, m_point = most * kGroup + kSkew;
  auto* memory = static_cast<float*>(scratch(0, sizeof(float) * threads * kPoints * (v_point + m_point)));
  int64_t items = by_outputs ? all_panels : grid.count / unit, grain = by_outputs ? 1 : max<int64_t>(1, kRows / unit);
  parallel_for(items, grain, threads, [&](int64_t begin, int64_t end, int thread) {
    float *v = memory + thread * kPoints * (v_point + m_point), *m = v + kPoints * v_point;
    int64_t first_panel = by_outputs ? begin : 0, last_panel = by_outputs ? end : all_panels;
    if (by_outputs) begin = 0, end = grid.count / unit;
    int64_t u_point = point_stride(last_panel - first_panel, depth);
    const float* mine = u;
    if (by_outputs) {
      auto* made = static_cast<float*>(scratch(2, sizeof(float) * kPoints * u_point));
      transform_weight(weight, first_panel, last_panel - first_panel, made, 1);
      mine = made;
    }
    int64_t last_channel = min(channels, last_panel * kPanel);
    if constexpr (Sink::kOverlaps) sink.clear(begin, end, first_panel * kPanel, last_channel);
    int64_t blocks = ceil_div((end - begin) * unit, most);
    int64_t block = min(most, round_up(ceil_div((end - begin) * unit, blocks), kRows));
    for (int64_t first = begin * unit; first < end * unit; first += block) {
      int64_t count = min(block, end * unit - first);
      transform_tiles<P>(source, grid, first, count, pad_h, pad_w, v, v_row, v_point);
      for (int64_t panel = first_panel; panel < last_panel; panel += kGroup / kPanel) {
        int panels = static_cast<int>(min<int64_t>(kGroup / kPanel, last_panel - panel));
        for (int k = 0; k < kPoints; ++k)
          multiply_group(v + k * v_point, v_row, count, mine + k * u_point + (panel - first_panel) * depth * kPanel,
                         depth, panels, m + k * m_point);
        finish_tiles(sink, grid, first, count, panel * kPanel, min(last_channel, (panel + panels) * kPanel), m, m_point,
                     panel * kPanel);
      }
    }
  });
}

// All threads on one large block of tiles, group by group of output channels: U is read once per block, and where one
// block takes all tiles and U is not there yet, it exists only a group at a time, in cache. Threads share the filters, the
// points and rows of tiles, then the tiles; where tiles overlap, the images and vectors of channels.
template <int P, class Source, class Sink>
void convolve_together(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, int64_t block,
                       const float* u, int pad_h, int pad_w, int threads) {
  int64_t depth = source.channels, channels = sink.channels, all_panels = ceil_div(channels, kPanel);
  int64_t v_row = round_up(depth, lanes<float>), v_point = block * v_row + kSkew, m_point = block * kGroup + kSkew;
  auto* v = static_cast<float*>(scratch(0, sizeof(float) * kPoints * (v_point + m_point)));
  float *m = v + kPoints * v_point, *own = nullptr;
  if (!u) own = static_cast<float*>(scratch(1, sizeof(float) * kPoints * point_stride(kGroup / kPanel, depth)));
  int64_t image = grid.down * grid.across;
  if constexpr (Sink::kOverlaps)
    parallel_for(grid.count / image, 1, threads,
                 [&](int64_t begin, int64_t end, int) { sink.clear(begin, end, 0, channels); });
  for (int64_t first = 0; first < grid.count; first += block) {
    int64_t count = min(block, grid.count - first), row_blocks = ceil_div(count, kSharedRows);
    parallel_for(count, 1, threads, [&](int64_t begin, int64_t end, int) {
      transform_tiles<P>(source, grid, first + begin, end - begin, pad_h, pad_w, v + begin * v_row, v_row, v_point);
    });
    for (int64_t panel = 0; panel < all_panels; panel += kGroup / kPanel) {
      int panels = static_cast<int>(min<int64_t>(kGroup / kPanel, all_panels - panel));
      if (own) transform_weight(weight, panel, panels, own, threads);
      const float* group = own ? own : u + panel * depth * kPanel;
      int64_t u_point = point_stride(own ? panels : all_panels, depth);
      parallel_for(kPoints * row_blocks, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
          int64_t k = item / row_blocks, t = item % row_blocks * kSharedRows;
          multiply_group(v + k * v_point + t * v_row, v_row, min(kSharedRows, count - t), group + k * u_point, depth,
                         panels, m + k * m_point + t * kGroup);
        }
      });
      int64_t origin = panel * kPanel, last = min(channels, origin + panels * kPanel);
      if constexpr (Sink::kOverlaps) {
        int64_t vectors = ceil_div(last - origin, lanes<float>), image0 = first / image;
        int64_t images = (first + count - 1) / image - image0 + 1;
        parallel_for(images * vectors, 1, threads, [&](int64_t begin, int64_t end, int) {
          for (int64_t item = begin; item < end; ++item) {
            int64_t n = image0 + item / vectors, o = origin + item % vectors * lanes<float>;
            int64_t from = max(first, n * image), to = min(first + count, (n + 1) * image);
            finish_tiles(sink, grid, from, to - from, o, min(last, o + lanes<float>), m + (from - first) * kGroup,
                         m_point, origin);
          }
        });
      } else {
        parallel_for(count, 1, threads, [&](int64_t begin, int64_t end, int) {
          finish_tiles(sink, grid, first + begin, end - begin, origin, last, m + begin * kGroup, m_point, origin);
        });
      }
    }
  }
}

template <int P, class Source, class Sink>
void convolve(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, int pad_h, int pad_w,
              int threads) {
  if (!grid.count) return;
  int64_t depth = source.channels, panels = ceil_div(sink.channels, kPanel),
          u_size = kPoints * point_stride(panels, depth);
  int64_t weight_bytes = sizeof(float) * u_size,
          tile_bytes = kPoints * sizeof(float) * (round_up(depth, lanes<float>) + kGroup);
  int64_t most = max<int64_t>(8 * kRows, max(kSharedBytes, weight_bytes) / tile_bytes),
          blocks = ceil_div(grid.count, most);
  bool few_images = Sink::kOverlaps && grid.count / (grid.down * grid.across) < threads;
  bool together = few_images || weight_bytes >= kLargeWeight;
  const float* u = weight.finished() ? weight.view.as<float>() : nullptr;
  // V is no larger than U here: making it twice costs less than what every thread would read of the others' U.
  bool few_tiles = grid.count * (Sink::kOverlaps ? 2 : 1) <= sink.channels;
  bool by_outputs = !together && !u && threads > 1 && panels > 1 && few_tiles;
  if (!u && !by_outputs && !(together && blocks == 1)) {
    auto* own = static_cast<float*>(scratch(1, weight_bytes));
    transform_weight(weight, 0, panels, own, threads);
    u = own;
  }
  if (together)
    convolve_together<P>(source, sink, grid, weight, ceil_div(grid.count, blocks), u, pad_h, pad_w, threads);
  else
    convolve_apart<P>(source, sink, grid, weight, u, by_outputs, pad_h, pad_w, threads);
}

// What forward and backward ask of their arguments alike.
Status check(const Weight& weight, int64_t depth, int64_t outputs, int pad_h, int pad_w) {
  const View& view = weight.view;
  PYFUSED_REQUIRE(pad_h >= 0 && pad_h <= 2 && pad_w >= 0 && pad_w <= 2, "padding", "must lie in 0..2");
  PYFUSED_REQUIRE(view.dtype == DType::f32, "weight", "must be float32");
  if (weight.finished())
    PYFUSED_REQUIRE(view.contiguous() && view.numel() == kPoints * point_stride(ceil_div(outputs, kPanel), depth),
                    "weight", "as transformed must be 36 * (C * round_up(O, 16) + 16) contiguous float32");
  else
    PYFUSED_REQUIRE(view.ndim == 4 && view.shape[weight.transposed] == outputs &&
                        view.shape[!weight.transposed] == depth && view.shape[2] == 3 && view.shape[3] == 3,
                    "weight", "must be float32 [O, C, 3, 3] or transformed");
  return {};
}

}  // namespace

// U from weight [O, C, 3, 3] of any strides: 36 * (C * round_up(O, 16) + 16) floats.
Status conv2d_winograd_transform_weight(View transformed, View weight, int threads) {
  PYFUSED_REQUIRE(weight.ndim == 4 && weight.dtype == DType::f32 && weight.shape[2] == 3 && weight.shape[3] == 3,
                  "weight", "must be float32 [O, C, 3, 3]");
  int64_t panels = ceil_div(weight.shape[0], kPanel);
  PYFUSED_REQUIRE(transformed.dtype == DType::f32 && transformed.contiguous() &&
                      transformed.numel() == kPoints * point_stride(panels, weight.shape[1]),
                  "transformed", "must be 36 * (C * round_up(O, 16) + 16) contiguous float32");
  transform_weight({weight, false}, 0, panels, transformed.as<float>(), threads);
  return {};
}

namespace {

template <class Epilogue>
Status forward(View out, View input, View weight, View bias, const Epilogue& epilogue, int pad_h, int pad_w,
               int threads) {
  PYFUSED_REQUIRE(channels_last(input, DType::f32), "input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(out, DType::f32), "out", "must be channels_last float32");
  int64_t n = input.shape[0], outputs = out.shape[1];
  int64_t height = input.shape[2] + 2 * pad_h - 2, width = input.shape[3] + 2 * pad_w - 2;
  if (Status status = check({weight, false}, input.shape[1], outputs, pad_h, pad_w); status.code) return status;
  PYFUSED_REQUIRE(has_shape(out, n, outputs, height, width), "out", "must be [N, O, H + 2 pad - 2, W + 2 pad - 2]");
  PYFUSED_REQUIRE(is_channel_vector(bias, outputs), "bias", "must be O contiguous float32");
  Plain source{input.as<float>(), input.shape[2], input.shape[3], input.shape[1]};
  Dense<Epilogue> sink{out.as<float>(), bias.as<float>(), epilogue, height, width, outputs};
  convolve<kPatch>(source, sink, Grid(n, height, width), {weight, false}, pad_h, pad_w, threads);
  return {};
}

}  // namespace

// out [N, O, OH, OW] = input ⋆ weight + bias, through the ReLU if `relu`.
Status conv2d_winograd(View out, View input, View weight, View bias, int pad_h, int pad_w, bool relu, int threads) {
  return forward(out, input, weight, bias, Floor{relu ? 0.f : -__builtin_inff()}, pad_h, pad_w, threads);
}

// out [N, O, OH, OW] = act(input ⋆ weight + bias + residual); the residual has the shape and layout of out. Activations
// are those of activation.h.
Status conv2d_winograd_act(View out, View input, View weight, View bias, View residual, int pad_h, int pad_w,
                           int activation, double slope, int threads) {
  PYFUSED_REQUIRE(!residual || (channels_last(residual, DType::f32) && out.ndim == 4 &&
                                has_shape(residual, out.shape[0], out.shape[1], out.shape[2], out.shape[3])),
                  "residual", "must be like out");
  PYFUSED_REQUIRE(activation >= 0 && activation < kActivations, "activation", "is unknown");
  AddAndActivate epilogue{residual.as<float>(), activation, static_cast<float>(slope)};
  return forward(out, input, weight, bias, epilogue, pad_h, pad_w, threads);
}

// out [N, O, PH, PW] = max_pool2d(relu(input ⋆ weight + bias), 2), and its code (uint8, same shape).
Status conv2d_winograd_pool(View out, View code, View input, View weight, View bias, int pad_h, int pad_w,
                            int threads) {
  PYFUSED_REQUIRE(channels_last(input, DType::f32), "input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(out, DType::f32), "out", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(code, DType::u8), "code", "must be channels_last uint8");
  int64_t n = input.shape[0], outputs = out.shape[1];
  int64_t height = (input.shape[2] + 2 * pad_h - 2) / 2, width = (input.shape[3] + 2 * pad_w - 2) / 2;
  if (Status status = check({weight, false}, input.shape[1], outputs, pad_h, pad_w); status.code) return status;
  PYFUSED_REQUIRE(has_shape(out, n, outputs, height, width), "out", "must be [N, O, (H + 2 pad - 2) / 2, ...]");
  PYFUSED_REQUIRE(has_shape(code, n, outputs, height, width), "code", "must have the shape of out");
  PYFUSED_REQUIRE(is_channel_vector(bias, outputs), "bias", "must be O contiguous float32");
  Plain source{input.as<float>(), input.shape[2], input.shape[3], input.shape[1]};
  Pooled sink{out.as<float>(), code.as<uint8_t>(), bias.as<float>(), height, width, outputs};
  convolve<kPatch>(source, sink, Grid(n, 2 * height, 2 * width), {weight, false}, pad_h, pad_w, threads);
  return {};
}

// grad_input [N, C, H, W] from grad (dL/dout); `saved` is the forward's output (float32), its code (uint8) where it
// pooled, or absent where grad is the convolution's own. The forward's algorithm transposed: with g the gradient before
// ReLU (and pool), whose mask (or code) is applied while its tiles are read,  dx = ∑_tiles B [ ∑_o U_oc ⊙ (A g_o Aᵀ) ] Bᵀ.
// A convolution with rotated filters would do too, but it has tiles of dx instead of g: 4 times as many at 5x5 -> 3x3.
Status conv2d_winograd_backward_input(View grad_input, View grad, View saved, View weight, int pad_h, int pad_w,
                                      int threads) {
  bool pooled = saved.dtype == DType::u8;
  PYFUSED_REQUIRE(channels_last(grad_input, DType::f32), "grad_input", "must be channels_last float32");
  PYFUSED_REQUIRE(channels_last(grad, DType::f32), "grad", "must be channels_last float32");
  PYFUSED_REQUIRE(!saved || channels_last(saved, pooled ? DType::u8 : DType::f32), "saved", "must be channels_last");
  int64_t n = grad_input.shape[0], inputs = grad_input.shape[1], outputs = grad.shape[1], factor = pooled ? 2 : 1;
  int64_t height = grad_input.shape[2], width = grad_input.shape[3];
  int64_t grad_height = (height + 2 * pad_h - 2) / factor, grad_width = (width + 2 * pad_w - 2) / factor;
  if (Status status = check({weight, true}, outputs, inputs, pad_h, pad_w); status.code) return status;
  PYFUSED_REQUIRE(has_shape(grad, n, outputs, grad_height, grad_width), "grad", "must have the shape of out");
  PYFUSED_REQUIRE(!saved || has_shape(saved, n, outputs, grad_height, grad_width), "saved",
                  "must have the shape of out");
  Overlapping sink{grad_input.as<float>(), pad_h, pad_w, height, width, inputs};
  Grid grid(n, factor * grad_height, factor * grad_width);
  if (!grid.count) {  // no pixel reaches the output
    std::memset(grad_input.data, 0, sizeof(float) * grad_input.numel());
    return {};
  }
  const float* g = grad.as<float>();
  if (pooled)
    convolve<kTile>(Unpooled{g, saved.as<uint8_t>(), grid.height, grid.width, outputs}, sink, grid, {weight, true}, 0,
                    0, threads);
  else if (!saved)
    convolve<kTile>(Plain{g, grid.height, grid.width, outputs}, sink, grid, {weight, true}, 0, 0, threads);
  else
    convolve<kTile>(Masked{g, saved.as<float>(), grid.height, grid.width, outputs}, sink, grid, {weight, true}, 0, 0,
                    threads);
  return {};
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
