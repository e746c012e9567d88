// The sums of the gradients of embedding_dot by id, for kernels that store them (backward) or apply them (update).
//
//   weight sums[r] = ∑ grad[p] · other_weight[other_ids[p]]  over the scores p whose id is r;  bias sum[r] = ∑ grad[p]
//
// Steps   The caller makes keys (embedding_dot_keys) and sorts them, stably; `sum_tiles` and `sum_open_runs` add each run
//         of equal keys and give its sums to a sink:
//           sink(key, entry, slice, sum, bias)   entry: a place of the key in `keys`. All lanes of the group call it, each
//                                                with its slice of the sums; slice.leads: the one that has the bias.
//           Sink::kBlocks                        blocks that must fit a multiprocessor at a time; left to itself, nvcc 13
//                                                aims at 40 or 64 registers and spills.
// Tiles   kTerms terms, by key, to a group of 4 to 32 lanes that share a row, 64 to 8 groups to a block, up to 128 (f32)
//         columns a block, more columns in blockIdx.y. A run within one group is finished by it. A longer one belongs to
//         the group where it begins: that adds, in order, what the following groups of the block have left in shared
//         memory, and, where the run goes on, leaves the sum to the second stage, in which one block per such run adds
//         what whole blocks have left. One id n times: n / 512 sums for the second stage (D = 64, f32), 32 at a time.
// Traffic n rows of D numbers, n gradients, 24 n bytes of keys, positions and other ids per 128 columns; 2·n·D flops:
//         bound by memory. n = 65,536, D = 64, float32: 19 MB, 4.3 us at the 4.3 TB/s that an H200 copies. Not measured.
// Sums    in float (double for double), in an order that depends on the ids, D and alignment alone; no atomics.
// Edges   no gradient goes to or comes from an id outside its table (the forward has reported it), nor to padding;
//         nothing is read for them.
#pragma once
#include "cuda/embedding_dot.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kTerms = 16;      // of one group in the first stage
constexpr int kLeastLanes = 4;  // as in lanes_for: bounds the terms of a block
constexpr int kMostTerms = kBlock / kLeastLanes * kTerms;

template <class T>
struct Runs {
  using C = compute_t<T>;
  C *tails, *heads;  // [blocks, D + 1]: what a block leaves of the run that goes on, and that came in
  Ids keys;
  const int64_t* order;
  const T* grad;
  Ids other_ids;
  Table<T> other;
  bool gathered;  // other.row(q) is that of other_ids[q]
  int64_t terms, per_key, per_other, rows;
  int lanes, dim;  // 0 columns: no sums of rows

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
  int first, step, dim, lanes;
  bool leads;
  __device__ Slice(const Runs<T>& p)
      : first(int(blockIdx.y) * p.lanes * N + int(threadIdx.x % p.lanes) * (VECTORS ? N : 1)),
        step(VECTORS ? 1 : p.lanes),
        dim(p.dim),
        lanes(p.lanes),
        leads(blockIdx.y == 0 && threadIdx.x % p.lanes == 0) {}
  // Begins to copy the numbers to shared memory, side by side; zeros past the row.
  __device__ __forceinline__ void fetch(uint4* to, const T* row) const {
    if (VECTORS) {
      copy_async<16>(to, first < dim ? row + first : row, first < dim);
    } else {
      T x[N] = {};
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + i * step < dim) x[i] = row[first + i * step];
      memcpy(to, x, sizeof x);
    }
  }
  template <class Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first + i * step < dim) visit(i, first + i * step);
  }
  // The same columns of a row of numbers of type U: T, or the type of the sums.
  template <class U>
  __device__ __forceinline__ void read(C (&x)[N], const U* row) const {
    if (VECTORS) {
      if (first < dim) cuda::load(x, row + first, true);
    } else {
      each([&](int i, int column) { x[i] = to_compute(row[column]); });
    }
  }
  template <class U>
  __device__ __forceinline__ void write(U* row, const C (&x)[N]) const {
    if (VECTORS) {
      if (first < dim) store(row + first, x, true);
    } else {
      each([&](int i, int column) { row[column] = from_compute<U>(x[i]); });
    }
  }
};

template <class T, bool VECTORS, class C = compute_t<T>>
__device__ __forceinline__ void leave(const Runs<T>& p, const Slice<T, VECTORS>& slice, C* to,
                                      const C (&sum)[kWidth<T>], C bias) {
  slice.each([&](int i, int column) { to[column] = sum[i]; });
  if (slice.leads) to[p.dim] = bias;
}

