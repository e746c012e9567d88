// In-batch softmax cross-entropy, forward: B x B scores on tensor cores, reduced as they are made and never stored.
//
//   score[b, c] = scale ⟨u_b, v_c⟩ + offset_c,   -inf where c ≠ b and item[c] = item[b] (if masked)
//   loss_b = log ∑_c exp(score[b, c]) - score[b, b]
//
// Tiles   64 users to a block, which walks over tiles of 64 items, see in_batch_cross_entropy.cuh. A second launch, a
//         thread to a user, combines the parts that the splits of the items leave.
// Online  Each thread keeps the maximum so far and ∑ exp(score - maximum) of its 16 scores a row and tile, rescaled
//         when the maximum grows; 4 lanes combine theirs at the end. ∑ leaves the pair's own score out, see
//         pyfused/ops/cross_entropy.py for what is saved and why.
// Flops   2 B² W; 8192 pairs of 64 bfloat16 numbers: 8.6 Gflop, 9 us at an H100's 989 Tflop/s, TF32 twice that. Every
//         warp reads the whole tile from shared memory, for 16 flops a byte: at 128 bytes a clock and multiprocessor 2048
//         flops a clock, half of an H100's peak and an A100's whole: 17 us. Besides B² exp and some 8 instructions a
//         score, 18 us of what an H100 issues.
// Traffic each block reads all items, B W sizeof(T) bytes, from the second-level cache: 134 MB, 24 us at 5.5 TB/s, which
//         bounds it. From memory 4 B W sizeof(T) bytes, the gathers included: 2 us. None of these has been measured.
// Saves   [m, S, o] of cross_entropy.cu.
// Sums    in float, in an order that depends on B, W and the splits alone.
// Edges   the last tiles' missing rows are zeros, their scores -inf. B = 1: no negatives, loss 0. NaN and ±inf as eager.
#include "cuda/in_batch_cross_entropy.cuh"

namespace pyfused {
namespace cuda {
namespace {

// Writes for each split the rows' maxima and their sums, and after those the rows' own scores: parts [2 splits + 1, B].
template <class T>
__global__ void __launch_bounds__(kThreads) forward(Pairs<T> p, const float* offset, float* parts) {
  PYFUSED_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ float add[2][kTile];
  __shared__ uint32_t id[2][kTile];
  const int first = blockIdx.x * kTile;
  const uint32_t own_id[2] = {p.id(first + row_of(0)), p.id(first + row_of(2))};
  float top[2] = {-INFINITY, -INFINITY}, others[2] = {0, 0};
  struct Answer {
    float add;
    uint32_t id;
  };
  auto ask = [&](int c) { return Answer{c >= p.count ? -INFINITY : offset ? offset[c] : 0.0f, p.id(c)}; };
  auto keep = [&](int buffer, int i, Answer x) { add[buffer][i] = x.add, id[buffer][i] = x.id; };
  for_each_tile(p, shared, ask, keep, [&](int tile, const unsigned char* items, int buffer) {
    Scores s;
    multiply_rows<T>(s, shared, items, p.panels);
    for_each_score([&](int i, int j) { s[i][j] = s[i][j] * p.scale + add[buffer][column_of(i, j)]; });
    if (tile == blockIdx.x)
      for_each_score([&](int i, int j) {
        if (column_of(i, j) != row_of(j)) return;
        if (first + row_of(j) < p.count) parts[2 * int64_t(gridDim.y) * p.count + first + row_of(j)] = s[i][j];
        s[i][j] = -INFINITY;
      });
    if (p.masked)
      for_each_score([&](int i, int j) {
        if (id[buffer][column_of(i, j)] == own_id[j / 2]) s[i][j] = -INFINITY;
      });
    float most[2] = {-INFINITY, -INFINITY}, base[2];
    for_each_score([&](int i, int j) { most[j / 2] = fmaxf(most[j / 2], s[i][j]); });  // ignores NaN
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (most[h] > top[h]) {
        others[h] *= exp_of<T>(top[h] - most[h]);
        top[h] = most[h];
      }
      base[h] = top[h] > -INFINITY ? top[h] : 0;  // nothing but -inf so far: exp(-inf) instead of exp(NaN)
    }
    for_each_score([&](int i, int j) { others[j / 2] += exp_of<T>(s[i][j] - base[j / 2]); });
  });
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float most = group_max(top[h], 4);
    const float sum = group_sum(top[h] > -INFINITY ? others[h] * exp_of<T>(top[h] - most) : others[h], 4);
    const int row = first + row_of(2 * h);
    if (threadIdx.x % 4 != 0 || row >= p.count) continue;
    parts[2 * int64_t(blockIdx.y) * p.count + row] = most;
    parts[(2 * int64_t(blockIdx.y) + 1) * p.count + row] = sum;
  }
}

__global__ void __launch_bounds__(kBlock)
    combine(float* loss, float* stats, const float* parts, int count, int splits) {
  const int64_t b = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (b >= count) return;
  const float own = parts[2 * int64_t(splits) * count + b];
  float top = fmaxf(own, -INFINITY), others = 0;
  for (int64_t i = 0; i < splits; ++i) top = fmaxf(top, parts[2 * i * count + b]);
  for (int64_t i = 0; i < splits; ++i) others += parts[(2 * i + 1) * count + b] * exp(parts[2 * i * count + b] - top);
  const float at_own = exp(own - top), all = others + at_own;
  // S - 1, which is exactly the sum of the others where the own score is the maximum
  loss[b] = top - own + log1p(others + (at_own - 1));
  stats[b] = top;
  stats[count + b] = all;
  stats[2 * int64_t(count) + b] = others / at_own;
}

}  // namespace

// loss [B], stats [3, B]; workspace [2 splits + 1, B], whose shape says how many blocks share the items.
Status in_batch_cross_entropy(View loss, View stats, View workspace, View rows, View items, View offset, View item,
                              double scale, bool masked, Stream stream) {
  PYFUSED_TRY(check(rows, items, offset, item));
  const int64_t count = rows.shape[0], splits = workspace.shape[0] / 2;
  PYFUSED_REQUIRE(loss.contiguous() && loss.dtype == DType::f32 && loss.numel() == count, "loss",
                  "must be one contiguous float32 number per pair");
  PYFUSED_REQUIRE(stats.contiguous() && stats.dtype == DType::f32 && stats.numel() == 3 * count, "stats",
                  "must be contiguous float32 [3, B]");
  PYFUSED_REQUIRE(workspace.contiguous() && workspace.dtype == DType::f32 && workspace.ndim == 2 && splits > 0 &&
                      splits <= 65535 && workspace.shape[0] % 2 == 1 && workspace.shape[1] == count,
                  "workspace", "must be contiguous float32 [2 splits + 1, B]");
  return for_rows(rows.dtype, [&](auto type) {
    using T = decltype(type);
    const Pairs<T> p = pairs_of<T>(rows, items, item, splits, scale, masked);
    float* const parts = workspace.as<float>();
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kTile)), static_cast<unsigned>(splits));
    PYFUSED_TRY(
        launch(forward<T>, grid, kThreads, shared_bytes(p), stream, p, offset ? offset.as<float>() : nullptr, parts));
    return launch(combine, static_cast<unsigned>(ceil_div(count, kBlock)), kBlock, 0, stream, loss.as<float>(),
                  stats.as<float>(), parts, p.count, static_cast<int>(splits));
  });
}

}  // namespace cuda
}  // namespace pyfused
