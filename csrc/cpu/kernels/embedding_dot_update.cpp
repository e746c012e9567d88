// One step of an optimizer on one of the two tables of embedding_dot (`ids` index it, `other_ids` the other one) and on its
// bias, in place of their gradients, which are never stored.
//
//   g[r] = ∑ grad[p] · other_weight[other_ids[p]]  over the scores p whose id is r; rows that no id names stay as they are
//
//   sgd               w -= lr·g
//   adagrad           s += g²;  w -= lr·g / (√s + eps)
//   rowwise_adagrad   s += mean of the row's g²;  w -= lr·g / (√s + eps)
//   adam              m += α·(g - m);  v += β·(g² - v);  w -= lr·m / (√v + eps)
//
// Steps   embedding_dot_runs.h: sort the ids, sum each run of equal ids into a buffer in cache; then step on its row.
//         The gradient of the other table must see the rows as they were: with `before` and `slots`, the rows that occur are
//         copied to before[0 ...) before they change, and slots[q] is where the row of ids[q] now lies. The second call reads
//         those instead of the table, from a place small enough for the caches.
// Traffic that of the sums; each row that occurs, and its state, is read and written once, its copy written once.
// Sums    and the step in float (double for double), state too; a 16-bit weight is rounded to nearest.
// Edges   an id outside its table stops the kernel before it writes anything.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/kernels/embedding_dot_runs.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

enum Rule { kSgd, kAdagrad, kRowwiseAdagrad, kAdam };  // the order of RULES in pyfused/ops/embedding_dot_update.py

// A step on one row: w, the gradient g, and the row's state s, t (what the rule does not use is not read). `a`: its numbers.
template <class C>
PYFUSED_INLINE void step(int rule, const C* a, C* __restrict w, const C* __restrict g, C* __restrict s, C* __restrict t,
                         int64_t dim) {
  if (rule == kSgd) {
    for (int64_t d = 0; d < dim; ++d) w[d] -= a[0] * g[d];
  } else if (rule == kAdagrad) {
    for (int64_t d = 0; d < dim; ++d) {
      s[d] += g[d] * g[d];
      w[d] -= a[0] * g[d] / (std::sqrt(s[d]) + a[1]);
    }
  } else if (rule == kRowwiseAdagrad) {
    constexpr int64_t W = lanes<C>;
    Vec<C> squares = {};
    int64_t d = 0;
    for (; d + W <= dim; d += W) squares += load(g + d) * load(g + d);
    Vec<C> tail = load_first(g + d, dim - d);
    *s += reduce_add(squares + tail * tail) / static_cast<C>(dim);
    C scale = a[0] / (std::sqrt(*s) + a[1]);
    for (d = 0; d < dim; ++d) w[d] -= scale * g[d];
  } else {
    for (int64_t d = 0; d < dim; ++d) {
      s[d] += a[1] * (g[d] - s[d]);
      t[d] += a[2] * (g[d] * g[d] - t[d]);
      w[d] -= a[0] * s[d] / (std::sqrt(t[d]) + a[3]);
    }
  }
}

// A table under update, or a bias, which is a table of one column.
template <class T>
struct Trained {
  using C = compute_t<T>;
  T* data;
  C *s, *t;
  int64_t stride, dim, state_dim;
  int rule;
  C numbers[4];

