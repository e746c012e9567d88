// Embedding dot product, backward for one of its two tables (`ids` index it, `other_ids` the other one) and its bias.
//
//   weight_grad[r] = ∑ grad[p] · other_weight[other_ids[p]]  over the scores p whose id is r;  bias_grad[r] = ∑ grad[p]
//
// Steps   1. Sort the ids, each packed with its position into 64 bits. Ids equal to `padding` sort last and are cut off.
//         2. Cut the terms, in sorted order, into chunks of 256 and sum each run of equal ids within its chunk, columns in
//            registers, rows prefetched. A run that lies inside one chunk is written at once.
//         3. A run that crosses chunk borders left a partial sum per chunk; the chunk it begins in adds them up.
//         The chunks depend on the ids alone: the sums have the same bits for any number of threads, and an id that fills
//         the whole batch is spread over all of them. No atomics.
// Traffic n scores: reads n rows of D numbers, n grads, 2·n ids; the sort moves 16 bytes per id and digit of 11 bits; each
//         row is written once, dense gradients after filling the table with zeros. 2·n·D flops. B = 65,536 pairs, D = 64,
//         float32, uniform over 1e6 rows: 34 MB sparse, 290 MB dense, per table.
// Sparse  with `occurring` and `count`, the gradients' row i is that of id occurring[i], increasing, i < count.
// Sums    in float (double for double).
// Edges   an id outside its table stops the kernel before it writes anything. B, K or D = 0 give zeros or no rows.
#include "cpu/kernels.h"
#include "cpu/kernels/embedding_dot.h"
#include "cpu/radix_sort.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kChunk = 256;  // terms

// The terms of a gradient in the order of their ids. Each id at position q of `ids` has `inner` terms: the scores
// p = q·inner, q·inner + 1, ...; the other table's id for score p is at position p / outer.
struct Order {
  const uint64_t* packed;  // id << shift | position, sorted
  int shift;
  int64_t inner, outer, count;  // count: terms
  PYFUSED_INLINE int64_t id(int64_t term) const { return packed[term / inner] >> shift; }
  PYFUSED_INLINE bool begins(int64_t term) const { return term == 0 || id(term) != id(term - 1); }
};

// Sorts `ids`; those equal to `padding` are left out.
Order sort_ids(Ids ids, int64_t rows, int64_t padding, int64_t scores, int64_t others, int threads) {
  int shift = 64 - __builtin_clzll(ids.count), id_bits = 64 - __builtin_clzll(rows);
  auto* packed = static_cast<uint64_t*>(scratch(0, 2 * sizeof(uint64_t) * ids.count));
  parallel_for(ids.count, 1 << 14, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t q = begin; q < end; ++q)
      packed[q] = static_cast<uint64_t>(ids[q] == padding ? rows : ids[q]) << shift | static_cast<uint64_t>(q);
  });
  packed = radix_sort(packed, packed + ids.count, ids.count, shift, shift + id_bits, 1, threads);
  int64_t first = 0, end = ids.count;  // the first padding entry is in [first, end]
  while (first < end) {
    int64_t middle = (first + end) / 2;
    if (static_cast<int64_t>(packed[middle] >> shift) < rows)
      first = middle + 1;
    else
      end = middle;
  }
  int64_t inner = scores / ids.count;
  return {packed, shift, inner, scores / others, first * inner};
}

// One chunk's terms, looked up.
template <class T>
struct Terms {
  int64_t count;
  int64_t id[kChunk];
  const T* row[kChunk];
  compute_t<T> grad[kChunk];

  Terms(const Order& order, int64_t begin, int64_t end, const T* grads, Ids other_ids, const Table<T>& other) {
    count = end - begin;
    int64_t entry = begin / order.inner, j = begin % order.inner;
    uint64_t position_mask = (uint64_t{1} << order.shift) - 1;
    for (int64_t t = 0; t < count; ++t) {
      int64_t p = static_cast<int64_t>(order.packed[entry] & position_mask) * order.inner + j;
      id[t] = static_cast<int64_t>(order.packed[entry] >> order.shift);
      grad[t] = to_compute(grads[p]);
      row[t] = other.row(other_ids[order.outer == 1 ? p : p / order.outer]);
      if (t < kAhead) other.prefetch(row[t]);
      if (++j == order.inner) j = 0, ++entry;
    }
  }

  // out[0, V vectors) = ∑ grad[t] · row[t][d, d + V vectors) over t in [first, last)
  template <int V, class Out>
  PYFUSED_INLINE void sum_columns(int64_t first, int64_t last, int64_t d, Out* out) const {
    using C = compute_t<T>;
    Vec<C> sum[V] = {};
    for (int64_t t = first; t < last; ++t) {
      Vec<C> g = splat(grad[t]);
      for (int v = 0; v < V; ++v) sum[v] += g * load(row[t] + d + v * lanes<C>);
    }
    for (int v = 0; v < V; ++v) store(out + d + v * lanes<C>, sum[v]);
  }

