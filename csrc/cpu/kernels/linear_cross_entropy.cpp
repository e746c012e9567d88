// Cross-entropy of a linear layer, its loss and all gradients, a chunk of rows at a time: nothing N x V exists.
//
//   z = input · weightᵀ + bias                              loss[n] = lse[n] - z[n, target[n]],  lse[n] = log ∑_c e^z[n, c]
//   g[n, c] = upstream[n] ((1 + 2 z_loss lse[n]) p[n, c] - (c = target[n]) (1 - smoothing)),  p[n, c] = e^(z[n, c] - lse[n])
//   d_input = g · weight,  d_weight = gᵀ · input,  d_bias = ∑_n g
//
// N rows, D dims, V classes, float32; R rows to a chunk. Two passes over the classes for each chunk, a block at a time:
//   1  z of the block, the product in registers; over it, per row, m = max z and e^(z - m), whose sum is kept with m.
//   -  From all blocks' m and sums: lse, loss.
//   2  e^(z - m) times upstream (1 + ...) e^(m - lse) is g, with no second exponential; from g, while it and the block of
//      the weight lie in the L2 cache, the block's part of d_input and all that the chunk gives to its rows of d_weight.
// Tiles   g lies transposed, [V, R]: for z rows are lanes, so that neither maxima nor sums cross lanes, and the weight is
//         read where it lies, a broadcast number at a time; for the gradients the dims are lanes. The products are in the
//         header.
// Flops   6 N D V, the floor: 0.34 s at 1024 x 384 x 50257 on two cores of 175 GFLOP/s each; this takes 0.39 s. Three
//         products of a BLAS with chunks of as many rows take 0.43 s: it packs the weight anew for every chunk, twice.
// Traffic per chunk: weight twice, d_weight read and written, g written, read and written: 4 V (4 D + 3 R) bytes.
// Saves   stats: lse; 1; the odds against the label, see pyfused/ops/cross_entropy.py.
// Order   of sums: that of the blocks, which are dealt to threads by number: the same bits for the same number of threads.
//         With smoothing the loss is still that of the label, and what the other classes' share of it has for gradient, of
//         rank one, is the caller's to add.
// Edges   a target outside [0, V) is a row without a label: its loss is 0. Infinite or NaN logits (-inf from the bias
//         aside), and -inf at a label, give a loss or an lse that is not finite, and gradients that mean nothing.
#include "cpu/kernels/linear_cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/simd_math.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// --- Pass 1, after multiply_logits
// keep: pass 2 follows. A logit whose row and class share an id counts as -inf, but at the label.
template <bool keep>
void exponentials(const Chunk& chunk, const Block& block) {
  block.for_labels(chunk, [&](int64_t r, float& z) { chunk.label[r] = z, z = -kInfinity; });
  for (int64_t r = 0; r < chunk.padded(); r += kLane) {
    float *first = block.z + r, *end = first + block.classes() * chunk.pitch;
    V most = splat(-kInfinity), sum = {};
    if (chunk.row_ids) {
      VecI32 ids;
      std::memcpy(&ids, chunk.row_ids + r, sizeof ids);
      const int32_t* id = chunk.class_ids + block.begin;
      for (float* z = first; z < end; z += chunk.pitch) store(z, ids == *id++ ? splat(-kInfinity) : load(z));
    }
    for (float* z = first; z < end; z += chunk.pitch) most = max(most, load(z));
    V shift = most > -kInfinity ? most : V{};
    for (float* z = first; z < end; z += chunk.pitch) {
      V e = exp(load(z) - shift);
      if constexpr (keep) store(z, e);
      sum += e;
    }
    store(chunk.most + block.number * chunk.pitch + r, most);
    store(chunk.sum + block.number * chunk.pitch + r, sum);
  }
}