  Trained(View weight, View s, View t, int64_t dim, int rule, const double* settings)
      : data(weight.as<T>()),
        s(s.as<C>()),
        t(t.as<C>()),
        stride(weight ? weight.strides[0] : 0),
        dim(dim),
        state_dim(rule == kRowwiseAdagrad ? 1 : dim),
        rule(rule) {
    for (int i = 0; i < 4; ++i) numbers[i] = static_cast<C>(settings[i]);
  }
  explicit operator bool() const { return data != nullptr; }
  PYFUSED_INLINE T* row(int64_t id) const { return data + id * stride; }
  PYFUSED_INLINE void prefetch(int64_t id) const {
    prefetch_row(row(id), dim);
    if (rule != kSgd) prefetch_row(s + id * state_dim, state_dim);
    if (rule == kAdam) prefetch_row(t + id * state_dim, state_dim);
  }
  void apply(int64_t id, const C* g, C* spare) const {
    constexpr int64_t W = lanes<C>;
    C* w = spare;
    if constexpr (std::is_same_v<T, C>) {
      w = row(id);
    } else {
      int64_t d = 0;
      for (; d + W <= dim; d += W) store(w + d, load(row(id) + d));
      if (d < dim) store_first(w + d, load_first(row(id) + d, dim - d), dim - d);
    }
    step(rule, numbers, w, g, s + id * state_dim, t + id * state_dim, dim);
    if constexpr (!std::is_same_v<T, C>) {
      int64_t d = 0;
      for (; d + W <= dim; d += W) store(row(id) + d, load(w + d));
      if (d < dim) store_first(row(id) + d, load_first(w + d, dim - d), dim - d);
    }
  }
};

template <class T>
struct Update {
  using C = compute_t<T>;
  Trained<T> weight, bias;
  T* before;  // nullptr: no copy

  void apply(int64_t id, int64_t rank, const C* sums, C* spare) const {
    if (weight) {
      if (before) std::memcpy(before + rank * weight.dim, weight.row(id), weight.dim * sizeof(T));
      weight.apply(id, sums, spare);
    }
    if (bias) bias.apply(id, sums + weight.dim, spare);
  }
  void run(const Terms<T>& terms, int64_t first, int64_t last, const Table<T>& other, int64_t rank) const {
    for (int64_t t = first == 0 && terms.cold ? 0 : first + kAhead; t < min(last + kAhead, terms.known); ++t) {
      if (weight) weight.prefetch(terms.id[t]);
      if (bias) bias.prefetch(terms.id[t]);
    }
    C* sums = buffer();
    if (weight) terms.sum_rows(first, last, other, sums);
    sums[weight.dim] = terms.sum_grads(first, last);
    apply(terms.id[first], rank, sums, sums + weight.dim + 1);
  }
  void sum(int64_t id, int64_t rank, const C* sums) const { apply(id, rank, sums, buffer()); }
  C* buffer() const { return static_cast<C*>(scratch(3, sizeof(C) * (2 * weight.dim + 2))); }
};

// slots[q] = rank of ids[q]; for padding, whose row does not change, the one after the last.
void fill_slots(int64_t* slots, const Order& order, const int64_t* ranks, int64_t runs, int64_t entries, int threads) {
  uint64_t position_mask = (uint64_t{1} << order.shift) - 1;
  parallel_for(order.chunks(), 16, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t c = first; c < last; ++c) {
      int64_t end = min((c + 1) * kChunk, order.count), rank = ranks[c] - 1;
      for (int64_t entry = (c * kChunk + order.inner - 1) / order.inner; entry * order.inner < end; ++entry) {
        rank += order.begins(entry * order.inner);
        slots[order.packed[entry] & position_mask] = rank;
      }
    }
  });
  for (int64_t entry = order.count / order.inner; entry < entries; ++entry)
    slots[order.packed[entry] & position_mask] = runs;
}

bool is_state(View state, View table, int64_t width) {
  DType dtype = table.dtype == DType::f64 ? DType::f64 : DType::f32;
  return state && state.dtype == dtype && is_packed(state) && state.numel() == table.shape[0] * width;
}

const char* problem_of(View table, View s, View t, int64_t dim, int rule) {
  if (!table) return nullptr;
  int64_t width = rule == kRowwiseAdagrad ? 1 : dim;
  if (rule != kSgd && !is_state(s, table, width)) return "needs a contiguous float32 (float64: float64) state";
  if (rule == kAdam && !is_state(t, table, width)) return "needs a second contiguous state";
  return nullptr;
}

}  // namespace

