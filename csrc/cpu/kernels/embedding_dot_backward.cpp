// Embedding dot product, backward for one of its two tables (`ids` index it, `other_ids` the other one) and its bias.
//
//   weight_grad[r] = ∑ grad[p] · other_weight[other_ids[p]]  over the scores p whose id is r;  bias_grad[r] = ∑ grad[p]
//
// Steps   embedding_dot_runs.h: sort the ids, sum each run of equal ids; here each sum is written to its row.
// Traffic that of the sums; each row is written once, dense gradients after filling the table with zeros. Large sparse ones
//         go past the caches, which saves reading what is overwritten: a prototype took 7.4 instead of 12.8 ms (one thread).
//         B = 65,536 pairs, D = 64, float32, uniform over 1e6 rows: 34 MB sparse, 290 MB dense, per table.
// Sparse  with `occurring` and `count`, the gradients' row i is that of id occurring[i], increasing, i < count.
// Edges   an id outside its table stops the kernel before it writes anything. B, K or D = 0 give zeros or no rows.
#include "cpu/kernels.h"
#include "cpu/kernels/embedding_dot_runs.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// Writes the sums. `weight` and `bias` may be absent, `occurring` is so for dense gradients.
template <class T>
struct Store {
  T *weight, *bias;
  int64_t* occurring;
  int64_t dim;
  bool streamed;  // rows of sparse gradients, one behind the other, go past the caches

  PYFUSED_INLINE int64_t slot(int64_t id, int64_t rank) const {
    if (occurring) occurring[rank] = id;
    return occurring ? rank : id;
  }
  void run(const Terms<T>& terms, int64_t first, int64_t last, const Table<T>& other, int64_t rank) const {
    int64_t to = slot(terms.id[first], rank);
    T* row = streamed ? static_cast<T*>(scratch(3, dim * sizeof(T))) : weight + to * dim;
    if (weight) terms.sum_rows(first, last, other, row);
    if (streamed) stream(weight + to * dim, row, dim * sizeof(T));
    if (bias) bias[to] = from_compute<T>(terms.sum_grads(first, last));
  }
  void sum(int64_t id, int64_t rank, const compute_t<T>* sums) const {
    int64_t to = slot(id, rank);
    if (weight)
      for (int64_t d = 0; d < dim; ++d) weight[to * dim + d] = from_compute<T>(sums[d]);
    if (bias) bias[to] = from_compute<T>(sums[dim]);
  }
};

// Whether the rows are whole cache lines, of a gradient that no second-level cache would hold until somebody reads it.
bool is_streamed(View weight_grad, int64_t row_bytes) {
  bool lines = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(weight_grad.data) % 64 == 0;
  return weight_grad && lines && weight_grad.shape[0] * row_bytes > (4 << 20);
}

void fill_zeros(View out, int64_t size, int threads) {
  if (!out) return;
  parallel_for(out.numel() * size, 1 << 18, threads,
               [&](int64_t begin, int64_t end, int) { std::memset(out.as<char>() + begin, 0, end - begin); });
}

}  // namespace

Status embedding_dot_backward(View weight_grad, View bias_grad, View occurring, View count, View grad, View ids,
                              View other_ids, View other_weight, int64_t rows, int64_t padding, int threads) {
  PYFUSED_REQUIRE(ids.index() && is_packed(ids), "ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(other_ids.index() && is_packed(other_ids), "other_ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(is_table(other_weight), "other_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_packed(grad) && grad.dtype == other_weight.dtype, "grad",
                  "must be contiguous, of the tables' dtype");
  int64_t scores = grad.numel(), entries = ids.numel(), others = other_ids.numel(), dim = other_weight.shape[1];
  PYFUSED_REQUIRE(scores == max(entries, others) || min(entries, others) == 0, "grad",
                  "must have one number per score");
  PYFUSED_REQUIRE(scores == 0 || (scores % entries == 0 && scores % others == 0), "grad", "must fit the ids");
  int64_t slots = occurring ? min(entries, rows) : rows;
  PYFUSED_REQUIRE(
      !weight_grad || (is_packed(weight_grad) && weight_grad.dtype == grad.dtype && weight_grad.numel() == slots * dim),
      "weight_grad", "must be contiguous [rows, D]");
  PYFUSED_REQUIRE(!bias_grad || (is_packed(bias_grad) && bias_grad.dtype == grad.dtype && bias_grad.numel() == slots),
                  "bias_grad", "must be contiguous [rows]");
  PYFUSED_REQUIRE(
      bool(occurring) == bool(count) && (!occurring || (occurring.dtype == DType::i64 && count.dtype == DType::i64 &&
                                                        is_packed(occurring) && occurring.numel() == slots)),
      "occurring", "must be int64 [rows], with a count");
  if (Status s = check_ids("ids", Ids(ids), rows, threads); s.code != Status::ok) return s;
  if (Status s = check_ids("other_ids", Ids(other_ids), other_weight.shape[0], threads); s.code != Status::ok) return s;
  return for_dtype(grad.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (!occurring) {
      fill_zeros(weight_grad, sizeof(T), threads);
      fill_zeros(bias_grad, sizeof(T), threads);
    }
    if (count) *count.as<int64_t>() = 0;
    if (scores == 0) return Status{};
    Order order = sort_ids(Ids(ids), rows, padding, scores, others, threads);
    auto* ranks = occurring ? static_cast<int64_t*>(scratch(1, sizeof(int64_t) * order.chunks())) : nullptr;
    if (occurring) *count.as<int64_t>() = rank_runs(order, ranks, threads);
    Store<T> sink = {weight_grad.as<T>(), bias_grad.as<T>(), occurring.as<int64_t>(), dim,
                     occurring && is_streamed(weight_grad, dim * sizeof(T))};
    sum_runs(sink, order, ranks, grad.as<T>(), Ids(other_ids), Table<T>(other_weight), threads);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
