// The three products of linear_cross_entropy, on a block of classes and a chunk of rows: the logits, d_input, d_weight.
//
// A tile of the result, kTile by kWide vectors, is held in registers (12 x 2 vectors, or 6 x 2 where there are 16
// registers): for a step of the sum kTile numbers are broadcast and a line or two read, from the L2 cache, of what is
// arranged in panels of kWidth for it. What comes from memory is fetched ahead, some lines with every tile: a burst stops
// the multiplications.
#pragma once
#include "cpu/kernels/multiply.h"
#include "cpu/parallel.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int kTile = lanes<float> == 16 ? 12 : 6;  // a tile's broadcast numbers
constexpr int kWide = 2;                            // and its vectors
constexpr int kLane = lanes<float>;
constexpr int64_t kWidth = kWide * kLane;
constexpr int64_t kBlock = 96;   // classes at a time
constexpr int64_t kDepth = 512;  // dims at a time, so that theirs of the rows and the weights fit the L2 cache; longer
                                 // sums would round more than those of a BLAS
constexpr int kSoon = 4;         // steps of a product that a line takes to come from the L2 cache

struct Layer {
  const float *weight, *bias;  // [V, D]; [V] or null
  float *d_weight, *d_bias;    // or null
  int64_t classes, dims;
  int64_t blocks() const { return ceil_div(classes, kBlock); }
  int64_t part() const { return round_up(ceil_div(dims, ceil_div(dims, kDepth)), kWidth); }
  int64_t panels() const { return ceil_div(dims, kWidth); }
  int64_t d_input_row() const { return panels() * kWidth + kSkew; }
};

struct Chunk {
  int64_t rows, pitch;
  float *columns, *input;  // the rows as [panel of rows][D][kWidth] and as [panel of dims][R][kWidth], filled up with 0
  float *most, *sum;       // [blocks, pitch]: m, and ∑ e^(z - m) without the label
  float *label, *lse;      // [pitch]: z at the label, or -inf
  float *factor, *entry;   // [pitch]: upstream (1 + 2 z_loss lse), and g at the label
  const int64_t* target;
  const int32_t *row_ids, *class_ids;  // [pitch] and [V], or null
  int64_t padded() const { return round_up(rows, kWidth); }
};

struct Block {
  int64_t number, begin, end;
  float* z;  // [end - begin, pitch]: z, then e^(z - m), then g
  int64_t classes() const { return end - begin; }
  // body(row, z of that row's label) for labels in the block
  template <class Body>
  PYFUSED_INLINE void for_labels(const Chunk& chunk, const Body& body) const {
    for (int64_t r = 0; r < chunk.rows; ++r)
      if (int64_t c = chunk.target[r]; c >= begin && c < end) body(r, z[(c - begin) * chunk.pitch + r]);
  }
};

// body(first, how many) for tiles of kTile, then of 4, then single ones.
template <class Body>
PYFUSED_INLINE void in_tiles(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kTile <= count; i += kTile) body(i, std::integral_constant<int, kTile>{});
  for (; i + 4 <= count; i += 4) body(i, std::integral_constant<int, 4>{});
  for (; i < count; ++i) body(i, std::integral_constant<int, 1>{});
}

// The vector from dim d on of a row of D dims; 0 past its end.
PYFUSED_INLINE V load_dims(const float* row, int64_t d, int64_t D) {
  return load_first(row + min(d, D), min<int64_t>(max<int64_t>(D - d, 0), kLane));
}

// Both arrangements of a chunk's rows, the second for gradients.
void arrange(const Layer& layer, const Chunk& chunk, const float* rows, bool both, int threads) {
  const int64_t D = layer.dims, R = chunk.rows;
  parallel_for(chunk.padded() / kWidth, 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t d = 0; d < D; ++d) {
        float* out = chunk.columns + (p * D + d) * kWidth;
        for (int64_t r = p * kWidth; r < (p + 1) * kWidth; ++r) *out++ = r < R ? rows[r * D + d] : 0;
      }
  });
  parallel_for(both ? layer.panels() : 0, 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t q = begin; q < end; ++q)
      for (int64_t r = 0; r < R; ++r)
        for (int64_t d = q * kWidth; d < (q + 1) * kWidth; d += kLane)
          store(chunk.input + (q * R + r) * kWidth + d - q * kWidth, load_dims(rows + r * D, d, D));
  });
}

// z of some classes, for `depth` dims from d on. What lies `ahead` of the weight is fetched, a share with every panel.
template <int T, bool Add>
PYFUSED_INLINE void multiply_part(const Layer& layer, const Chunk& chunk, const Block& block, int64_t i, int64_t d,
                                  int64_t depth, const char* ahead) {
  const int64_t panels = chunk.padded() / kWidth, pitch = chunk.pitch, bytes = sizeof(float) * T / panels;
  const int64_t c = block.begin + i;
  for (int64_t p = 0; p < panels; ++p) {
    float* out = block.z + i * pitch + p * kWidth;
    auto finish = [&](int t, int h, V sum) __attribute__((always_inline)) {
      float* z = out + t * pitch + h * kLane;
      store(z, sum + (Add ? load(z) : layer.bias ? splat(layer.bias[c + t]) : V{}));
    };
    multiply_with<T, kWide, 3, kSoon>(layer.weight + c * layer.dims + d, layer.dims, 1,
                                      chunk.columns + (p * layer.dims + d) * kWidth, kLane, kWidth, depth, finish,
                                      ahead + p * depth * bytes, bytes);
  }
}