Status embedding_dot_update(View weight, View bias, View weight_s, View weight_t, View bias_s, View bias_t, View before,
                            View slots, View grad, View ids, View other_ids, View other_weight, View settings, int rule,
                            int64_t rows, int64_t padding, int threads) {
  PYFUSED_REQUIRE(ids.index() && is_packed(ids), "ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(other_ids.index() && is_packed(other_ids), "other_ids", "must be contiguous int32 or int64");
  PYFUSED_REQUIRE(is_table(other_weight), "other_weight", "must be [rows, D] with rows without gaps");
  PYFUSED_REQUIRE(is_packed(grad) && grad.dtype == other_weight.dtype, "grad",
                  "must be contiguous, of the tables' dtype");
  int64_t scores = grad.numel(), entries = ids.numel(), others = other_ids.numel(), dim = other_weight.shape[1];
  PYFUSED_REQUIRE(scores == max(entries, others) || min(entries, others) == 0, "grad",
                  "must have one number per score");
  PYFUSED_REQUIRE(scores == 0 || (scores % entries == 0 && scores % others == 0), "grad", "must fit the ids");
  PYFUSED_REQUIRE(!weight || (is_table(weight) && weight.dtype == grad.dtype && weight.shape[0] == rows &&
                              weight.shape[1] == dim && weight.data != other_weight.data),
                  "weight", "must be [rows, D] with rows without gaps, of grad's dtype, and not the other table");
  PYFUSED_REQUIRE(!bias || (bias.dtype == grad.dtype && bias.ndim == 1 && bias.shape[0] == rows), "bias",
                  "must be [rows], of grad's dtype");
  PYFUSED_REQUIRE(rule >= kSgd && rule <= kAdam, "rule", "must be one of the four");
  if (const char* problem = problem_of(weight, weight_s, weight_t, dim, rule)) return invalid("weight", problem);
  if (const char* problem = problem_of(bias, bias_s, bias_t, 1, rule)) return invalid("bias", problem);
  PYFUSED_REQUIRE(settings.dtype == DType::f64 && is_packed(settings) && settings.numel() == 8, "settings",
                  "must be 2 x 4 float64");
  PYFUSED_REQUIRE(bool(before) == bool(slots) &&
                      (!before || (weight && before.dtype == grad.dtype && is_packed(before) &&
                                   before.numel() == min(entries, rows) * dim && slots.dtype == DType::i64 &&
                                   is_packed(slots) && slots.numel() == entries)),
                  "before", "must be contiguous [rows that occur, D], with int64 slots");
  if (Status s = check_ids("ids", Ids(ids), rows, threads); s.code != Status::ok) return s;
  if (Status s = check_ids("other_ids", Ids(other_ids), other_weight.shape[0], threads); s.code != Status::ok) return s;
  if (scores == 0) return {};
  return for_dtype(grad.dtype, [&](auto tag) {
    using T = decltype(tag);
    Order order = sort_ids(Ids(ids), rows, padding, scores, others, threads);
    int64_t* ranks = nullptr;
    if (before) {
      ranks = static_cast<int64_t*>(scratch(1, sizeof(int64_t) * order.chunks()));
      int64_t runs = rank_runs(order, ranks, threads);
      fill_slots(slots.as<int64_t>(), order, ranks, runs, entries, threads);
      if (order.count < scores)
        std::memcpy(before.as<T>() + runs * dim, weight.as<T>() + padding * weight.strides[0], dim * sizeof(T));
    }
    const double* numbers = settings.as<double>();
    Update<T> sink = {Trained<T>(weight, weight_s, weight_t, dim, rule, numbers),
                      Trained<T>(bias, bias_s, bias_t, 1, rule, numbers + 4), before.as<T>()};
    sum_runs(sink, order, ranks, grad.as<T>(), Ids(other_ids), Table<T>(other_weight), threads);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
