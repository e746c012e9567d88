// The middle of Winograd's convolution and of its data gradient: patches of a source, transformed, times the transformed
// weight, into a sink, which makes pixels of the sums of a tile.
//
// A sink has `channels`, finish<T>(products, tile, channel, count), and kOverlaps: whether tiles of an image meet in its
// pixels, so that they must be one thread's; then also clear(first, last image, first, last channel).
#pragma once
#include "cpu/kernels/conv2d_winograd.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int kGroup = 64;  // output channels between two transforms: M of one group stays in the cache
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kLargeWeight = 2 << 20;  // bytes of U that outgrow a core's cache
constexpr int64_t kSharedBytes = 4 << 20;  // of V and M where all threads work on the same tiles
constexpr int64_t kSharedRows = 48;        // tiles of one point's product that a thread takes at a time
// Up to as many tiles, what is read of V for a part of the input channels stays in the L2 cache beside its U: level with
// the other schedule at 32, 1.7 times as fast at 4.
constexpr int64_t kFewTiles = 48;
// Input channels of a product at a time: what it reads of U, 32 KiB, stays in the L1 cache while rows of V pass.
constexpr int64_t kDepth = (32 << 10) / (sizeof(float) * kVectors * lanes<float>);

// m[t][:] (+)= v[t][:] · b for `tiles` rows and B vectors of columns, which lie `next` apart. Ahead: meanwhile as much of
// `following`, laid out like b, is fetched into the L2 cache.
template <int B, bool Add, bool Ahead>
PYFUSED_INLINE void multiply_rows(const float* v, int64_t v_row, int64_t tiles, const float* b, int64_t next,
                                  int64_t depth, float* m, const float* following) {
  constexpr int64_t lines = B * lanes<float> > kPanel ? B * lanes<float> / kPanel : 1;  // of a row of b
  int64_t t = 0;
  if constexpr (Ahead)
    for (; t + kRows <= tiles && t < lines * kRows; t += kRows)
      multiply<kRows, B, Add, 2>(v + t * v_row, v_row, 1, b, next, kPanel, depth, m + t * kGroup, kGroup,
                                 following + t / kRows * next, sizeof(float) * kPanel);
  for (; t + kRows <= tiles; t += kRows)
    multiply<kRows, B, Add>(v + t * v_row, v_row, 1, b, next, kPanel, depth, m + t * kGroup, kGroup);
  with_constant<kRows - 1>(static_cast<int>(tiles - t), [&](auto rows) {
    multiply<rows.value, B, Add>(v + t * v_row, v_row, 1, b, next, kPanel, depth, m + t * kGroup, kGroup);
  });
}

// Input channels of a product at a time: as many in every part, kDepth at most.
PYFUSED_INLINE int64_t part_of(int64_t depth) { return ceil_div(depth, ceil_div(depth, kDepth)); }

// M[t][64] (+)= V[t][:] · U for `panels` panels (at most 4) of one point. Ahead: U lies farther than the L2 cache;
// `following` is the one that comes next. more: M holds the sums of earlier input channels, to which these are added.
template <bool Ahead>
PYFUSED_INLINE void multiply_group(const float* v, int64_t v_row, int64_t tiles, const float* u, int64_t depth,
                                   int panels, float* m, bool more, const float* following = nullptr) {
  constexpr int per_panel = kPanel / lanes<float>;
  int64_t next = per_panel == 1 ? depth * kPanel : lanes<float>;  // to the next vector of channels
  int64_t part = part_of(depth);
  auto column = [&](int j) { return u + j / per_panel * depth * kPanel + j % per_panel * lanes<float>; };
  for (int j = 0; j < panels * per_panel; j += kVectors)
    with_constant<kVectors>(min(kVectors, panels * per_panel - j), [&](auto vectors) {
      for (int64_t c = 0; c < depth; c += part) {
        const float* after = c + part < depth                    ? column(j) + (c + part) * kPanel
                             : j + kVectors < panels * per_panel ? column(j + kVectors)
                                                                 : following;
        auto* add = c || more ? multiply_rows<vectors.value, true, Ahead> : multiply_rows<vectors.value, false, Ahead>;
        add(v + c, v_row, tiles, column(j) + c * kPanel, next, min(part, depth - c), m + j * lanes<float>, after);
      }
    });
}

