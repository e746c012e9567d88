// What both directions of the in-batch softmax stand on: 64 x 64 scores at a time, on tensor cores, in registers.
//
// A block of 4 warps has 64 rows of one side of the pairs, its own, in shared memory and walks over tiles of 64 rows of
// the other side, in two buffers: cp.async fills one while the other is multiplied. A warp has 16 own rows against all
// 64 others, so that a row of its scores lies in 4 lanes: lane l has rows l / 4 and l / 4 + 8 and of every 8 columns
// l % 4 * 2 and the next, which is also how a tensor core takes them as its left operand. float is multiplied as TF32.
//   rows   [B, W] of the user, or the item, of each pair, gathered; W sizeof(T) = 64 panels bytes, zeros beyond D
//   grid   (tiles of own rows, splits): the splits share the other side's tiles, and each leaves a part of the result
#pragma once
#include "cuda/embedding_dot.cuh"
#include "cuda/tensor_cores.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kTile = 64, kThreads = 128;
constexpr int kPanel = kTile * kChunks * 16;  // bytes
constexpr int kMostPanels = 8;  // 3 x 8 panels: 96 KB of shared memory, which all architectures from 80 on have

using Scores = float[kTile / 8][4];  // of a thread: [i][j] in row_of(j), column_of(i, j) of its warp's 16 x 64

__device__ __forceinline__ int row_of(int j) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + j / 2 * 8; }
__device__ __forceinline__ int column_of(int i, int j) { return i * 8 + threadIdx.x % 4 * 2 + j % 2; }

template <class T>
struct Pairs {
  const T *own, *other;
  Ids item;
  int count, panels;
  int share;  // tiles of the other side to a block
  float scale;
  bool masked;  // accidental hits

  __device__ __forceinline__ uint32_t id(int i) const { return static_cast<uint32_t>(i < count ? item[i] : 0); }
};

// Calls visit(i, j) for each of a thread's scores.
template <class Visit>
__device__ __forceinline__ void for_each_score(const Visit& visit) {
#pragma unroll
  for (int i = 0; i < kTile / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) visit(i, j);
}

template <class T>
__device__ __forceinline__ void copy_tile(unsigned char* to, const T* rows, int first, const Pairs<T>& p) {
#pragma unroll 1
  for (int panel = 0; panel < p.panels; ++panel, to += kPanel)
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool valid = first + row < p.count;
      const int64_t at = int64_t(valid ? first + row : 0) * p.panels + panel;
      copy_async<16>(to + row_chunk(row, chunk), rows + (at * kChunks + chunk) * kWidth<T>, valid);
    }
}

// Calls compute(tile, other, buffer) for each of the block's tiles, whose rows then lie in `other`. Before that, in a
// thread for each of those rows, keep(buffer, i, ask(row)); ask reads memory, keep waits for it and writes what compute
// needs, one tile later.
template <class T, class Ask, class Keep, class Compute>
__device__ __forceinline__ void for_each_tile(const Pairs<T>& p, unsigned char* shared, const Ask& ask,
                                              const Keep& keep, const Compute& compute) {
  const int begin = blockIdx.y * p.share, end = min(begin + p.share, (p.count + kTile - 1) / kTile);
  if (begin >= end) return;
  auto buffer = [&](int tile) { return (tile - begin) % 2; };
  auto rows = [&](int tile) { return shared + (1 + buffer(tile)) * p.panels * kPanel; };
  auto row_in = [&](int tile) { return tile * kTile + static_cast<int>(threadIdx.x); };
  copy_tile(shared, p.own, blockIdx.x * kTile, p);
  copy_tile(rows(begin), p.other, begin * kTile, p);
  copy_async_commit();
  if (threadIdx.x < kTile) keep(0, threadIdx.x, ask(row_in(begin)));
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // also: all threads have done with the buffer that is filled next
    const bool more = tile + 1 < end, asks = more && threadIdx.x < kTile;
    if (more) copy_tile(rows(tile + 1), p.other, (tile + 1) * kTile, p);
    copy_async_commit();
    decltype(ask(0)) answer{};
    if (asks) answer = ask(row_in(tile + 1));
    compute(tile, rows(tile), buffer(tile));
    if (asks) keep(buffer(tile + 1), threadIdx.x, answer);
  }
}

// The products of the warp's own rows with the others.
template <class T>
__device__ __forceinline__ void multiply_rows(Scores& s, const unsigned char* own, const unsigned char* other,
                                              int panels) {
  for_each_score([&](int i, int j) { s[i][j] = 0; });
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel, own += kPanel, other += kPanel) {
#pragma unroll
    for (int step = 0; step < kChunks; step += 2) {
      uint32_t words[4];
      Fragment<false, 4> left;
      load_rows<T, false>(words, own, step, threadIdx.x / 32 * 16);
#pragma unroll
      for (int r = 0; r < 4; ++r) left.template set<T>(r, words[r]);
#pragma unroll
      for (int i = 0; i < kTile / 8; i += 2) {
        Fragment<false, 2> right[2];
        load_rows<T, true>(words, other, step, i * 8);
#pragma unroll
        for (int r = 0; r < 4; ++r) right[r / 2].template set<T>(r % 2, words[r]);
        multiply<T, false>(s[i], left, right[0]);
        multiply<T, false>(s[i + 1], left, right[1]);
      }
    }
  }
}

// The kernels' own check of what they are given.
inline Status check(const View& rows, const View& items, const View& offset, const View& item) {
  PYFUSED_REQUIRE(rows.ndim == 2 && rows.contiguous() && rows.shape[0] < INT32_MAX - 2 * kTile, "rows",
                  "must be contiguous [B, W], with fewer than 2^31 - 129 pairs");
  const int64_t bytes = rows.shape[1] * (rows.dtype == DType::f32 ? 4 : 2);
  PYFUSED_REQUIRE(bytes > 0 && bytes % 64 == 0 && bytes <= kMostPanels * 64, "rows",
                  "must have 64 to 512 bytes, in 64s");
  PYFUSED_REQUIRE(items.ndim == 2 && items.contiguous() && items.dtype == rows.dtype &&
                      items.shape[0] == rows.shape[0] && items.shape[1] == rows.shape[1],
                  "items", "must be like rows");
  PYFUSED_REQUIRE(!offset || (offset.contiguous() && offset.dtype == DType::f32 && offset.numel() == rows.shape[0]),
                  "offset", "must be one contiguous float32 number per pair");
  PYFUSED_REQUIRE(item.ndim == 1 && are_ids(item) && item.shape[0] == rows.shape[0], "item",
                  "must be a contiguous vector of int32 or int64, one per pair");
  return {};
}

// Calls run(T{}) with the type of the rows.
template <class Run>
Status for_rows(DType dtype, const Run& run) {
  return for_dtype(dtype, [&](auto type) -> Status {
    if constexpr (std::is_same_v<decltype(type), double>)
      return invalid("rows", "must be float32, bfloat16 or float16");
    else
      return run(type);
  });
}

template <class T>
Pairs<T> pairs_of(const View& own, const View& other, const View& item, int64_t splits, double scale, bool masked) {
  const int count = static_cast<int>(own.shape[0]), panels = static_cast<int>(own.shape[1] / kInner<T>);
  const int share = static_cast<int>(ceil_div(ceil_div(count, kTile), splits));
  return {own.as<T>(), other.as<T>(), Ids(item), count, panels, share, static_cast<float>(scale), masked};
}

template <class T>
size_t shared_bytes(const Pairs<T>& p) {
  return size_t(3) * p.panels * kPanel;
}

}  // namespace
}  // namespace cuda
}  // namespace pyfused
