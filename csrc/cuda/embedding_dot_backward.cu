// Embedding dot product, backward for one of its two tables (`ids` index it, `other_ids` the other one) and its bias.
//
//   weight_grad[r] = ∑ grad[p] · other_weight[other_ids[p]]  over the scores p whose id is r;  bias_grad[r] = ∑ grad[p]
//
// Steps   `keys` turns ids into sort keys; the caller sorts them, stably; `sum_tiles` and `sum_open_runs` add each run
//         of equal keys and write its sum to its row.
// Tiles   kTerms terms, by key, to a group of 4 to 32 lanes that share a row, 64 to 8 groups to a block, up to 128 (f32)
//         columns a block, more columns in blockIdx.y. A run within one group is written by it. A longer one belongs to
//         the group where it begins: that adds, in order, what the following groups of the block have left in shared
//         memory, and, where the run goes on, leaves the sum to the second stage, in which one block per such run adds
//         what whole blocks have left. One id n times: n / 512 sums for the second stage (D = 64, f32), 32 at a time.
// Traffic n rows of D numbers, n gradients, 24 n bytes of keys, positions and other ids read per 128 columns; every row
//         that occurs written once, dense gradients after filling the table with zeros; 2·n·D flops: bound by memory.
//         B = 65,536 pairs, D = 64, float32, uniform over 1e6 rows: 34 MB sparse, 290 MB dense, 8 and 67 us at the
//         4.3 TB/s that an H200 copies; the sort not counted. Not measured.
// Sums    in float (double for double), in an order that depends on the ids, D and alignment alone; no atomics.
// Edges   no gradient goes to or comes from an id outside its table (the forward has reported it), nor to `padding`;
//         nothing is read for them.
#include "cuda/embedding_dot.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kTerms = 16;      // of one group in the first stage
constexpr int kLeastLanes = 4;  // as in lanes_for: bounds the terms of a block
constexpr int kMostTerms = kBlock / kLeastLanes * kTerms;

// The row that gets the gradient; `rows` for ids without a row and for padding: sorted last.
template <class K>
__global__ void __launch_bounds__(kBlock) make_keys(K* keys, Ids ids, int64_t count, int64_t rows, int64_t padding) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  const int64_t id = ids[i];
  keys[i] = static_cast<K>(id < 0 || id >= rows || id == padding ? rows : id);
}

template <class T>
struct Runs {
  using C = compute_t<T>;
  T *weight, *bias;    // [rows or runs, D] and [rows or runs]; may be null
  int64_t* occurring;  // null: dense gradients
  C *tails, *heads;    // [blocks, D + 1]: what a block leaves of the run that goes on, and that came in
  Ids keys;
  const int64_t *order, *ranks;  // ranks: of the run, from 1; null where dense
  const T* grad;
  Ids other_ids;
  Table<T> other;
  int64_t terms, per_key, per_other, rows;
  int lanes, dim;  // 0 columns without weight

  __device__ __forceinline__ int64_t key(int64_t term) const {  // `rows` past the last, -1 before the first
    return term < 0 ? -1 : term < terms ? keys[term / per_key] : rows;
  }
  __device__ __forceinline__ int64_t tile() const { return int64_t(kBlock / lanes) * kTerms; }
};

// The kWidth<T> numbers of a row that one thread adds: adjacent, or `lanes` apart where rows are not 16-byte blocks.
template <class T, bool VECTORS>
struct Slice {
  using C = compute_t<T>;
  static constexpr int N = kWidth<T>;
  int first, step, dim;
  __device__ Slice(const Runs<T>& p)
      : first(int(blockIdx.y) * p.lanes * N + int(threadIdx.x % p.lanes) * (VECTORS ? N : 1)),
        step(VECTORS ? 1 : p.lanes),
        dim(p.dim) {}
  __device__ __forceinline__ void load(T (&x)[N], const T* row) const {
    if (VECTORS) {
      if (first >= dim) return;
      const uint4 word = *reinterpret_cast<const uint4*>(row + first);
      memcpy(x, &word, sizeof word);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + i * step < dim) x[i] = row[first + i * step];
    }
  }
  template <class Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first + i * step < dim) visit(i, first + i * step);
  }
  // out: one row of weight_grad
  __device__ __forceinline__ void write(T* out, const C (&sum)[N]) const {
    if (VECTORS) {
      if (first < dim) store(out + first, sum, true);
    } else {
      each([&](int i, int column) { out[column] = from_compute<T>(sum[i]); });
    }
  }
};