// --- The weight as the products take it. View of [O, C, 3, 3] in any strides; transposed: O and C exchanged, for the
// data gradient. Or the finished U.
struct Weight {
  const View& view;
  bool transposed;
  PYFUSED_INLINE bool finished() const { return view.ndim == 1; }
};

PYFUSED_INLINE int64_t point_stride(int64_t panels, int64_t depth) { return panels * depth * kPanel + kSkew; }

constexpr int kFilters = 16;  // input channels whose filters are read at a time

struct Filters {  // of one panel of outputs
  const float* data;
  int64_t outputs, depth, output_stride, depth_stride, tap[9];
  const float* end;  // of the weight, if each filter lies in one piece
};

// taps[tap][c][o] of at most kPanel by kFilters filters: with vectors where either channels or taps lie side by side.
PYFUSED_INLINE void load_filters(const Filters& f, float (&taps)[9][kFilters][kPanel]) {
  constexpr int L = lanes<float>;
  bool full = f.outputs == kPanel;
  V square[L];
  if (full && f.output_stride == 1) {
    for (int tap = 0; tap < 9; ++tap)
      for (int64_t c = 0; c < f.depth; ++c)
        for (int o = 0; o < kPanel; o += L) store(taps[tap][c] + o, load(f.data + f.tap[tap] + c * f.depth_stride + o));
    return;
  }
  if (full && f.depth == kFilters && f.depth_stride == 1) {
    for (int tap = 0; tap < 9; ++tap)
      for (int o = 0; o < kPanel; o += L)
        for (int c = 0; c < kFilters; c += L) {
          for (int i = 0; i < L; ++i) square[i] = load(f.data + f.tap[tap] + (o + i) * f.output_stride + c);
          transpose<float>(square);
          for (int i = 0; i < L; ++i) store(taps[tap][c + i] + o, square[i]);
        }
    return;
  }
  for (int64_t c = 0; c < f.depth; ++c) {
    const float* from = f.data + c * f.depth_stride;
    int tap = 0;
    if (full && from + (kPanel - 1) * f.output_stride + max(9, L) <= f.end)  // on AVX-512 7 floats too many are read
      for (constexpr int step = L < 9 ? L : 9; tap + step <= 9; tap += step)
        for (int o = 0; o < kPanel; o += L) {
          for (int i = 0; i < L; ++i) square[i] = load(from + (o + i) * f.output_stride + tap);
          transpose<float>(square);
          for (int i = 0; i < step; ++i) store(taps[tap + i][c] + o, square[i]);
        }
    for (; tap < 9; ++tap)
      for (int64_t o = 0; o < kPanel; ++o) taps[tap][c][o] = o < f.outputs ? from[f.tap[tap] + o * f.output_stride] : 0;
  }
}

// U of `panels` panels from panel `first` on and of `depth` input channels from `from` on: u[points][panels][depth][16],
// points `point_stride(panels, depth)` apart.
template <int T>
void transform_weight(const Weight& weight, int64_t first, int64_t panels, int64_t from, int64_t depth, float* u,
                      int threads) {
  const View& view = weight.view;
  int64_t outputs = view.shape[weight.transposed];
  int64_t output_stride = view.strides[weight.transposed], depth_stride = view.strides[!weight.transposed];
  int64_t point = point_stride(panels, depth), blocks = ceil_div(depth, kFilters);
  parallel_for(panels * blocks, 4, threads, [&](int64_t begin, int64_t end, int) {
    float taps[9][kFilters][kPanel];
    Filters filters{nullptr, 0, 0, output_stride, depth_stride, {}, nullptr};
    for (int tap = 0; tap < 9; ++tap) filters.tap[tap] = tap / 3 * view.strides[2] + tap % 3 * view.strides[3];
    if (view.contiguous()) filters.end = view.as<float>() + view.numel();
    for (int64_t item = begin; item < end; ++item) {  // in the order in which the filters lie
      bool across = output_stride < depth_stride;
      int64_t panel = across ? item % panels : item / blocks, c = (across ? item / panels : item % blocks) * kFilters;
      int64_t o = (first + panel) * kPanel;
      filters.data = view.as<float>() + o * output_stride + (from + c) * depth_stride;
      filters.outputs = min<int64_t>(kPanel, outputs - o), filters.depth = min<int64_t>(kFilters, depth - c);
      load_filters(filters, taps);
      for (int64_t d = 0; d < filters.depth; ++d)
        for (int i = 0; i < kPanel; i += lanes<float>) {
          V w[9], points[kPoints<T>];
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; ++tap) w[tap] = load(taps[tap][d] + i);
          transform_filter<T>(w, points);
          float* to = u + (panel * depth + c + d) * kPanel + i;
#pragma GCC unroll 36
          for (int k = 0; k < kPoints<T>; ++k) store(to + k * point, points[k]);
        }
    }
  });
}