// --- Between the passes. Each row's softmax is own / (own + rest) at the label; all are relative to the largest logit.
void losses(const Layer& layer, const Chunk& chunk, const float* upstream, float smoothing, float z_loss, float* loss,
            float* stats, int64_t stat) {
  for (int64_t r = 0; r < chunk.padded(); r += kLane) {
    const V label = load(chunk.label + r);
    V most = label, rest = {};
    for (int64_t b = 0; b < layer.blocks(); ++b) most = max(most, load(chunk.most + b * chunk.pitch + r));
    for (int64_t b = 0; b < layer.blocks(); ++b)
      rest += load(chunk.sum + b * chunk.pitch + r) * exp(load(chunk.most + b * chunk.pitch + r) - most);
    const V own = exp(label - most), all = own + rest, log_all = log1p(all - 1.0f);
    // Where the label prevails, log1p keeps the digits of a small loss.
    const V value = own > rest ? log1p(rest / own) : most - label + log_all, lse = most + log_all;
    store(chunk.lse + r, lse);
    const int64_t n = min<int64_t>(kLane, chunk.rows - r);
    if (n <= 0) continue;
    const V g = load_first(upstream + r, n), of_lse = g * (2 * z_loss) * lse;
    store(chunk.factor + r, g + of_lse);
    store(chunk.entry + r, of_lse * (own / all) - g * (rest / all - smoothing));
    store_first(loss + r, value, n);
    store_first(stats + r, lse, n);
    store_first(stats + stat + r, splat(1.0f), n);
    store_first(stats + 2 * stat + r, rest / own, n);
    for (int64_t i = r; i < r + n; ++i)
      if (chunk.target[i] < 0 || chunk.target[i] >= layer.classes) loss[i] = stats[2 * stat + i] = 0;
  }
}

// --- Pass 2, before add_d_input and add_d_weight
// g, and its sums over the rows.
void multiply_factors(const Layer& layer, const Chunk& chunk, const Block& block, bool first, float* factors) {
  const int64_t padded = chunk.padded(), pitch = chunk.pitch;
  for (int64_t r = 0; r < padded; r += kLane)
    store(factors + r, load(chunk.factor + r) * exp(load(chunk.most + block.number * pitch + r) - load(chunk.lse + r)));
  for (int64_t i = 0; i < block.classes(); ++i) {
    float* z = block.z + i * pitch;
    V total = {};
    for (int64_t r = 0; r < padded; r += kLane) {
      V g = load(z + r) * load(factors + r);
      store(z + r, g);
      total += g;
    }
    if (layer.d_bias) layer.d_bias[block.begin + i] = reduce_add(total) + (first ? 0 : layer.d_bias[block.begin + i]);
  }
  block.for_labels(chunk, [&](int64_t r, float& g) {
    g = chunk.entry[r];
    if (layer.d_bias) layer.d_bias[chunk.target[r]] += g;
  });
}

// body(block, thread) for every block of classes. Without `logits` a thread has room for one block's.
template <class Body>
PYFUSED_INLINE void for_blocks(const Layer& layer, const Chunk& chunk, float* logits, int threads, const Body& body) {
  parallel_for(layer.blocks(), 1, threads, [&](int64_t begin, int64_t end, int thread) {
    auto* room = logits ? nullptr : static_cast<float*>(scratch(2, sizeof(float) * kBlock * chunk.pitch));
    for (int64_t b = begin; b < end; ++b)
      body(Block{b, b * kBlock, min((b + 1) * kBlock, layer.classes), room ? room : logits + b * kBlock * chunk.pitch},
           thread);
  });
}

bool is_matrix(const View& v, int64_t rows, int64_t columns) {
  return v.ndim == 2 && v.dtype == DType::f32 && v.contiguous() && v.shape[0] == rows && v.shape[1] == columns;
}
bool is_vector(const View& v, int64_t size, DType dtype = DType::f32) {
  return v.ndim == 1 && v.dtype == dtype && v.contiguous() && v.shape[0] == size;
}

}  // namespace

