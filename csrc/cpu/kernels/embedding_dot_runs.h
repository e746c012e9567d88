// The sums of the gradients of embedding_dot by id, for kernels that store them (backward) or that apply them (update).
//
// Steps   1. Sort the ids, each packed with its position into 64 bits. Ids equal to `padding` sort last and are cut off.
//         2. Cut the terms, in sorted order, into chunks of 256 and sum each run of equal ids within its chunk, columns in
//            registers, rows prefetched. A run that lies inside one chunk goes to the sink at once.
//         3. A run that crosses chunk borders left a partial sum per chunk; the chunk it begins in adds them up.
//         The chunks depend on the ids alone: the sums have the same bits for any number of threads, and an id that fills
//         the whole batch is spread over all of them. No atomics.
// Traffic n scores: reads n rows of D numbers, n grads, 2·n ids; the sort moves 16 bytes per id and digit of 11 bits.
//         2·n·D flops.
// Sums    in float (double for double).
#pragma once
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
  PYFUSED_INLINE int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
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

// One chunk's terms, looked up, and the first ones of the next chunk, so that their rows are on the way when it begins: a
// pipeline that ran dry at the end of each chunk cost a quarter of the time. `cold`: nobody has fetched this chunk's first.
template <class T>
struct Terms {
  int64_t count, known;
  bool cold;
  int64_t id[kChunk + kAhead];
  const T* row[kChunk + kAhead];
  compute_t<T> grad[kChunk + kAhead];

  Terms(const Order& order, int64_t begin, bool cold, const T* grads, Ids other_ids, const Table<T>& other)
      : count(min(kChunk, order.count - begin)), known(min(kChunk + kAhead, order.count - begin)), cold(cold) {
    int64_t entry = begin / order.inner, j = begin % order.inner;
    uint64_t position_mask = (uint64_t{1} << order.shift) - 1;
    for (int64_t t = 0; t < known; ++t) {
      int64_t p = static_cast<int64_t>(order.packed[entry] & position_mask) * order.inner + j;
      id[t] = static_cast<int64_t>(order.packed[entry] >> order.shift);
      grad[t] = to_compute(grads[p]);
      row[t] = other.row(other_ids[order.outer == 1 ? p : p / order.outer]);
      if (cold && t < kAhead) other.prefetch(row[t]);
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
    if (other.far)
      for (int64_t t = first + kAhead; t < min(last + kAhead, known); ++t) other.prefetch(row[t]);
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

// ranks[c] = number of runs that begin before chunk c; returns the number of runs.
int64_t rank_runs(const Order& order, int64_t* ranks, int threads) {
  int64_t chunks = order.chunks();
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

// What a sink does with the sums, each called once for every id that occurs, by any thread:
//   run(terms, first, last, other, rank)   the id's terms are those of [first, last): sum them up
//   sum(id, rank, sums)                    its dim + 1 sums: weight gradient, then bias gradient
// `rank` numbers the ids that occur, increasing, where rank_runs has ranked them. `sink.weight`: whether to sum rows at all.

// Step 2 for one chunk. `rank`: runs that began before it. `partials`: two sums of dim + 1 numbers, for a run that began
// before the chunk and for one that begins in it and goes on after it; returns the rank of the latter, -1 if there is none.
template <class T, class Sink>
int64_t sum_chunk(const Sink& sink, const Terms<T>& terms, const Table<T>& other, bool begun_before, bool goes_on,
                  int64_t rank, compute_t<T>* partials) {
  int64_t spilled = -1;
  for (int64_t t = 0, last; t < terms.count; t = last) {
    last = t + 1;
    while (last < terms.count && terms.id[last] == terms.id[t]) ++last;
    bool ours = t > 0 || !begun_before;  // this run begins in this chunk
    if (ours && (last < terms.count || !goes_on)) {
      sink.run(terms, t, last, other, rank++);
      continue;
    }
    compute_t<T>* partial = partials + (ours ? other.dim + 1 : 0);
    if (sink.weight) terms.sum_rows(t, last, other, partial);
    partial[other.dim] = terms.sum_grads(t, last);
    if (ours) spilled = rank;
  }
  return spilled;
}

// Steps 2 and 3. `ranks`: of rank_runs, or nullptr.
template <class T, class Sink>
void sum_runs(const Sink& sink, const Order& order, const int64_t* ranks, const T* grads, Ids other_ids,
              const Table<T>& other, int threads) {
  using C = compute_t<T>;
  int64_t chunks = order.chunks(), width = other.dim + 1;
  auto* partials = static_cast<C*>(scratch(2, (2 * sizeof(C) * width + sizeof(int64_t)) * chunks));
  auto* spilled = reinterpret_cast<int64_t*>(partials + 2 * width * chunks);
  parallel_for(chunks, 4, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t c = first; c < last; ++c) {
      int64_t begin = c * kChunk, end = min(begin + kChunk, order.count);
      Terms<T> terms(order, begin, c == first, grads, other_ids, other);
      bool begun_before = !order.begins(begin), goes_on = end < order.count && !order.begins(end);
      spilled[c] = sum_chunk(sink, terms, other, begun_before, goes_on, ranks ? ranks[c] : 0, partials + 2 * width * c);
    }
    stream_end();  // the sink may have streamed
  });
  parallel_for(chunks, 4, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t c = first; c < last; ++c) {
      if (spilled[c] < 0) continue;
      C* sum = partials + 2 * width * c + width;
      int64_t id = order.id((c + 1) * kChunk);
      for (int64_t e = c + 1; e < chunks && order.id(e * kChunk) == id; ++e)
        for (int64_t d = sink.weight ? 0 : other.dim; d < width; ++d) sum[d] += partials[2 * width * e + d];
      sink.sum(id, spilled[c], sum);
    }
  });
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
