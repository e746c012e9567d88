// Embedding dot product, backward for one of its two tables (`ids` index it, `other_ids` the other one) and its bias.
//
//   weight_grad[r] = ∑ grad[p] · other_weight[other_ids[p]]  over the scores p whose id is r;  bias_grad[r] = ∑ grad[p]
//
// Steps   `keys` turns ids into sort keys; the caller sorts them, stably; embedding_dot_runs.cuh adds each run of equal
//         keys, and its sum is written to its row.
// Traffic that of the sums; every row that occurs written once, dense gradients after filling the table with zeros.
//         Bound by memory. B = 65,536 pairs, D = 64, float32, uniform over 1e6 rows: 34 MB sparse, 290 MB dense, 8 and
//         67 us at the 4.3 TB/s that an H200 copies; the sort not counted. Not measured.
// Edges   ids outside the table and padding: embedding_dot_runs.cuh.
#include "cuda/embedding_dot_runs.cuh"

namespace pyfused {
namespace cuda {
namespace {

// The row that gets the gradient; `rows` for ids without a row and for padding: sorted last.
template <class K>
__global__ void __launch_bounds__(kBlock) make_keys(K* keys, Ids ids, int64_t count, int64_t rows, int64_t padding) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  const int64_t id = ids[i];
  keys[i] = static_cast<K>(id < 0 || id >= rows || id == padding ? rows : id);
}

// Writes the sums to their rows.
template <class T>
struct Store {
  using C = compute_t<T>;
  static constexpr int kBlocks = 2;
  T *weight, *bias;      // [rows or runs, D] and [rows or runs]; may be null
  int64_t* occurring;    // null: dense gradients
  const int64_t* ranks;  // of the run, from 1; null where dense
  template <class Slice>
  __device__ __forceinline__ void operator()(int64_t key, int64_t entry, const Slice& slice, const C (&sum)[kWidth<T>],
                                             C bias_sum) const {
    const int64_t to = occurring ? ranks[entry] - 1 : key;
    if (weight) slice.write(weight + to * slice.dim, sum);
    if (!slice.leads) return;
    if (bias) bias[to] = from_compute<T>(bias_sum);
    if (occurring) occurring[to] = key;
  }
};

Status fill_zeros(const View& out, size_t size, Stream stream) {
  if (!out || out.numel() == 0) return {};
  return status_of(cudaMemsetAsync(out.data, 0, out.numel() * size, stream));
}

}  // namespace

Status embedding_dot_keys(View keys, View ids, int64_t rows, int64_t padding, Stream stream) {
  PYFUSED_REQUIRE(are_ids(ids), "ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(are_ids(keys) && keys.numel() == ids.numel(), "keys", "must be contiguous, one per id");
  PYFUSED_REQUIRE(keys.dtype == DType::i64 || rows <= INT32_MAX, "keys", "must be int64 for so many rows");
  const int64_t count = ids.numel(), blocks = ceil_div(count, kBlock);
  PYFUSED_REQUIRE(blocks <= INT32_MAX, "ids", "are too many");
  const unsigned grid = static_cast<unsigned>(blocks);
  if (keys.dtype == DType::i64)
    return launch(make_keys<int64_t>, grid, kBlock, 0, stream, keys.as<int64_t>(), Ids(ids), count, rows, padding);
  return launch(make_keys<int32_t>, grid, kBlock, 0, stream, keys.as<int32_t>(), Ids(ids), count, rows, padding);
}

// keys: sorted; order: the position in ids of each. ranks: the number of its run, from 1, for sparse gradients, whose
// row i is then that of id occurring[i].
Status embedding_dot_backward(View weight_grad, View bias_grad, View occurring, View workspace, View grad, View keys,
                              View order, View ranks, View other_ids, View other_weight, int64_t rows, Stream stream) {
  PYFUSED_TRY(check_runs(grad, keys, order, other_ids, other_weight));
  const int64_t dim = other_weight.shape[1], slots = occurring ? occurring.numel() : rows;
  PYFUSED_REQUIRE(
      !weight_grad || (is_packed(weight_grad) && weight_grad.dtype == grad.dtype && weight_grad.numel() == slots * dim),
      "weight_grad", "must be contiguous [rows, D]");
  PYFUSED_REQUIRE(!bias_grad || (is_packed(bias_grad) && bias_grad.dtype == grad.dtype && bias_grad.numel() == slots),
                  "bias_grad", "must be contiguous [rows]");
  PYFUSED_REQUIRE(bool(occurring) == bool(ranks) &&
                      (!occurring || (occurring.dtype == DType::i64 && ranks.dtype == DType::i64 &&
                                      is_packed(occurring) && is_packed(ranks) && ranks.numel() == keys.numel())),
                  "ranks", "must be int64, one per key, with occurring");
  return for_dtype(grad.dtype, [&](auto type) {
    using T = decltype(type);
    if (!occurring) {
      PYFUSED_TRY(fill_zeros(weight_grad, sizeof(T), stream));
      PYFUSED_TRY(fill_zeros(bias_grad, sizeof(T), stream));
    }
    if (grad.numel() == 0) return Status{};
    const Store<T> sink = {weight_grad ? weight_grad.as<T>() : nullptr, bias_grad ? bias_grad.as<T>() : nullptr,
                           occurring ? occurring.as<int64_t>() : nullptr, ranks ? ranks.as<int64_t>() : nullptr};
    const Runs<T> p = runs_of<T>(grad, keys, order, other_ids, Table<T>(other_weight), rows, weight_grad ? dim : 0);
    return sum_runs(p, sink, !sink.weight || is_aligned(sink.weight), workspace, stream);
  });
}

}  // namespace cuda
}  // namespace pyfused