// The results of tiles [first, first + count) of the grid for channels [begin, end), from m[points][count][kGroup] whose
// rows start with channel `origin`.
template <int T, class Sink>
void finish_tiles(const Sink& sink, const Grid& grid, int64_t first, int64_t count, int64_t begin, int64_t end,
                  const float* m, int64_t m_point, int64_t origin) {
  for (int64_t t = 0; t < count; ++t) {
    Tile tile(grid, first + t);
    for (int64_t o = begin; o < end; o += lanes<float>) {
      V products[kPoints<T>];
      const float* p = m + t * kGroup + (o - origin);
#pragma GCC unroll 36
      for (int k = 0; k < kPoints<T>; ++k) products[k] = load(p + k * m_point);
      sink.template finish<T>(products, tile, o, sink.channels - o);
    }
  }
}

// --- Three schedules of  sink <- tiles of `source` (patches of P x P at the grid's tiles, less the padding) times U.  Every
// sum has the same order in all: the same bits.

// Each thread by itself: with a part of the tiles (those that overlap in the result are one thread's), in blocks whose V
// and M stay in its cache, each of which reads all of U; or, by_outputs, with all tiles and a part of the output channels,
// whose U it makes for itself: every thread makes V, but U never goes from core to core.
template <int T, int P, class Source, class Sink>
void convolve_apart(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, const float* u,
                    bool by_outputs, int pad_h, int pad_w, int threads) {
  int64_t depth = source.channels, channels = sink.channels, all_panels = ceil_div(channels, kPanel);
  int64_t v_row = round_up(depth, lanes<float>), unit = Sink::kOverlaps ? grid.down * grid.across : 1;
  int64_t most = max<int64_t>(kRows, kBlockBytes / (kPoints<T> * 4 * v_row) / kRows * kRows);
  most = min(most, round_up(grid.count, kRows));
  int64_t v_point = most * v_row + kSkew, m_point = most * kGroup + kSkew;
  auto* memory = static_cast<float*>(scratch(0, sizeof(float) * threads * kPoints<T> * (v_point + m_point)));
  int64_t items = by_outputs ? all_panels : grid.count / unit, grain = by_outputs ? 1 : max<int64_t>(1, kRows / unit);
  parallel_for(items, grain, threads, [&](int64_t begin, int64_t end, int thread) {
    float *v = memory + thread * kPoints<T> * (v_point + m_point), *m = v + kPoints<T> * v_point;
    int64_t first_panel = by_outputs ? begin : 0, last_panel = by_outputs ? end : all_panels;
    if (by_outputs) begin = 0, end = grid.count / unit;
    int64_t u_point = point_stride(last_panel - first_panel, depth);
    const float* mine = u;
    if (by_outputs) {
      auto* made = static_cast<float*>(scratch(2, sizeof(float) * kPoints<T> * u_point));
      transform_weight<T>(weight, first_panel, last_panel - first_panel, 0, depth, made, 1);
      mine = made;
    }
    int64_t last_channel = min(channels, last_panel * kPanel);
    if constexpr (Sink::kOverlaps) sink.clear(begin, end, first_panel * kPanel, last_channel);
    int64_t blocks = ceil_div((end - begin) * unit, most);
    int64_t block = min(most, round_up(ceil_div((end - begin) * unit, blocks), kRows));
    for (int64_t first = begin * unit; first < end * unit; first += block) {
      int64_t count = min(block, end * unit - first);
      transform_tiles<T, P>(source, grid, first, count, pad_h, pad_w, v, v_row, v_point);
      for (int64_t panel = first_panel; panel < last_panel; panel += kGroup / kPanel) {
        int panels = static_cast<int>(min<int64_t>(kGroup / kPanel, last_panel - panel));
        for (int k = 0; k < kPoints<T>; ++k)
          multiply_group<false>(v + k * v_point, v_row, count,
                                mine + k * u_point + (panel - first_panel) * depth * kPanel, depth, panels,
                                m + k * m_point, false);
        finish_tiles<T>(sink, grid, first, count, panel * kPanel, min(last_channel, (panel + panels) * kPanel), m,
                        m_point, panel * kPanel);
      }
    }
  });
}

