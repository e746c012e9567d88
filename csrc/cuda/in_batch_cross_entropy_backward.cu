// In-batch softmax cross-entropy, backward: the scores again, tile by tile, and from each tile its part of the gradients
// of one side's rows. A launch for the users' rows and one for the items'; no atomics.
//
//   d[b, c] = exp(score[b, c] - m_b) / S_b,  0 at accidental hits,  d[b, b] = x_b = p_b - 1  (saved by the forward)
//   users   d_u_b = g_b ∑_c d[b, c] v_c, by scale · u_b
//   items   d_v_c = scale ∑_b g_b d[b, c] u_b,   d_offset_c = ∑_b g_b d[b, c]
//
// Tiles   as forward; by_item the items are a block's own rows and the users the others. A row's gradient stays in the
//         registers of 4 lanes, a quarter of W each. d goes from accumulators into the left operand of the second
//         product without passing through memory: in 16 bits the layouts agree; float takes the 8 columns in the order
//         0 2 4 6 1 3 5 7 from both operands.
// Rounding  d is rounded to T (float: to TF32) before it multiplies rows, as eager rounds it; sums are in float. float16:
//         d, at most 1, times 2^14, so that 4e-9 is still a normal number; upstream gradients relative to `most`.
// Flops   4 B² W and B² exp a launch: 8192 pairs of 64 bfloat16 numbers 34 Gflop in all, 35 us at an H100's 989 Tflop/s,
//         70 us by what shared memory feeds (see the forward). Not measured.
// Traffic as forward, twice; writes 4 B D bytes for every split, which are then added up.
// Edges   as forward. An upstream gradient that is NaN or infinite reaches every item, but only its own user.
#include "cuda/in_batch_cross_entropy.cuh"

namespace pyfused {
namespace cuda {
namespace {

template <class T>
constexpr float kUnit = std::is_same_v<T, __half> ? 16384.0f : 1.0f;

// Blocks of a gradient of so many panels that a multiprocessor's registers shall hold: 128, 168 or 255 a thread.
template <int PANELS>
constexpr int kAtOnce = PANELS == 2   ? 4
                        : PANELS == 4 ? 3
                                      : 2;

struct Side {  // of a user: m, S and the upstream gradient; of an item: the offset, 1 and nothing
  float shift, sum, grad;
  uint32_t id;
};

struct Slopes {
  const float *offset, *stats, *grad, *most;
  int count;
  bool by_item, per_row;  // grad has one number per pair