template <class T, bool VECTORS, class C = compute_t<T>>
__device__ __forceinline__ void write_row(const Runs<T>& p, const Slice<T, VECTORS>& slice, int64_t key, int64_t term,
                                          const C (&sum)[kWidth<T>], C bias) {
  if (key >= p.rows) return;
  const int64_t to = p.occurring ? p.ranks[term / p.per_key] - 1 : key;
  if (p.weight) slice.write(p.weight + to * p.dim, sum);
  if (blockIdx.y == 0 && threadIdx.x % p.lanes == 0) {
    if (p.bias) p.bias[to] = from_compute<T>(bias);
    if (p.occurring) p.occurring[to] = key;
  }
}
template <class T, bool VECTORS, class C = compute_t<T>>
__device__ __forceinline__ void leave(const Runs<T>& p, const Slice<T, VECTORS>& slice, C* to,
                                      const C (&sum)[kWidth<T>], C bias) {
  slice.each([&](int i, int column) { to[column] = sum[i]; });
  if (blockIdx.y == 0 && threadIdx.x % p.lanes == 0) to[p.dim] = bias;
}

template <class T, bool VECTORS, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock) sum_tiles(Runs<T> p) {
  constexpr int N = kWidth<T>, depth = 3;
  __shared__ int64_t key_of[kMostTerms], other_of[kMostTerms];  // other_of: -1 for a term that gives nothing
  __shared__ C grad_of[kMostTerms], heads[N][kBlock], head_bias[kBlock];
  const int64_t begin = blockIdx.x * p.tile();
  const int tile = static_cast<int>(p.tile()), group = threadIdx.x / p.lanes, groups = kBlock / p.lanes;
  for (int i = threadIdx.x; i < tile; i += kBlock) {
    const int64_t term = begin + i, key = p.key(term);
    int64_t other = -1;
    C grad = 0;
    if (key < p.rows) {
      const int64_t at = term / p.per_key, score = p.order[at] * p.per_key + (term - at * p.per_key);
      other = p.other_ids[score / p.per_other];
      if (!p.other.has(other)) other = -1;
      if (other >= 0) grad = to_compute(p.grad[score]);
    }
    key_of[i] = key, other_of[i] = other, grad_of[i] = grad;
  }
  const int64_t before_block = p.key(begin - 1), after_block = p.key(begin + tile);
  __syncthreads();

  const Slice<T, VECTORS> slice(p);
  const int first = group * kTerms;
  T ahead[depth][N];
  auto fetch = [&](T(&x)[N], int i) {
    if (i < first + kTerms && other_of[i] >= 0) slice.load(x, p.other.row(other_of[i]));
  };
#pragma unroll
  for (int k = 0; k < depth; ++k) fetch(ahead[k], first + k);
  bool came_in = (group ? key_of[first - 1] : before_block) == key_of[first], open = false;
  C sum[N] = {}, bias = 0;
#pragma unroll 1
  for (int i = first; i < first + kTerms; ++i) {
    const int64_t key = key_of[i];
    if (other_of[i] >= 0) {
      slice.each([&](int j, int) { sum[j] += grad_of[i] * to_compute(ahead[0][j]); });
      bias += grad_of[i];
    }
#pragma unroll
    for (int k = 1; k < depth; ++k) memcpy(ahead[k - 1], ahead[k], sizeof ahead[k]);
    fetch(ahead[depth - 1], i + depth);
    const bool goes_on = (i + 1 < tile ? key_of[i + 1] : after_block) == key, last = i + 1 == first + kTerms;
    if (goes_on && !last) continue;
    if (came_in) {
#pragma unroll
      for (int j = 0; j < N; ++j) heads[j][threadIdx.x] = sum[j];
      head_bias[threadIdx.x] = bias;
    } else if (goes_on) {
      open = true;
      continue;  // it is the last
    } else {
      write_row(p, slice, key, begin + i, sum, bias);
    }
    came_in = false;
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = 0;
    bias = 0;
  }
  __syncthreads();

  // Adds what the groups from `g` on have left of a run; true if it goes on after the block.
  auto add_heads = [&](int g, int64_t key) {
    for (; g < groups && key_of[g * kTerms] == key; ++g) {
      const int from = g * p.lanes + threadIdx.x % p.lanes;
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += heads[j][from];
      bias += head_bias[from];
    }
    return g == groups && after_block == key;
  };
  const int64_t row = int64_t(blockIdx.x) * (p.dim + 1);
  if (open) {
    const int64_t key = key_of[first + kTerms - 1];
    if (add_heads(group + 1, key))
      leave(p, slice, p.tails + row, sum, bias);
    else
      write_row(p, slice, key, begin + first + kTerms - 1, sum, bias);
  }
  if (group == 0 && before_block == key_of[0]) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = 0;
    bias = 0;
    add_heads(0, key_of[0]);
    leave(p, slice, p.heads + row, sum, bias);
  }
}