template <class T, bool VECTORS, class Sink, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock, Sink::kBlocks) sum_tiles(Runs<T> p, Sink sink) {
  constexpr int N = kWidth<T>, depth = 4;
  __shared__ int64_t key_of[kMostTerms], other_of[kMostTerms];  // other_of: -1 for a term that gives nothing
  __shared__ C grad_of[kMostTerms], heads[N][kBlock], head_bias[kBlock];
  // What the next terms add, each thread's own numbers. (In registers, which would move on from turn to turn, each move
  // would wait for its load.)
  __shared__ uint4 ahead[depth][kBlock];
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
      if (other >= 0 && p.gathered) other = score / p.per_other;
    }
    key_of[i] = key, other_of[i] = other, grad_of[i] = grad;
  }
  const int64_t before_block = p.key(begin - 1), after_block = p.key(begin + tile);
  __syncthreads();

  const Slice<T, VECTORS> slice(p);
  const int first = group * kTerms;
  auto fetch = [&](int i) {
    if (i < first + kTerms && other_of[i] >= 0) slice.fetch(&ahead[i % depth][threadIdx.x], p.other.row(other_of[i]));
    copy_async_commit();
  };
#pragma unroll
  for (int k = 0; k < depth; ++k) fetch(first + k);
  bool came_in = (group ? key_of[first - 1] : before_block) == key_of[first], open = false;
  C sum[N] = {}, bias = 0;
#pragma unroll 1
  for (int i = first; i < first + kTerms; ++i) {
    const int64_t key = key_of[i];
    copy_async_wait<depth - 1>();
    if (other_of[i] >= 0) {
      C x[N];
      unpack<T>(x, ahead[i % depth][threadIdx.x]);
      slice.each([&](int j, int) { sum[j] += grad_of[i] * x[j]; });
      bias += grad_of[i];
    }
    fetch(i + depth);
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
      if (key < p.rows) sink(key, (begin + i) / p.per_key, slice, sum, bias);
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
    else if (key < p.rows)
      sink(key, (begin + first + kTerms - 1) / p.per_key, slice, sum, bias);
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
template <class T, bool VECTORS, class Sink, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock, Sink::kBlocks) sum_open_runs(Runs<T> p, Sink sink) {
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
  sink(key, (begin + tile - 1) / p.per_key, slice, sum, bias);
}

// --- For the launchers
inline Status check_runs(const View& grad, const View& keys, const View& order, const View& other_ids,
                         const View& other_weight) {
  PYFUSED_REQUIRE(are_ids(keys), "keys", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(order.dtype == DType::i64 && is_packed(order) && order.numel() == keys.numel(), "order",
                  "must be contiguous int64, one per key");
  PYFUSED_REQUIRE(are_ids(other_ids), "other_ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(is_table(other_weight), "other_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_packed(grad) && grad.dtype == other_weight.dtype, "grad",
                  "must be contiguous, of the tables' dtype");
  const int64_t scores = grad.numel(), entries = keys.numel(), others = other_ids.numel();
  PYFUSED_REQUIRE(scores == 0 || (entries > 0 && others > 0 && scores % entries == 0 && scores % others == 0), "grad",
                  "must fit the ids");
  return {};
}

// dim: 0 without sums of rows. Not for an empty grad.
template <class T>
Runs<T> runs_of(const View& grad, const View& keys, const View& order, const View& other_ids, const Table<T>& other,
                int64_t rows, int64_t dim) {
  const int64_t scores = grad.numel();
  return {nullptr,
          nullptr,
          Ids(keys),
          order.as<int64_t>(),
          grad.as<T>(),
          Ids(other_ids),
          other,
          false,
          scores,
          scores / keys.numel(),
          scores / other_ids.numel(),
          rows,
          lanes_for(dim, kWidth<T>, 32),
          static_cast<int>(dim)};
}
template <class T>
int64_t slices_of(const Runs<T>& p) {
  return p.dim ? ceil_div(p.dim, p.lanes * kWidth<T>) : 1;
}

// vectors: what the sink reads and writes is whole 16-byte blocks at 16-byte addresses, as the rows of p.other.
template <class T, class Sink>
Status sum_runs(Runs<T> p, const Sink& sink, bool vectors, const View& workspace, Stream stream) {
  using C = compute_t<T>;
  const int64_t blocks = ceil_div(p.terms, int64_t(kBlock / p.lanes) * kTerms), left = blocks * (p.dim + 1);
  PYFUSED_REQUIRE(blocks <= INT32_MAX && slices_of(p) <= 65535, "grad", "is too large");
  PYFUSED_REQUIRE(workspace.dtype == (sizeof(C) == 8 ? DType::f64 : DType::f32) && workspace.contiguous() &&
                      workspace.numel() >= 2 * left,
                  "workspace", "must hold 2 rows of D + 1 numbers per block");
  p.tails = workspace.as<C>();
  p.heads = p.tails + left;
  vectors = vectors && p.other.whole_vectors();
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slices_of(p)));
  PYFUSED_TRY(launch(vectors ? sum_tiles<T, true, Sink> : sum_tiles<T, false, Sink>, grid, kBlock, 0, stream, p, sink));
  if (blocks == 1) return {};
  return launch(vectors ? sum_open_runs<T, true, Sink> : sum_open_runs<T, false, Sink>, grid, kBlock, 0, stream, p,
                sink);
}

}  // namespace
}  // namespace cuda
}  // namespace pyfused
