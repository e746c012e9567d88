// Embedding dot product, forward.
//
//   out[b, k] = ∑_d user_weight[user[b], d] · item_weight[item[b, k], d] + user_bias[user[b]] + item_bias[item[b, k]]
//
// n = B·K scores of B users with K items each; pairs: K = 1.
// Tiles   four scores at a time; where they share their user, its row is read once for the four, and their sums over lanes
//         are taken together. Rows of tables larger than the cache are prefetched 16 scores ahead: they lie at random
//         places, and a cache miss costs ten times a row's arithmetic.
// Traffic reads B + n rows of D numbers and 8 (4) bytes per id, writes n results; 2·n·D flops, so the memory's rate of
//         random reads is the floor. B = 65,536 pairs, D = 64, float32: 35 MB.
// Saves   nothing: the backward gathers again.
// Sums    in float (double for double).
// Edges   an id outside its table is an error; which scores were written before is not defined. D = 0 gives the biases
//         alone.
#include "cpu/kernels/embedding_dot.h"

#include "cpu/kernels.h"
#include "cpu/simd_math.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// out[i] = ⟨u[i], v[i]⟩ for four pairs of rows; `one_user`: u[0] is the left row of all four; `whole`: of whole
// vectors, where the sums stay in registers.
template <bool one_user, bool whole, class T>
PYFUSED_INLINE void dot4(const T* const* u, const T* const* v, int64_t dim, compute_t<T>* out) {
  using C = compute_t<T>;
  constexpr int64_t W = lanes<C>;
  Vec<C> sum[4] = {};
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    Vec<C> left = load(u[0] + d);
    for (int i = 0; i < 4; ++i) sum[i] += (one_user || i == 0 ? left : load(u[i] + d)) * load(v[i] + d);
  }
  if constexpr (whole) return reduce_add4(sum, out);
  if (d < dim && dim >= W) {  // the last W numbers, of which the loop has counted the first ones
    Mask<C> fresh = lane_numbers<C>() >= static_cast<int>(W - (dim - d));
    for (int i = 0; i < 4; ++i) {
      Vec<C> product = load(u[one_user ? 0 : i] + dim - W) * load(v[i] + dim - W);
      sum[i] += fresh ? product : Vec<C>{};
    }
  } else if (d < dim) {
    for (int i = 0; i < 4; ++i) sum[i] += load_first(u[one_user ? 0 : i], dim) * load_first(v[i], dim);
  }
  reduce_add4(sum, out);
}

// Scores [begin, end), a chunk at a time: its ids are checked, then each is read where it lies, and its row's address is
// made where it is used. False, with what is left unwritten, if an id is outside its table.
template <bool whole, class T>
bool score(T* out, Ids user, Ids item, Table<T> users, Table<T> items, const T* user_bias, const T* item_bias,
           int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t kChunk = 256;
  int64_t user_copy[kChunk], item_copy[kChunk];
  C dots[kChunk];
  const int64_t per_user = item.count / user.count;
  int64_t b = begin / per_user, k = begin % per_user;
  for (int64_t p = begin; p < end; p += kChunk) {
    const int64_t count = min(kChunk, end - p);
    const int64_t *user_ids = user_copy, *item_ids = item.four_by_four(p, count, item_copy);
    if (per_user == 1) {
      user_ids = user.four_by_four(p, count, user_copy);
    } else {
      for (int64_t t = 0; t < count; ++t) {
        user_copy[t] = user[b];
        if (++k == per_user) k = 0, ++b;
      }
      for (int64_t t = count; t % 4; ++t) user_copy[t] = user_copy[count - 1];
    }
    if (any_outside(user_ids, 0, count, users.rows) || any_outside(item_ids, 0, count, items.rows)) return false;
    // Inlined, or GCC would drop the calls: to it a prefetch is no effect.
    auto prefetch = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
      if (!users.far && !items.far) return;
      for (int64_t t = first; t < min(last, count); ++t) {
        if (t == 0 || user_ids[t] != user_ids[t - 1]) users.prefetch(users.row(user_ids[t]));
        items.prefetch(items.row(item_ids[t]));
      }
    };
    prefetch(0, kAhead);
    for (int64_t t = 0; t < count; t += 4) {
      prefetch(t + kAhead, t + kAhead + 4);
      const T *u[4], *v[4];
      for (int64_t i = 0; i < 4; ++i) u[i] = users.row(user_ids[t + i]), v[i] = items.row(item_ids[t + i]);
      if (per_user >= 4 && u[0] == u[3])  // four scores in a row are of one user, or of two: then these are equal
        dot4<true, whole>(u, v, users.dim, dots + t);
      else
        dot4<false, whole>(u, v, users.dim, dots + t);
    }
    if (user_bias)
      for (int64_t t = 0; t < count; ++t) dots[t] += to_compute(user_bias[user_ids[t]]);
    if (item_bias)
      for (int64_t t = 0; t < count; ++t) dots[t] += to_compute(item_bias[item_ids[t]]);
    for (int64_t t = 0; t < count; ++t) out[p + t] = from_compute<T>(dots[t]);
  }
  return true;
}

bool is_bias(View bias, View weight) {
  return !bias || (bias.dtype == weight.dtype && is_packed(bias) && bias.numel() == weight.shape[0]);
}

}  // namespace

Status embedding_dot(View out, View user, View item, View user_weight, View item_weight, View user_bias, View item_bias,
                     int threads) {
  PYFUSED_REQUIRE(user.index() && is_packed(user), "user", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(item.index() && is_packed(item), "item", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(is_table(user_weight), "user_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_table(item_weight), "item_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(user_weight.shape[1] == item_weight.shape[1], "item_weight", "must have the D of user_weight");
  PYFUSED_REQUIRE(is_packed(out) && out.numel() == item.numel(), "out", "must be contiguous, of item's shape");
  PYFUSED_REQUIRE(out.dtype == user_weight.dtype && item_weight.dtype == out.dtype, "item_weight",
                  "must share one dtype");
  PYFUSED_REQUIRE(is_bias(user_bias, user_weight), "user_bias", "must be contiguous, one number per row, same dtype");
  PYFUSED_REQUIRE(is_bias(item_bias, item_weight), "item_bias", "must be contiguous, one number per row, same dtype");
  int64_t scores = item.numel();
  if (scores == 0) return check_ids("user", Ids(user), user_weight.shape[0], threads);
  PYFUSED_REQUIRE(user.numel() > 0 && scores % user.numel() == 0, "item", "must hold K ids for every user");
  return for_dtype(out.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto run = user_weight.shape[1] % lanes<compute_t<T>> == 0 ? score<true, T> : score<false, T>;
    bool inside = true;
    parallel_for(scores, 256, threads, [&](int64_t begin, int64_t end, int) {
      if (!run(out.as<T>(), Ids(user), Ids(item), Table<T>(user_weight), Table<T>(item_weight), user_bias.as<T>(),
               item_bias.as<T>(), begin, end))
        __atomic_store_n(&inside, false, __ATOMIC_RELAXED);
    });
    if (inside) return Status{};
    if (Status s = check_ids("user", Ids(user), user_weight.shape[0], threads); s.code != Status::ok) return s;
    return check_ids("item", Ids(item), item_weight.shape[0], threads);
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