// A part of the dims after the other, so that its part of the rows stays in the L2 cache while the block's classes pass.
// What is fetched ahead is the next tile's weights, or, where they come in parts, a share of the next block's.
void multiply_logits(const Layer& layer, const Chunk& chunk, const Block& block) {
  const int64_t D = layer.dims, part = layer.part();
  for (int64_t d = 0; d < D; d += part)
    in_tiles(block.classes(), [&](int64_t i, auto count) {
      constexpr int T = count.value;
      const int64_t depth = min(part, D - d);
      const float* next = D > part ? layer.weight + block.end * D + block.classes() * d + i * depth
                                   : layer.weight + (block.begin + i + T) * D;
      const auto* ahead = reinterpret_cast<const char*>(next);
      d ? multiply_part<T, true>(layer, chunk, block, i, d, depth, ahead)
        : multiply_part<T, false>(layer, chunk, block, i, d, depth, ahead);
    });
}

// d_input += gᵀ · weight, a part of the dims after the other: its weights are packed as [panel of dims][class][kWidth].
void add_d_input(const Layer& layer, const Chunk& chunk, const Block& block, float* packed, float* d_input) {
  const int64_t D = layer.dims, depth = block.classes(), part = layer.part(), row = layer.d_input_row();
  const int64_t share = ceil_div(depth, ceil_div(chunk.rows, kTile));
  for (int64_t begin = 0; begin < D; begin += part) {
    const int64_t end = min(begin + part, round_up(D, kWidth));
    for (int64_t c = 0; c < depth; ++c)
      for (int64_t d = begin; d < end; d += kLane)
        store(packed + ((d - begin) / kWidth * depth + c) * kWidth + d % kWidth,
              load_dims(layer.weight + (block.begin + c) * D, d, D));
    in_tiles(chunk.rows, [&](int64_t r, auto count) {
      constexpr int T = count.value;
      for (int64_t d = begin; d < end; d += kWidth) {
        float* out = d_input + r * row + d;
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t)
          for (int64_t line = 0; line < kWidth; line += 16) __builtin_prefetch(out + t * row + kWidth + line, 1);
        auto finish = [&](int t, int h, V sum) __attribute__((always_inline)) {
          float* p = out + t * row + h * kLane;
          store(p, load(p) + sum);
        };
        // Of the weights that are packed next, a share.
        const float* ahead =
            (end < D ? layer.weight + block.begin * D + d + part : layer.weight + block.end * D + d - begin) +
            r / kTile * share * D;
        for (int64_t c = 0; c < share; ++c, ahead += D)
          for (int64_t line = 0; line < kWidth; line += 16) __builtin_prefetch(ahead + line, 0, 2);
        multiply_with<T, kWide, 0, kSoon>(block.z + r, 1, chunk.pitch, packed + (d - begin) * depth, kLane, kWidth,
                                          depth, finish);
      }
    });
  }
}

// The chunk's rows of d_input, from the threads' parts, which lie `partial` apart.
void sum_d_input(const Layer& layer, const Chunk& chunk, const float* partials, int64_t partial, int threads,
                 float* d_input) {
  const int64_t D = layer.dims;
  parallel_for(chunk.rows, 16, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t d = 0; d < D; d += kLane) {
        V total = {};
        for (int t = 0; t < threads; ++t) total += load(partials + t * partial + r * layer.d_input_row() + d);
        store_first(d_input + r * D + d, total, min<int64_t>(D - d, kLane));
      }
  });
}

// The block's rows of d_weight (+)= g · input, a part of the dims after the other.
template <bool Add>
void add_d_weight(const Layer& layer, const Chunk& chunk, const Block& block) {
  const int64_t D = layer.dims, R = chunk.rows, part = layer.part();
  for (int64_t begin = 0; begin < D; begin += part)
    in_tiles(block.classes(), [&](int64_t i, auto count) {
      constexpr int T = count.value;
      const float* g = block.z + i * chunk.pitch;
      float* out = layer.d_weight + (block.begin + i) * D;
      for (int64_t d = begin; d < min(begin + part, D); d += kWidth) {
        if constexpr (Add)
#pragma GCC unroll 12
          for (int t = 0; t < T; ++t)
            for (int64_t line = 0; line < kWidth; line += 16) __builtin_prefetch(out + t * D + d + kWidth + line, 1);
        auto finish = [&](int t, int h, V sum) __attribute__((always_inline)) {
          const int64_t at = d + h * kLane;
          float* p = out + t * D + at;
          if (D - d >= kWidth)
            store(p, Add ? load(p) + sum : sum);
          else if (at < D)
            store_first(p, Add ? load_dims(out + t * D, at, D) + sum : sum, min<int64_t>(D - at, kLane));
        };
        multiply_with<T, kWide, 0, kSoon>(g, chunk.pitch, 1, chunk.input + d * R, kLane, kWidth, R, finish);
      }
    });
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