  // The numbers of pair i as they lie in memory; beyond the last, what makes its scores -inf.
  __device__ __forceinline__ Side ask(int i, bool user, uint32_t id) const {
    if (i >= count) return {user ? INFINITY : -INFINITY, 1.0f, 0.0f, id};
    if (user) return {stats[i], stats[count + i], upstream(i), id};
    return {offset ? offset[i] : 0.0f, 1.0f, 0.0f, id};
  }
  // d = exp(score + add) · factor, of both sides.
  __device__ __forceinline__ float add(Side x, bool user) const { return user ? -x.shift : x.shift; }
  __device__ __forceinline__ float factor(Side x, bool user) const {
    return (user && by_item ? relative(x.grad) : 1.0f) / x.sum;
  }
  __device__ __forceinline__ float at_own(int b) const {
    if (b >= count) return 0.0f;
    return -(by_item ? relative(upstream(b)) : 1.0f) / (1.0f + 1.0f / stats[2 * int64_t(count) + b]);  // p - 1
  }
  __device__ __forceinline__ float last(int b) const { return by_item ? *most : upstream(b); }
  __device__ __forceinline__ float upstream(int b) const { return grad[per_row ? b : 0]; }
  __device__ __forceinline__ float relative(float g) const { return *most == 0 ? 0.0f : g / *most; }
};

__device__ __forceinline__ uint32_t pair_of(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
__device__ __forceinline__ uint32_t pair_of(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// The left operand's fragment for the others' rows of one step, 16 or, of float, 8.
template <class T>
__device__ __forceinline__ Fragment<false, 4> left_of(const Scores& d, int step) {
  Fragment<false, 4> left;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    uint32_t word;
    if constexpr (sizeof(T) == 2)
      word = pair_of(d[2 * step + r / 2][r % 2 * 2], d[2 * step + r / 2][r % 2 * 2 + 1], T());
    else
      memcpy(&word, &d[step][r % 2 * 2 + r / 2], sizeof word);
    left.template set<T>(r, word);
  }
  return left;
}

// The right operand's fragments for 16 columns from one of a panel's chunks (float: two chunks) on.
template <class T>
__device__ __forceinline__ void load_inner_rows(uint32_t (&words)[4], const unsigned char* panel, int step, int chunk) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(words, panel + row_chunk(step * 16 + lane % 16, chunk + lane / 16));
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // conflicts: two lanes to a bank
      const int row = step * 8 + lane % 4 * 2 + r % 2, column = r / 2 * 8 + lane / 4;
      words[r] = *reinterpret_cast<const uint32_t*>(panel + row_chunk(row, chunk + column / 4) + column % 4 * 4);
    }
  }
}

template <class T, int PANELS>
using Gradients = float[PANELS * kInner<T> / 8][4];

// sums += d times the others' rows.
template <class T, int PANELS>
__device__ __forceinline__ void multiply_columns(Gradients<T, PANELS>& sums, const Scores& d,
                                                 const unsigned char* other, int panels) {
  constexpr int chunks = sizeof(T) == 2 ? 2 : 4;  // of 16 columns
#pragma unroll
  for (int step = 0; step < kTile / (sizeof(T) == 2 ? 16 : 8); ++step) {
    const Fragment<false, 4> left = left_of<T>(d, step);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      if (panel >= panels) continue;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += chunks) {
        uint32_t words[4];
        Fragment<false, 2> right[2];
        load_inner_rows<T>(words, other + panel * kPanel, step, chunk);
#pragma unroll
        for (int r = 0; r < 4; ++r) right[r / 2].template set<T>(r % 2, words[r]);
        const int at = (panel * kChunks + chunk) / chunks * 2;
        multiply<T, false>(sums[at], left, right[0]);
        multiply<T, false>(sums[at + 1], left, right[1]);
      }
    }
  }
}

// Writes this split's part: out [splits, B, dim] and, if not null, d_offset [splits, B].
template <class T, int PANELS>
__global__ void __launch_bounds__(kThreads, kAtOnce<PANELS>)
    gradient(Pairs<T> p, Slopes slopes, float* out, float* d_offset, int64_t dim) {
  PYFUSED_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ float add[2][kTile], factor[2][kTile];
  __shared__ uint32_t id[2][kTile];
  const int first = blockIdx.x * kTile;
  uint32_t own_id[2];
  float own_add[2], own_factor[2], at_own[2], sum[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + row_of(2 * h);
    const bool user = !slopes.by_item;
    const Side own = slopes.ask(row, user, p.id(row));
    own_id[h] = own.id, own_add[h] = slopes.add(own, user), own_factor[h] = slopes.factor(own, user) * kUnit<T>;
    at_own[h] = slopes.at_own(row) * kUnit<T>;
  }
  Gradients<T, PANELS> sums;
#pragma unroll
  for (auto& four : sums)
#pragma unroll
    for (float& x : four) x = 0;
  auto ask = [&](int row) { return slopes.ask(row, slopes.by_item, p.id(row)); };
  auto keep = [&](int buffer, int i, Side x) {
    add[buffer][i] = slopes.add(x, slopes.by_item);
    factor[buffer][i] = slopes.factor(x, slopes.by_item);
    id[buffer][i] = x.id;
  };
  for_each_tile(p, shared, ask, keep, [&](int tile, const unsigned char* others, int buffer) {
    Scores d;
    multiply_rows<T>(d, shared, others, p.panels);
    // The forward's order: what m, the largest of the scores, has lost by rounding is lost here, too.
    if (slopes.by_item)
      for_each_score(
          [&](int i, int j) { d[i][j] = d[i][j] * p.scale + own_add[j / 2] + add[buffer][column_of(i, j)]; });
    else
      for_each_score(
          [&](int i, int j) { d[i][j] = d[i][j] * p.scale + add[buffer][column_of(i, j)] + own_add[j / 2]; });
    for_each_score([&](int i, int j) {
      const int c = column_of(i, j), h = j / 2;
      d[i][j] = exp_of<T>(d[i][j]) * (own_factor[h] * factor[buffer][c]);
      if (p.masked && id[buffer][c] == own_id[h]) d[i][j] = 0;
    });
    const int left = p.count - tile * kTile;
    if (tile == blockIdx.x || left < kTile)
      for_each_score([&](int i, int j) {
        if (tile == blockIdx.x && column_of(i, j) == row_of(j)) d[i][j] = at_own[j / 2];
        if (column_of(i, j) >= left) d[i][j] = 0;  // also what infinity in the own row has made of zeros
      });
    for_each_score([&](int i, int j) { sum[j / 2] += d[i][j]; });
    multiply_columns<T, PANELS>(sums, d, others, p.panels);
  });
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + row_of(2 * h);
    const float total = group_sum(sum[h], 4);
    if (row >= p.count) continue;
    const float scale = slopes.last(row) / kUnit<T>, last = slopes.by_item ? scale * p.scale : scale;
    const int64_t at = int64_t(blockIdx.y) * p.count + row;
    if (d_offset && threadIdx.x % 4 == 0) d_offset[at] = total * scale;
#pragma unroll
    for (int i = 0; i < PANELS * kInner<T> / 8; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (column_of(i, j) < dim) out[at * dim + column_of(i, j)] = sums[i][h * 2 + j] * last;
  }
}

}  // namespace