  // out[0, dim) = ∑ grad[t] · row[t] over t in [first, last). Out is T, or the type of the sums.
  template <class Out>
  void sum_rows(int64_t first, int64_t last, const Table<T>& other, Out* out) const {
    constexpr int64_t W = lanes<compute_t<T>>;
    for (int64_t t = first + kAhead; t < min(last + kAhead, count); ++t) other.prefetch(row[t]);
    int64_t d = 0, dim = other.dim;
    for (; d + 8 * W <= dim; d += 8 * W) sum_columns<8>(first, last, d, out);
    for (; d + 4 * W <= dim; d += 4 * W) sum_columns<4>(first, last, d, out);
    for (; d + W <= dim; d += W) sum_columns<1>(first, last, d, out);
    if (d < dim && dim >= W) {
      sum_columns<1>(first, last, dim - W, out);  // the last W columns, some of them again
    } else if (d < dim) {
      Vec<compute_t<T>> sum = {};
      for (int64_t t = first; t < last; ++t) sum += splat(grad[t]) * load_first(row[t], dim);
      store_first(out, sum, dim);
    }
  }

  compute_t<T> sum_grads(int64_t first, int64_t last) const {
    compute_t<T> sum = 0;
    for (int64_t t = first; t < last; ++t) sum += grad[t];
    return sum;
  }
};

// What a backward writes; `weight` and `bias` may be absent, `occurring` is so for dense gradients.
template <class T>
struct Gradient {
  T *weight, *bias;
  int64_t* occurring;
  int64_t dim;
};

// ranks[c] = number of runs that begin before chunk c; returns the number of runs.
int64_t rank_runs(const Order& order, int64_t chunks, int64_t* ranks, int threads) {
  parallel_for(chunks, 16, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t c = first; c < last; ++c) {
      int64_t end = min((c + 1) * kChunk, order.count);
      ranks[c] = 0;
      for (int64_t entry = (c * kChunk + order.inner - 1) / order.inner; entry * order.inner < end; ++entry)
        ranks[c] += entry == 0 || order.packed[entry] >> order.shift != order.packed[entry - 1] >> order.shift;
    }
  });
  int64_t runs = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t begun = ranks[c];
    ranks[c] = runs;
    runs += begun;
  }
  return runs;
}

// Step 2 for the chunk of terms [begin, end). `rank`: runs that began before it. `partials`: two sums of dim + 1 numbers,
// for a run that began before the chunk and for one that begins in it and goes on after it; returns where the sum of the
// latter belongs, -1 if there is none.
template <class T>
int64_t sum_chunk(const Gradient<T>& out, const Terms<T>& terms, const Table<T>& other, bool begun_before, bool goes_on,
                  int64_t rank, compute_t<T>* partials) {
  int64_t spilled = -1;
  for (int64_t t = 0, last; t < terms.count; t = last) {
    last = t + 1;
    while (last < terms.count && terms.id[last] == terms.id[t]) ++last;
    bool ours = t > 0 || !begun_before;  // this run begins in this chunk
    int64_t slot = out.occurring ? rank : terms.id[t];
    if (ours && out.occurring) out.occurring[rank++] = terms.id[t];
    if (ours && (last < terms.count || !goes_on)) {
      if (out.weight) terms.sum_rows(t, last, other, out.weight + slot * out.dim);
      if (out.bias) out.bias[slot] = from_compute<T>(terms.sum_grads(t, last));
      continue;
    }
    compute_t<T>* partial = partials + (ours ? out.dim + 1 : 0);
    if (out.weight) terms.sum_rows(t, last, other, partial);
    partial[out.dim] = terms.sum_grads(t, last);
    if (ours) spilled = slot;
  }
  return spilled;
}

// Steps 2 and 3.
template <class T>
void sum_runs(const Gradient<T>& out, int64_t* count, const Order& order, const T* grads, Ids other_ids,
              const Table<T>& other, int threads) {
  using C = compute_t<T>;
  int64_t chunks = (order.count + kChunk - 1) / kChunk, width = out.dim + 1;
  auto* ranks = static_cast<int64_t*>(scratch(1, 2 * sizeof(int64_t) * chunks));
  auto* partials = static_cast<C*>(scratch(2, 2 * sizeof(C) * width * chunks));
  int64_t* spilled = ranks + chunks;
  if (count) *count = rank_runs(order, chunks, ranks, threads);
  parallel_for(chunks, 4, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t c = first; c < last; ++c) {
      int64_t begin = c * kChunk, end = min(begin + kChunk, order.count);
      Terms<T> terms(order, begin, end, grads, other_ids, other);
      bool begun_before = !order.begins(begin), goes_on = end < order.count && !order.begins(end);
      spilled[c] = sum_chunk(out, terms, other, begun_before, goes_on, count ? ranks[c] : 0, partials + 2 * width * c);
    }
  });
  parallel_for(chunks, 4, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t c = first; c < last; ++c) {
      if (spilled[c] < 0) continue;
      C* sum = partials + 2 * width * c + width;
      int64_t id = order.id((c + 1) * kChunk);
      for (int64_t e = c + 1; e < chunks && order.id(e * kChunk) == id; ++e)
        for (int64_t d = out.weight ? 0 : out.dim; d < width; ++d) sum[d] += partials[2 * width * e + d];
      if (out.weight)
        for (int64_t d = 0; d < out.dim; ++d) out.weight[spilled[c] * out.dim + d] = from_compute<T>(sum[d]);
      if (out.bias) out.bias[spilled[c]] = from_compute<T>(sum[out.dim]);
    }
  });
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
    Gradient<T> out = {weight_grad.as<T>(), bias_grad.as<T>(), occurring.as<int64_t>(), dim};
    sum_runs(out, count.as<int64_t>(), order, grad.as<T>(), Ids(other_ids), Table<T>(other_weight), threads);
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
