// Two small kernels of the in-batch softmax: are its ids rows of their tables, and the accidental hits, masked in some
// rows of its score matrix [B, B].
//
//   bad = one of user is not in [0, users) or one of item not in [0, items)
//   scores[r, c] = -inf   where item[c] = item[first + r] and c ≠ first + r;   scores [R, B]: rows first to first + R - 1
//
// Tiles   ids: one block of 1024 threads, so that `bad` is written once. Hits: 256 columns by kRows rows to a block; a
//         thread keeps its column's id and compares it with the rows' ids, which the block reads through shared memory.
// Traffic ids: 2 B ids of 8 (4) bytes, B / 512 loads one after the other. Hits: R B / kRows ids, from cache; of the scores
//         only hits are written. R B comparisons: 8192 x 8192 about 10 us on an H200, of which the products that make the
//         scores take many times as much. Not measured.
// Edges   R or B = 0: nothing happens. What stood at a hit, NaN included, is gone.
#include "cuda/embedding_dot.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kRows = 64, kIdThreads = 1024;

__global__ void __launch_bounds__(kIdThreads, 1)
    check_ids(bool* bad, Ids user, Ids item, int64_t count, int64_t users, int64_t items, IndexError* index_error) {
  bool found = false;
  for (int64_t i = threadIdx.x; i < count; i += kIdThreads) {
    const int64_t u = user[i], v = item[i];
    const bool bad_user = u < 0 || u >= users, bad_item = v < 0 || v >= items;
    if (bad_user) report_out_of_range(index_error, Argument::user, i, u, users);
    if (bad_item) report_out_of_range(index_error, Argument::item, i, v, items);
    found = found || bad_user || bad_item;
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) *bad = found;
}

template <class C>
__global__ void __launch_bounds__(kBlock) mask(C* scores, Ids item, int64_t first, int64_t rows, int64_t columns) {
  __shared__ int64_t id_of[kRows];
  const int64_t c = int64_t(blockIdx.x) * kBlock + threadIdx.x, begin = int64_t(blockIdx.y) * kRows;
  const int count = static_cast<int>(min(int64_t(kRows), rows - begin));
  if (threadIdx.x < count) id_of[threadIdx.x] = item[first + begin + threadIdx.x];
  __syncthreads();
  if (c >= columns) return;
  const int64_t id = item[c];
#pragma unroll 8
  for (int i = 0; i < count; ++i)
    if (id_of[i] == id && first + begin + i != c) scores[(begin + i) * columns + c] = -C(INFINITY);
}

}  // namespace

// report: leave a note for check_errors.
Status in_batch_ids(View bad, View user, View item, int64_t users, int64_t items, bool report, Stream stream) {
  PYFUSED_REQUIRE(bad.dtype == DType::boolean && bad.numel() == 1, "bad", "must be one bool");
  PYFUSED_REQUIRE(are_ids(user) && user.ndim == 1, "user", "must be a contiguous vector of int32 or int64");
  PYFUSED_REQUIRE(are_ids(item) && item.ndim == 1 && item.shape[0] == user.shape[0], "item",
                  "must be a contiguous vector of int32 or int64, as long as user");
  return launch(check_ids, 1, kIdThreads, 0, stream, bad.as<bool>(), Ids(user), Ids(item), user.shape[0], users, items,
                report ? index_error() : nullptr);
}

Status mask_accidental_hits(View scores, View item, int64_t first, Stream stream) {
  PYFUSED_REQUIRE(scores.ndim == 2 && scores.contiguous(), "scores", "must be a contiguous matrix");
  PYFUSED_REQUIRE(scores.dtype == DType::f32 || scores.dtype == DType::f64, "scores", "must be float32 or float64");
  PYFUSED_REQUIRE(item.ndim == 1 && are_ids(item) && item.shape[0] == scores.shape[1], "item",
                  "must be one contiguous int32 or int64 id per column of scores");
  const int64_t rows = scores.shape[0], columns = scores.shape[1];
  PYFUSED_REQUIRE(first >= 0 && first + rows <= columns, "first", "must be a row of the full matrix");
  const int64_t across = ceil_div(columns, kBlock), down = ceil_div(rows, kRows);
  PYFUSED_REQUIRE(across <= INT32_MAX && down <= 65535, "scores", "has too many rows");
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  if (scores.dtype == DType::f32)
    return launch(mask<float>, grid, kBlock, 0, stream, scores.as<float>(), Ids(item), first, rows, columns);
  return launch(mask<double>, grid, kBlock, 0, stream, scores.as<double>(), Ids(item), first, rows, columns);
}

}  // namespace cuda
}  // namespace pyfused