// d_rows [splits, B, D], of the items if by_item, else of the users; d_offset [splits, B], by_item only, may be null;
// grad: one number or one per pair; most: the largest magnitude in it.
Status in_batch_cross_entropy_backward(View d_rows, View d_offset, View rows, View items, View offset, View item,
                                       View stats, View grad, View most, double scale, bool masked, bool by_item,
                                       Stream stream) {
  PYFUSED_TRY(check(rows, items, offset, item));
  const int64_t count = rows.shape[0];
  PYFUSED_REQUIRE(d_rows.ndim == 3 && d_rows.contiguous() && d_rows.dtype == DType::f32 && d_rows.shape[1] == count &&
                      d_rows.shape[0] > 0 && d_rows.shape[0] <= 65535 && d_rows.shape[2] <= rows.shape[1],
                  "d_rows", "must be contiguous float32 [splits, B, D]");
  const int64_t splits = d_rows.shape[0];
  PYFUSED_REQUIRE(!d_offset || (d_offset.contiguous() && d_offset.dtype == DType::f32 && by_item &&
                                d_offset.numel() == splits * count),
                  "d_offset", "must be contiguous float32 [splits, B], by item");
  PYFUSED_REQUIRE(stats.contiguous() && stats.dtype == DType::f32 && stats.numel() == 3 * count, "stats",
                  "must be contiguous float32 [3, B]");
  PYFUSED_REQUIRE(grad.contiguous() && grad.dtype == DType::f32 && (grad.ndim == 0 || grad.numel() == count), "grad",
                  "must be contiguous float32, one number or one per pair");
  PYFUSED_REQUIRE(most.dtype == DType::f32 && most.numel() == 1, "most", "must be one float32 number");
  return for_rows(rows.dtype, [&](auto type) {
    using T = decltype(type);
    const Pairs<T> p = pairs_of<T>(by_item ? items : rows, by_item ? rows : items, item, splits, scale, masked);
    const Slopes slopes = {offset ? offset.as<float>() : nullptr,
                           stats.as<float>(),
                           grad.as<float>(),
                           most.as<float>(),
                           p.count,
                           by_item,
                           grad.ndim == 1};
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kTile)), static_cast<unsigned>(splits));
    auto run = [&](auto kernel) {
      return launch(kernel, grid, kThreads, shared_bytes(p), stream, p, slopes, d_rows.as<float>(),
                    d_offset ? d_offset.as<float>() : nullptr, d_rows.shape[2]);
    };
    return p.panels <= 2 ? run(gradient<T, 2>) : p.panels <= 4 ? run(gradient<T, 4>) : run(gradient<T, 8>);
  });
}

}  // namespace cuda
}  // namespace pyfused