// logits: [V, R + kSkew], working memory; rows: R, those of a chunk. Without logits the loss alone is computed. row_ids [N]
// and class_ids [V]: both or neither.
Status linear_cross_entropy(View loss, View stats, View d_input, View d_weight, View d_bias, View logits, View input,
                            View weight, View bias, View target, View row_ids, View class_ids, View upstream,
                            double smoothing, double z_loss, int64_t rows, int threads) {
  PYFUSED_REQUIRE(input.ndim == 2 && weight.ndim == 2, "input", "and weight must be matrices");
  const int64_t N = input.shape[0], D = input.shape[1], classes = weight.shape[0], pitch = rows + kSkew;
  PYFUSED_REQUIRE(rows > 0 && rows % 32 == 0, "rows", "must be a multiple of 32");  // of kWidth, on every ISA
  PYFUSED_REQUIRE(D > 0 && is_matrix(input, N, D), "input", "must be contiguous float32 [N, D], D > 0");
  PYFUSED_REQUIRE(is_matrix(weight, classes, D), "weight", "must be contiguous float32 [V, D]");
  PYFUSED_REQUIRE(!bias || is_vector(bias, classes), "bias", "must be contiguous float32 [V]");
  PYFUSED_REQUIRE(!d_input || is_matrix(d_input, N, D), "d_input", "must be like input");
  PYFUSED_REQUIRE(!d_weight || is_matrix(d_weight, classes, D), "d_weight", "must be like weight");
  PYFUSED_REQUIRE(!d_bias || is_vector(d_bias, classes), "d_bias", "must be like bias");
  PYFUSED_REQUIRE(is_vector(loss, N) && is_matrix(stats, 3, N), "loss", "must be float32 [N], stats [3, N]");
  PYFUSED_REQUIRE(is_vector(upstream, N), "upstream", "must be contiguous float32 [N]");
  PYFUSED_REQUIRE(is_vector(target, N, DType::i64), "target", "must be contiguous int64 [N]");
  PYFUSED_REQUIRE(
      (!row_ids && !class_ids) || (is_vector(row_ids, N, DType::i32) && is_vector(class_ids, classes, DType::i32)),
      "row_ids", "must be contiguous int32 [N], and class_ids [V]");
  PYFUSED_REQUIRE(logits ? is_matrix(logits, classes, pitch) : !d_input && !d_weight && !d_bias, "logits",
                  "must be contiguous float32 [V, rows + 16], or no gradient wanted");

  const Layer layer{weight.as<float>(), bias.as<float>(), d_weight.as<float>(), d_bias.as<float>(), classes, D};
  auto* z = logits.as<float>();
  Chunk chunk{};
  chunk.pitch = pitch;
  chunk.class_ids = class_ids.as<int32_t>();
  const int64_t stat = layer.blocks() * pitch, partial = rows * layer.d_input_row();
  const struct {
    float** part;
    int64_t size;
  } parts[] = {{&chunk.columns, round_up(rows, kWidth) * D},
               {&chunk.input, layer.panels() * kWidth * rows},
               {&chunk.most, stat},
               {&chunk.sum, stat},
               {&chunk.label, pitch},
               {&chunk.lse, pitch},
               {&chunk.factor, pitch},
               {&chunk.entry, pitch}};
  int64_t size = pitch;  // of ids
  for (auto& p : parts) size += p.size;
  auto* memory = static_cast<float*>(scratch(0, sizeof(float) * size));
  auto* ids = reinterpret_cast<int32_t*>(memory);
  memory += pitch;
  for (auto& p : parts) *p.part = memory, memory += p.size;
  auto* partials = static_cast<float*>(scratch(1, sizeof(float) * (d_input ? threads * partial : 0)));

  for (int64_t n = 0; n < N; n += rows) {
    chunk.rows = min(rows, N - n);
    chunk.target = target.as<int64_t>() + n;
    arrange(layer, chunk, input.as<float>() + n * D, z != nullptr, threads);
    for (int64_t r = 0; r < pitch; ++r) chunk.label[r] = -kInfinity, chunk.factor[r] = 0, ids[r] = -1;
    if (row_ids) {
      std::memcpy(ids, row_ids.as<int32_t>() + n, sizeof(int32_t) * chunk.rows);
      chunk.row_ids = ids;
    }
    for_blocks(layer, chunk, z, threads, [&](const Block& b, int) {
      multiply_logits(layer, chunk, b);
      z ? exponentials<true>(chunk, b) : exponentials<false>(chunk, b);
    });
    losses(layer, chunk, upstream.as<float>() + n, static_cast<float>(smoothing), static_cast<float>(z_loss),
           loss.as<float>() + n, stats.as<float>() + n, N);
    if (!z) continue;
    if (d_input) std::memset(partials, 0, sizeof(float) * threads * partial);
    for_blocks(layer, chunk, z, threads, [&](const Block& b, int thread) {
      auto* factors = static_cast<float*>(scratch(2, sizeof(float) * (pitch + kBlock * layer.part())));
      multiply_factors(layer, chunk, b, n == 0, factors);
      if (d_input) add_d_input(layer, chunk, b, factors + pitch, partials + thread * partial);
      if (d_weight) n == 0 ? add_d_weight<false>(layer, chunk, b) : add_d_weight<true>(layer, chunk, b);
    });
    if (d_input) sum_d_input(layer, chunk, partials, partial, threads, d_input.as<float>() + n * D);
  }
  return {};
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