// All threads on one large block of tiles, group by group of output channels: U is read once per block, and where one
// block takes all tiles and U is not there yet, it exists only a group at a time, in cache. Threads share the filters, the
// points and rows of tiles, then the tiles; where tiles overlap, the images and vectors of channels.
template <int T, int P, class Source, class Sink>
void convolve_together(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, int64_t block,
                       const float* u, int pad_h, int pad_w, int threads) {
  int64_t depth = source.channels, channels = sink.channels, all_panels = ceil_div(channels, kPanel);
  int64_t v_row = round_up(depth, lanes<float>), v_point = block * v_row + kSkew, m_point = block * kGroup + kSkew;
  auto* v = static_cast<float*>(scratch(0, sizeof(float) * kPoints<T> * (v_point + m_point)));
  float *m = v + kPoints<T> * v_point, *own = nullptr;
  if (!u) own = static_cast<float*>(scratch(1, sizeof(float) * kPoints<T> * point_stride(kGroup / kPanel, depth)));
  int64_t image = grid.down * grid.across;
  if constexpr (Sink::kOverlaps)
    parallel_for(grid.count / image, 1, threads,
                 [&](int64_t begin, int64_t end, int) { sink.clear(begin, end, 0, channels); });
  for (int64_t first = 0; first < grid.count; first += block) {
    int64_t count = min(block, grid.count - first), row_blocks = ceil_div(count, kSharedRows);
    parallel_for(count, 1, threads, [&](int64_t begin, int64_t end, int) {
      transform_tiles<T, P>(source, grid, first + begin, end - begin, pad_h, pad_w, v + begin * v_row, v_row, v_point);
    });
    for (int64_t panel = 0; panel < all_panels; panel += kGroup / kPanel) {
      int panels = static_cast<int>(min<int64_t>(kGroup / kPanel, all_panels - panel));
      if (own) transform_weight<T>(weight, panel, panels, 0, depth, own, threads);
      const float* group = own ? own : u + panel * depth * kPanel;
      int64_t u_point = point_stride(own ? panels : all_panels, depth);
      parallel_for(kPoints<T> * row_blocks, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
          int64_t k = item / row_blocks, t = item % row_blocks * kSharedRows;
          const float* following = group + min(item + 1, end - 1) / row_blocks * u_point;
          multiply_group<true>(v + k * v_point + t * v_row, v_row, min(kSharedRows, count - t), group + k * u_point,
                               depth, panels, m + k * m_point + t * kGroup, false, following);
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
            finish_tiles<T>(sink, grid, from, to - from, o, min(last, o + lanes<float>), m + (from - first) * kGroup,
                            m_point, origin);
          }
        });
      } else {
        parallel_for(count, 1, threads, [&](int64_t begin, int64_t end, int) {
          finish_tiles<T>(sink, grid, first + begin, end - begin, origin, last, m + begin * kGroup, m_point, origin);
        });
      }
    }
  }
}

