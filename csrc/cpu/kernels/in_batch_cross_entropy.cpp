// Accidental hits of an in-batch softmax, masked in some rows of its score matrix [B, B].
//
//   scores[r, c] = -inf   where item[c] = item[first + r] and c ≠ first + r;   scores [R, B]: rows first to first + R - 1
//
// Traffic reads R·B ids, which stay in cache, and writes only blocks of scores with a hit. The same in PyTorch (compare,
//         masked_fill_) costs as much as the matrix product that made the scores: 1.4 ns an element.
// Edges   R or B = 0: nothing happens. What stood at a hit, NaN included, is gone.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kBlock = 64;  // ids compared before the first branch

template <class C, class I>
PYFUSED_INLINE void mask_block(C* scores, const I* item, I id, int64_t n) {
  I any = 0;  // as wide as the ids, so that the loop becomes vectors
  for (int64_t c = 0; c < n; ++c) any |= -static_cast<I>(item[c] == id);
  if (!any) return;
  for (int64_t c = 0; c < n; ++c) scores[c] = item[c] == id ? -C(__builtin_inf()) : scores[c];
}

template <class C, class I>
Status mask(const View& scores, const I* item, int64_t first, int threads) {
  const int64_t rows = scores.shape[0], batch = scores.shape[1];
  parallel_for(rows, max<int64_t>(65536 / max<int64_t>(batch, 1), 1), threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      C* row = scores.as<C>() + r * batch;
      const I id = item[first + r];
      const C own = row[first + r];
      int64_t c = 0;
      for (; c + kBlock <= batch; c += kBlock) mask_block(row + c, item + c, id, kBlock);
      mask_block(row + c, item + c, id, batch - c);
      row[first + r] = own;
    }
  });
  return {};
}

}  // namespace

Status mask_accidental_hits(View scores, View item, int64_t first, int threads) {
  PYFUSED_REQUIRE(scores.ndim == 2 && scores.contiguous(), "scores", "must be a contiguous matrix");
  PYFUSED_REQUIRE(scores.dtype == DType::f32 || scores.dtype == DType::f64, "scores", "must be float32 or float64");
  PYFUSED_REQUIRE(item.ndim == 1 && item.contiguous() && item.index() && item.shape[0] == scores.shape[1], "item",
                  "must be one contiguous int32 or int64 id per column of scores");
  PYFUSED_REQUIRE(first >= 0 && first + scores.shape[0] <= scores.shape[1], "first",
                  "must be a row of the full matrix");
  auto with_ids = [&](const auto* ids) {
    return scores.dtype == DType::f32 ? mask<float>(scores, ids, first, threads)
                                      : mask<double>(scores, ids, first, threads);
  };
  return item.dtype == DType::i32 ? with_ids(item.as<int32_t>()) : with_ids(item.as<int64_t>());
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