// Block b finishes the run that begins in the first stage's block b and goes on after it, if there is one.
template <class T, bool VECTORS, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock) sum_open_runs(Runs<T> p) {
  constexpr int N = kWidth<T>;
  __shared__ C sums[N][kBlock], sum_bias[kBlock];
  const int64_t tile = p.tile(), b = blockIdx.x, blocks = gridDim.x, begin = b * tile, key = p.key(begin + tile - 1);
  if (key >= p.rows || p.key(begin + tile) != key || p.key(begin - 1) == key) return;  // the whole block
  int64_t in = 1, out = 2;  // block b + in has the key first, b + out has not: doubling, then bisection
  while (b + out < blocks && p.key((b + out) * tile) == key) in = out, out *= 2;
  out = min(out, blocks - b);
  while (out - in > 1) {
    const int64_t middle = (in + out) / 2;
    (p.key((b + middle) * tile) == key ? in : out) = middle;
  }
  const Slice<T, VECTORS> slice(p);
  const int group = threadIdx.x / p.lanes, groups = kBlock / p.lanes;
  C sum[N] = {}, bias = 0;
  auto add = [&](const C* from) {
    slice.each([&](int i, int column) { sum[i] += from[column]; });
    if (blockIdx.y == 0) bias += from[p.dim];
  };
  if (group == 0) add(p.tails + b * (p.dim + 1));
#pragma unroll 4
  for (int64_t i = 1 + group; i <= in; i += groups) add(p.heads + (b + i) * (p.dim + 1));
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j][threadIdx.x] = sum[j];
  sum_bias[threadIdx.x] = bias;
  __syncthreads();
  if (group != 0) return;
  for (int g = 1; g < groups; ++g) {
    const int from = g * p.lanes + threadIdx.x;
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += sums[j][from];
    bias += sum_bias[from];
  }
  write_row(p, slice, key, begin + tile - 1, sum, bias);
}

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
  PYFUSED_REQUIRE(are_ids(keys), "keys", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(order.dtype == DType::i64 && is_packed(order) && order.numel() == keys.numel(), "order",
                  "must be contiguous int64, one per key");
  PYFUSED_REQUIRE(are_ids(other_ids), "other_ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(is_table(other_weight), "other_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_packed(grad) && grad.dtype == other_weight.dtype, "grad",
                  "must be contiguous, of the tables' dtype");
  const int64_t scores = grad.numel(), entries = keys.numel(), others = other_ids.numel();
  const int64_t dim = other_weight.shape[1], slots = occurring ? occurring.numel() : rows;
  PYFUSED_REQUIRE(scores == 0 || (entries > 0 && others > 0 && scores % entries == 0 && scores % others == 0), "grad",
                  "must fit the ids");
  PYFUSED_REQUIRE(
      !weight_grad || (is_packed(weight_grad) && weight_grad.dtype == grad.dtype && weight_grad.numel() == slots * dim),
      "weight_grad", "must be contiguous [rows, D]");
  PYFUSED_REQUIRE(!bias_grad || (is_packed(bias_grad) && bias_grad.dtype == grad.dtype && bias_grad.numel() == slots),
                  "bias_grad", "must be contiguous [rows]");
  PYFUSED_REQUIRE(bool(occurring) == bool(ranks) &&
                      (!occurring || (occurring.dtype == DType::i64 && ranks.dtype == DType::i64 &&
                                      is_packed(occurring) && is_packed(ranks) && ranks.numel() == entries)),
                  "ranks", "must be int64, one per key, with occurring");
  return for_dtype(grad.dtype, [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    if (!occurring) {
      PYFUSED_TRY(fill_zeros(weight_grad, sizeof(T), stream));
      PYFUSED_TRY(fill_zeros(bias_grad, sizeof(T), stream));
    }
    if (scores == 0) return Status{};
    Runs<T> p = {weight_grad ? weight_grad.as<T>() : nullptr,
                 bias_grad ? bias_grad.as<T>() : nullptr,
                 occurring ? occurring.as<int64_t>() : nullptr,
                 nullptr,
                 nullptr,
                 Ids(keys),
                 order.as<int64_t>(),
                 ranks ? ranks.as<int64_t>() : nullptr,
                 grad.as<T>(),
                 Ids(other_ids),
                 Table<T>(other_weight),
                 scores,
                 scores / entries,
                 scores / others,
                 rows,
                 0,
                 weight_grad ? static_cast<int>(dim) : 0};
    p.lanes = lanes_for(p.dim, kWidth<T>, 32);
    const int64_t blocks = ceil_div(scores, int64_t(kBlock / p.lanes) * kTerms), left = blocks * (p.dim + 1);
    const int64_t slices = p.dim ? ceil_div(p.dim, p.lanes * kWidth<T>) : 1;
    PYFUSED_REQUIRE(blocks <= INT32_MAX && slices <= 65535, "grad", "is too large");
    PYFUSED_REQUIRE(workspace.dtype == (sizeof(C) == 8 ? DType::f64 : DType::f32) && workspace.contiguous() &&
                        workspace.numel() >= 2 * left,
                    "workspace", "must hold 2 rows of D + 1 numbers per block");
    p.tails = workspace.as<C>();
    p.heads = p.tails + left;
    const bool vectors = p.other.whole_vectors() && (!p.weight || is_aligned(p.weight));
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slices));
    PYFUSED_TRY(launch(vectors ? sum_tiles<T, true> : sum_tiles<T, false>, grid, kBlock, 0, stream, p));
    if (blocks == 1) return Status{};
    return launch(vectors ? sum_open_runs<T, true> : sum_open_runs<T, false>, grid, kBlock, 0, stream, p);
  });
}

}  // namespace cuda
}  // namespace pyfused
