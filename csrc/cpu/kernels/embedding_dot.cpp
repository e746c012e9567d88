// Embedding dot product, forward.
//
//   out[b, k] = ∑_d user_weight[user[b], d] · item_weight[item[b, k], d] + user_bias[user[b]] + item_bias[item[b, k]]
//
// Tiles   one thread takes a contiguous range of b; the user row is read once per b and stays in L1 for its K items.
// Traffic reads B·(1 + K) rows of D elements once; writes B·K results. The gathered rows are never stored.
// Saves   nothing: the backward gathers again.
// Edges   an id outside its table stops the kernel: out_of_range names the first one. D = 0 gives the biases alone.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

template <class T>
PYFUSED_INLINE compute_t<T> dot(const T* a, const T* b, int64_t n) {
  using C = compute_t<T>;
  Vec<C> sum{};
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) sum += load(a + i) * load(b + i);
  if (i < n) sum += load_first(a + i, n - i) * load_first(b + i, n - i);
  return reduce_add(sum);
}

}  // namespace

Status embedding_dot(View out, View user, View item, View user_weight, View item_weight, View user_bias, View item_bias,
                     int threads) {
  PYFUSED_REQUIRE(user.dtype == DType::i64 && item.dtype == DType::i64, "user", "ids must be int64");
  PYFUSED_REQUIRE(user_weight.contiguous() && item_weight.contiguous() && out.contiguous(), "user_weight",
                  "must be contiguous");
  return for_dtype(user_weight.dtype, [&](auto tag) {
    using T = decltype(tag);
    int64_t batch = user.numel(), per = batch ? item.numel() / batch : 0, dim = user_weight.shape[1];
    parallel_for(batch, 64, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t k = 0; k < per; ++k)
          out.as<T>()[b * per + k] =
              from_compute<T>(dot(user_weight.as<T>() + user.as<int64_t>()[b] * dim,
                                  item_weight.as<T>() + item.as<int64_t>()[b * per + k] * dim, dim));
    });
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
