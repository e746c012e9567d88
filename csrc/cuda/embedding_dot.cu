// Embedding dot product, forward, and the gather of rows for in_batch_cross_entropy.
//
//   out[b, k] = ∑_d user_weight[user[b], d] · item_weight[item[b, k], d] + user_bias[user[b]] + item_bias[item[b, k]]
//
// n = B·K scores of B users with K items each; pairs: K = 1.
// Tiles   4 to 32 lanes to a score; for K > 1 to four scores of one user, whose row they read once (the next four scores
//         find it in cache). 16-byte loads, two a row and thread up to 1 KB a row; rows that are not whole 16-byte blocks
//         at 16-byte addresses are read number by number, lanes side by side.
// Traffic reads B + n rows of D numbers and 8 (4) bytes per id, writes n numbers; 2·n·D flops: bound by memory.
//         B = 65,536 pairs, D = 64, float32: 35 MB, 8 us at the 4.3 TB/s that an H200 copies, where rows are met in
//         whole 32-byte sectors. gather_rows reads and writes n rows, 34 MB and 8 us as well. Not measured.
// Saves   nothing: the backward gathers again.
// Sums    in float (double for double), in an order that depends on D and the tables' alignment alone.
// Edges   an id outside its table: no row is read, the score is NaN, and it is reported. D = 0 gives the biases alone.
#include "cuda/embedding_dot.cuh"