// Few tiles and a weight whose U would fill the caches: a thread takes groups of output channels, all tiles, and a part
// of the input channels at a time, whose U it makes in its own cache, uses, and forgets.
template <int T, int P, class Source, class Sink>
void convolve_by_groups(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, int pad_h,
                        int pad_w, int threads) {
  int64_t depth = source.channels, channels = sink.channels, all_panels = ceil_div(channels, kPanel);
  int64_t v_row = round_up(depth, lanes<float>), v_point = grid.count * v_row + kSkew;
  int64_t m_point = grid.count * kGroup + kSkew, part = part_of(depth);
  int64_t group = min<int64_t>(kGroup / kPanel, ceil_div(all_panels, threads)), u_size = point_stride(group, part);
  auto* v = static_cast<float*>(scratch(0, sizeof(float) * kPoints<T> * v_point));
  parallel_for(grid.count, 1, threads, [&](int64_t begin, int64_t end, int) {
    transform_tiles<T, P>(source, grid, begin, end - begin, pad_h, pad_w, v + begin * v_row, v_row, v_point);
  });
  parallel_for(ceil_div(all_panels, group), 1, threads, [&](int64_t begin, int64_t end, int) {
    auto* u = static_cast<float*>(scratch(2, sizeof(float) * kPoints<T> * (u_size + m_point)));
    float* m = u + kPoints<T> * u_size;
    for (int64_t panel = begin * group; panel < min(all_panels, end * group); panel += group) {
      int panels = static_cast<int>(min(group, all_panels - panel));
      int64_t origin = panel * kPanel, last = min(channels, origin + panels * kPanel);
      if constexpr (Sink::kOverlaps) sink.clear(0, grid.count / (grid.down * grid.across), origin, last);
      for (int64_t c = 0; c < depth; c += part) {
        int64_t size = min(part, depth - c), u_point = point_stride(panels, size);
        transform_weight<T>(weight, panel, panels, c, size, u, 1);
        for (int k = 0; k < kPoints<T>; ++k)
          multiply_group<false>(v + k * v_point + c, v_row, grid.count, u + k * u_point, size, panels, m + k * m_point,
                                c > 0);
      }
      finish_tiles<T>(sink, grid, 0, grid.count, origin, last, m, m_point, origin);
    }
  });
}

template <int T, int P, class Source, class Sink>
void convolve(const Source& source, const Sink& sink, const Grid& grid, const Weight& weight, int pad_h, int pad_w,
              int threads) {
  if (!grid.count) return;
  int64_t depth = source.channels, panels = ceil_div(sink.channels, kPanel),
          u_size = kPoints<T> * point_stride(panels, depth);
  int64_t weight_bytes = sizeof(float) * u_size,
          tile_bytes = kPoints<T> * sizeof(float) * (round_up(depth, lanes<float>) + kGroup);
  int64_t most = max<int64_t>(8 * kRows, max(kSharedBytes, weight_bytes) / tile_bytes),
          blocks = ceil_div(grid.count, most);
  bool few_images = Sink::kOverlaps && grid.count / (grid.down * grid.across) < threads;
  bool together = few_images || weight_bytes >= kLargeWeight;
  const float* u = weight.finished() ? weight.view.as<float>() : nullptr;
  if (together && !u && grid.count <= kFewTiles && blocks == 1)
    return convolve_by_groups<T, P>(source, sink, grid, weight, pad_h, pad_w, threads);
  // V is no larger than U here: making it twice costs less than what every thread would read of the others' U.
  bool few_tiles = grid.count * (Sink::kOverlaps ? 2 : 1) <= sink.channels;
  bool by_outputs = !together && !u && threads > 1 && panels > 1 && few_tiles;
  if (!u && !by_outputs && !(together && blocks == 1)) {
    auto* own = static_cast<float*>(scratch(1, weight_bytes));
    transform_weight<T>(weight, 0, panels, 0, depth, own, threads);
    u = own;
  }
  if (together)
    convolve_together<T, P>(source, sink, grid, weight, ceil_div(grid.count, blocks), u, pad_h, pad_w, threads);
  else
    convolve_apart<T, P>(source, sink, grid, weight, u, by_outputs, pad_h, pad_w, threads);
}

// What forward and backward ask of their arguments alike.
Status check(const Weight& weight, int tile, int64_t depth, int64_t outputs, int pad_h, int pad_w) {
  const View& view = weight.view;
  PYFUSED_REQUIRE(pad_h >= 0 && pad_h <= 2 && pad_w >= 0 && pad_w <= 2, "padding", "must lie in 0..2");
  PYFUSED_REQUIRE(depth > 0, "input", "must have channels");
  PYFUSED_REQUIRE(view.dtype == DType::f32, "weight", "must be float32");
  if (weight.finished())
    PYFUSED_REQUIRE(
        view.contiguous() && view.numel() == (tile + 2) * (tile + 2) * point_stride(ceil_div(outputs, kPanel), depth),
        "weight", "as transformed must be (tile + 2)² * (C * round_up(O, 16) + 16) contiguous float32");
  else
    PYFUSED_REQUIRE(view.ndim == 4 && view.shape[weight.transposed] == outputs &&
                        view.shape[!weight.transposed] == depth && view.shape[2] == 3 && view.shape[3] == 3,
                    "weight", "must be float32 [O, C, 3, 3] or transformed");
  return {};
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