namespace pyfused {
namespace cuda {
namespace {

template <class T>
struct Scores {
  T* out;
  Ids user, item;
  Table<T> users, items;
  const T *user_bias, *item_bias;  // may be null
  IndexError* index_error;
  int64_t per_user, units;  // K; groups of lanes that have work
  int64_t units_per_user;
  int lanes;
};

// ITEMS scores of one user to a group of p.lanes threads. Three blocks at a time leave a thread 80 registers; left to
// itself, nvcc 13 aims at 40 for sm_80 and spills.
template <class T, bool VECTORS, int ITEMS>
__global__ void __launch_bounds__(kBlock, 3) forward(Scores<T> p) {
  using C = compute_t<T>;
  constexpr int N = VECTORS ? kWidth<T> : 1;
  const int lane = threadIdx.x % p.lanes;
  const int64_t unit = int64_t(blockIdx.x) * (kBlock / p.lanes) + threadIdx.x / p.lanes;
  const bool live = unit < p.units;
  const int64_t b = ITEMS == 1 ? (live ? unit / p.per_user : 0) : unit / p.units_per_user;
  const int64_t first = ITEMS == 1 ? unit : b * p.per_user + (unit - b * p.units_per_user) * ITEMS;
  const int count = !live ? 0 : ITEMS == 1 ? 1 : static_cast<int>(min(int64_t(ITEMS), (b + 1) * p.per_user - first));
  const int64_t user = live ? p.user[b] : 0;
  const bool user_ok = live && p.users.has(user);
  if (live && !user_ok && lane == 0) report_out_of_range(p.index_error, Argument::user, b, user, p.users.rows);
  const T* const u = p.users.row(user_ok ? user : 0);
  const T* v[ITEMS];
  C sum[ITEMS], bias[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int64_t item = i < count ? p.item[first + i] : 0;
    const bool ok = i < count && p.items.has(item);
    if (i < count && !ok && lane == 0)
      report_out_of_range(p.index_error, Argument::item, first + i, item, p.items.rows);
    v[i] = ok ? p.items.row(item) : u;  // u: some row, so that the loop has no branch
    sum[i] = 0;
    bias[i] = ok && user_ok ? C(0) : C(NAN);
    if (ok && user_ok && lane == 0) {
      if (p.user_bias) bias[i] += to_compute(p.user_bias[user]);
      if (p.item_bias) bias[i] += to_compute(p.item_bias[item]);
    }
  }
#pragma unroll 2
  for (int d = lane * N; d < (user_ok ? p.users.dim : 0); d += p.lanes * N) {
    C left[N], right[N];
    load<N>(left, u + d, VECTORS);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      load<N>(right, v[i] + d, VECTORS);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[i] += left[j] * right[j];
    }
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const C dot = group_sum(sum[i], p.lanes);
    if (lane == 0 && i < count) p.out[first + i] = from_compute<T>(dot + bias[i]);
  }
}

// out[i] = factor · table[ids[i]], in the arithmetic's type or the table's, and zeros up to `width`; all zeros for an id
// outside the table.
template <class T, class O>
__global__ void __launch_bounds__(kBlock)
    gather(O* out, Ids ids, Table<T> table, compute_t<T> factor, int64_t count, int width, int lanes) {
  using C = compute_t<T>;
  const int lane = threadIdx.x % lanes;
  const int64_t i = int64_t(blockIdx.x) * (kBlock / lanes) + threadIdx.x / lanes;
  if (i >= count) return;
  const int64_t id = ids[i];
  const bool ok = table.has(id);
  const T* const row = table.row(ok ? id : 0);
  constexpr int several = 4;  // loads under way at a time
  for (int first = lane; first < width; first += several * lanes) {
    T x[several];
#pragma unroll
    for (int k = 0; k < several; ++k) {
      x[k] = from_compute<T>(0);
      if (ok && first + k * lanes < table.dim) x[k] = row[first + k * lanes];
    }
#pragma unroll
    for (int k = 0; k < several; ++k) {
      const int d = first + k * lanes;
      if (d < width) out[i * width + d] = from_compute<O>(to_compute(x[k]) * factor);
    }
  }
}

}  // namespace

Status embedding_dot(View out, View user, View item, View user_weight, View item_weight, View user_bias, View item_bias,
                     Stream stream) {
  PYFUSED_REQUIRE(are_ids(user), "user", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(are_ids(item), "item", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(is_table(user_weight), "user_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_table(item_weight), "item_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(user_weight.shape[1] == item_weight.shape[1], "item_weight", "must have the D of user_weight");
  PYFUSED_REQUIRE(is_packed(out) && out.numel() == item.numel(), "out", "must be contiguous, of item's shape");
  PYFUSED_REQUIRE(out.dtype == user_weight.dtype && item_weight.dtype == out.dtype, "item_weight",
                  "must share one dtype");
  PYFUSED_REQUIRE(is_bias(user_bias, user_weight), "user_bias", "must be contiguous, one number per row, same dtype");
  PYFUSED_REQUIRE(is_bias(item_bias, item_weight), "item_bias", "must be contiguous, one number per row, same dtype");
  const int64_t scores = item.numel(), batch = user.numel();
  if (scores == 0) return {};
  PYFUSED_REQUIRE(batch > 0 && scores % batch == 0, "item", "must hold K ids for every user");
  return for_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    Scores<T> p = {out.as<T>(),
                   Ids(user),
                   Ids(item),
                   Table<T>(user_weight),
                   Table<T>(item_weight),
                   user_bias ? user_bias.as<T>() : nullptr,
                   item_bias ? item_bias.as<T>() : nullptr,
                   index_error(),
                   scores / batch,
                   scores,
                   0,
                   0};
    const bool vectors = p.users.whole_vectors() && p.items.whole_vectors(), several = p.per_user > 1;
    if (several) {
      p.units_per_user = ceil_div(p.per_user, 4);
      p.units = batch * p.units_per_user;
    }
    p.lanes = lanes_for(p.users.dim, 2 * (vectors ? kWidth<T> : 1), 32);
    const int64_t blocks = ceil_div(p.units, kBlock / p.lanes);
    PYFUSED_REQUIRE(blocks <= INT32_MAX, "item", "holds too many ids");
    const auto kernel = several ? (vectors ? forward<T, true, 4> : forward<T, false, 4>)
                                : (vectors ? forward<T, true, 1> : forward<T, false, 1>);
    return launch(kernel, static_cast<unsigned>(blocks), kBlock, 0, stream, p);
  });
}

Status gather_rows(View out, View ids, View table, double factor, Stream stream) {
  PYFUSED_REQUIRE(ids.ndim == 1 && are_ids(ids), "ids", "must be a contiguous vector of int32 or int64");
  PYFUSED_REQUIRE(is_table(table), "table", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_packed(out) && out.ndim == 2 && out.shape[0] == ids.shape[0] && out.shape[1] >= table.shape[1] &&
                      out.shape[1] < INT32_MAX / 2 &&
                      (out.dtype == table.dtype || (out.dtype == DType::f32 && table.dtype != DType::f64)),
                  "out", "must be [ids, W >= D], of the table's dtype or the arithmetic's");
  if (out.numel() == 0) return {};
  return for_dtype(table.dtype, [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Table<T> rows(table);
    const int width = static_cast<int>(out.shape[1]), lanes = lanes_for(width, 4, 32);
    const int64_t blocks = ceil_div(ids.shape[0], kBlock / lanes);
    PYFUSED_REQUIRE(blocks <= INT32_MAX, "ids", "are too many");
    auto run = [&](auto* to) {
      return launch(gather<T, std::decay_t<decltype(*to)>>, static_cast<unsigned>(blocks), kBlock, 0, stream, to,
                    Ids(ids), rows, static_cast<C>(factor), ids.shape[0], width, lanes);
    };
    return out.dtype == table.dtype ? run(out.as<T>()) : run(out.as<C>());
  });
}

}  // namespace cuda
}  // namespace pyfused
