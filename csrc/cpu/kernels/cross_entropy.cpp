// Softmax cross-entropy, forward, on logits z[r, c] of R rows and C classes; cross_entropy_backward.cpp has its gradient.
//
//   lse = log ∑_c exp(z_c)                                    z = softcap · tanh(input / softcap) where softcap > 0
//   hard   loss_r = w_t (1-ε) (lse - z_t) + ε/C ∑_c w_c (lse - z_c) + w_t z_loss lse²         label t, class weights w
//   soft   loss_r = ∑_c w_c ((1-ε) y_c + ε/C) (lse - z_c) + z_loss lse²                       probabilities y
//   loss   = ∑_r loss_r (sum), / total (mean; total = ∑_r w_t of rows not ignored, R for soft), or every loss_r (none)
//
// Layout  input [R, C] or [N, C, P] (R = N·P) with any strides. Rows with adjacent classes, 40 or more (200 float32 in the
//         forward), are read as they lie, vectors along the classes. All others (few classes, class dimension not
//         innermost) are gathered, as many rows as a vector has lanes, into a C x lanes tile, vectors across the rows:
//         no permuted copy, no tails. Adjacent classes come into the tile and out of it by transposing blocks of
//         lanes x lanes in registers, 4 shuffles for 16 numbers; one number at a time they took as long as the
//         exponentials.
// Traffic of the logits: read once from memory, a block of a row at a time (maximum, then sum, out of the L1 cache, while
//         the next block is fetched). With a read and a write in backward 3 R C elements in all; 2 R C if the gradient for
//         a known grad_loss is written right here (grad_input), row by row, while the logits are in the L2 cache.
//         Arithmetic: one exp per element each way, about 15 vector instructions. For float32 with 16 lanes that is a
//         cycle for two elements, less than the 8 bytes of the gradient take from memory on one core.
// Saves   per row [maximum m, S = ∑ exp(z - m), odds o], o = ∑_{c≠t} exp(z_c - z_t) = 1 / p_t - 1 (soft: ∑ of the target).
//         The sums leave the label out: the loss log1p(o) and the gradient -1 / (1 + 1 / o) keep every digit of a
//         confident row, where 1 - p_t rounds to 0. m and S instead of lse: so does a row with a large common offset.
// Sums    rows to lanes, lanes to chunks in double, in an order that depends on the shape only, not on the threads.
// Edges   Ignored rows: loss 0, gradient 0 even where the logits are NaN. A row with +inf, NaN or nothing but -inf: NaN.
//         -inf next to finite logits: probability 0. R = 0 or all ignored: mean NaN, sum 0. A label outside [0, C) that
//         is not ignore_index stops the kernel before anything is written. grad_input has, bit by bit, what the backward
//         would write; grad_loss is one number, so not for reduction none, and not with class weights, whose total is
//         known too late.
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/kernels/cross_entropy_grad.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // classes of a row that stay in the L1 cache between their maximum and their sum
constexpr int64_t kPart = 16;  // vectors summed before their sum is added: beside a 1 in it terms of 1e-8 would be lost

template <class C>
struct Sums {                          // what one pass over the logits of a group finds, one lane per row
  Vec<C> top{}, others{}, at_label{};  // maximum; ∑ exp(z - top) without the label; the label's logit
  Vec<C> spread{}, mass{};             // ∑ u (top - z) and ∑ u
};

// Lane by lane, the maximum of so many vectors that lie one behind the other. One running maximum would wait for itself.
template <class T, class C = compute_t<T>>
PYFUSED_INLINE Vec<C> maxima(const T* z, int64_t vectors) {
  const Vec<C> least = splat(-C(__builtin_inf()));
  Vec<C> tops[4] = {least, least, least, least};
  int64_t i = 0;
  for (; i + 4 <= vectors; i += 4)
    for (int k = 0; k < 4; ++k) tops[k] = max<Vec<C>>(load(z + (i + k) * lanes<C>), tops[k]);
  for (; i < vectors; ++i) tops[0] = max<Vec<C>>(load(z + i * lanes<C>), tops[0]);
  return max(max(tops[0], tops[1]), max(tops[2], tops[3]));
}

// Block by block, because the whole row's maximum is known only once all of it has been read: what was summed before a
// larger maximum was found is scaled (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018).
template <Target K, bool Capped, class T, class U, class C = compute_t<T>>
PYFUSED_INLINE void reduce_row(const Options<C>& o, const T* z, const U* y, int64_t label, int lane, Sums<C>& out) {
  constexpr int64_t width = lanes<C>;
  C top{}, base{};  // the maximum so far; what is subtracted: the same, but finite where all so far is -inf
  Vec<C> others{}, spread{}, mass{};
  struct {
    Vec<C> others{}, spread{}, mass{};
  } part;
  auto add = [&](int64_t c, Mask<C> counted) {
    Vec<C> x = logits<Capped>(z + c, o.softcap), e = exp(x - base);
    // Compared, not branched on: a branch on where the label lies is mispredicted once per row.
    part.others += (counted & (lane_numbers<C>() != static_cast<int>(label - c))) ? e : Vec<C>{};
    if constexpr (K != hard) {
      Vec<C> u = spread_target<K>(o, y + c, o.weight ? load(o.weight + c) : splat(C(1)));
      part.spread += counted ? u * (base - x) : Vec<C>{};
      part.mass += counted ? u : Vec<C>{};
    }
  };
  auto add_part = [&] {
    others += part.others;
    if constexpr (K != hard) spread += part.spread, mass += part.mass;
    part = {};
  };
  for (int64_t begin = 0, end; begin < o.classes; begin = end) {
    end = o.classes - begin < 2 * kBlock ? o.classes : begin + kBlock;  // no block is shorter than a vector
    // No scalar tail: a last vector overlaps the one before it.
    C found = reduce_max<C>(max(maxima(z + begin, (end - begin) / width), load(z + end - width)));
    if constexpr (Capped) found = (o.softcap * tanh<C>(splat(found) / o.softcap))[0];
    if (begin == 0 || found > top) {
      const C raised = max<C>(found, -(sizeof(C) == 4 ? __FLT_MAX__ : __DBL_MAX__));
      if (begin > 0) {
        others *= exp(splat(base - raised));
        spread += mass * (raised - base);
      }
      top = found;
      base = raised;
    }
    int64_t c = begin;
    while (c + width <= end) {
      for (const int64_t stop = min(c + kPart * width, end); c + width <= stop; c += width) {
        __builtin_prefetch(z + c + (end - begin));  // the next block, or what follows the row: mostly the next row
        add(c, ~Mask<C>{});
      }
      add_part();
    }
    if (c < end) add(end - width, lane_numbers<C>() >= static_cast<int>(c - (end - width)));
    add_part();
  }
  if (label >= 0) {
    const int64_t at = min(label, o.classes - width);
    out.at_label[lane] = logits<Capped>(z + at, o.softcap)[label - at];
  }
  out.top[lane] = top;
  out.others[lane] = reduce_add(others) + (base - top) * 0;  // NaN where all is -inf
  out.spread[lane] = reduce_add(spread);
  out.mass[lane] = reduce_add(mass);
}

// z is the tile: where only the label's logit is wanted of it besides the sum, it leaves the tile for -inf, and no class
// need be compared with the label. `keep_exps`: afterwards the tile holds exp(z - top), but for the label.
template <Target K, bool Capped, class C>
PYFUSED_INLINE void reduce_tile(const Options<C>& o, C* z, const C* y, Mask<C> label, bool keep_exps, Sums<C>& out) {
  constexpr int64_t width = lanes<C>;
  Vec<C> top = maxima(z, o.classes);
  if constexpr (Capped) top = o.softcap * tanh<C>(top / o.softcap);
  out.top = top;
  if constexpr (K == hard && !Capped) {
    for (int l = 0; l < width; ++l) {
      if (label[l] < 0) continue;
      C& at = z[label[l] * width + l];
      out.at_label[l] = at;
      at = -C(__builtin_inf());
    }
    for (int64_t c = 0; c < o.classes;) {
      Vec<C> part{};
      for (const int64_t stop = min(c + kPart, o.classes); c < stop; ++c) {
        const Vec<C> e = exp(load(z + c * width) - top);
        part += e;
        if (keep_exps) store(z + c * width, e);
      }
      out.others += part;
    }
    return;
  }
  for (int64_t c = 0; c < o.classes;) {
    Vec<C> others{}, spread{}, mass{};
    for (const int64_t stop = min(c + kPart, o.classes); c < stop; ++c) {
      Vec<C> x = logits<Capped>(z + c * width, o.softcap), e = exp(x - top);
      if (keep_exps) store(z + c * width, e);
      Mask<C> mine = label == static_cast<int>(c);
      others += mine ? Vec<C>{} : e;
      out.at_label = mine ? x : out.at_label;
      if constexpr (K != hard) {
        Vec<C> u = spread_target<K>(o, y + c * width, splat(o.weight_of(c)));
        spread += u * (top - x);
        mass += u;
      }
    }
    out.others += others;
    if constexpr (K != hard) out.spread += spread, out.mass += mass;
  }
}

// One double per lane.
template <class C>
struct WideOf {
  typedef double type __attribute__((vector_size(sizeof(double) * lanes<C>)));
};
template <class C>
struct Totals {
  typename WideOf<C>::type loss{}, weight{};
};

// Losses, statistics and log-sum-exps of one group from its sums; adds its losses and weights to each lane's total.
template <Target K, class C>
PYFUSED_INLINE void finish_group(const Options<C>& o, const Sums<C>& s, int64_t r, int64_t n, C* losses, C* lses,
                                 Totals<C>& total) {
  Mask<C> label = o.labels_of(r, n);
  Vec<C> w = o.weights_of(label, n), at_label = label >= 0 ? exp(s.at_label - s.top) : Vec<C>{};
  // S - 1, which is exactly the sum of the others where the label has the maximum (at_label = 1)
  Vec<C> log_sum = log1p(s.others + (at_label - C(1))), all = s.others + at_label, lse = s.top + log_sum, loss;
  if constexpr (K == soft)
    loss = s.mass * log_sum + s.spread;
  else
    loss = w * o.keep * ((s.top - s.at_label) + log_sum);
  if constexpr (K == smooth) loss += o.spread * (s.mass * log_sum + s.spread);
  if (o.z_loss != 0) loss += o.z_loss * w * lse * lse;
  if constexpr (K != soft)
    loss = label >= 0 ? loss : Vec<C>{};
  else
    loss = lane_numbers<C>() < static_cast<int>(n) ? loss : Vec<C>{};
  store_first(o.stats + r, s.top, n);
  store_first(o.stats + o.rows + r, all, n);
  store_first(o.stats + 2 * o.rows + r, K == soft ? s.mass : s.others / at_label, n);
  if (lses) store_first(lses + r, lse, n);
  if (o.reduction == none) store_first(losses + r, loss, n);
  total.loss += __builtin_convertvector(loss, typename WideOf<C>::type);
  total.weight += __builtin_convertvector(w, typename WideOf<C>::type);
}

template <Target K, bool Capped, class T, class U>
Status forward(const View& loss, const View& lse, const View& total, const View& grad_input, const View& input,
               const View& target, const Options<compute_t<T>>& o, bool grad_by_row, double grad_loss, int threads) {
  using C = compute_t<T>;
  const Matrix<T> z(input), out(grad_input ? grad_input : input);
  const Matrix<U> y(K == soft ? target : input);
  const int64_t chunk = o.chunk(), chunks = (o.rows + chunk - 1) / chunk, tile = o.by_row ? 0 : o.classes * lanes<C>;
  const bool exps = grad_input && !Capped && !o.by_row && !grad_by_row;  // tiles give the gradient their exponentials
  const bool streamed = grad_input && is_streamed(out, z, o.rows);
  const C scale = grad_input && o.reduction == mean ? C(grad_loss) / C(o.counted()) : C(grad_loss);
  auto* partial = static_cast<double (*)[2]>(scratch(0, chunks * sizeof(double[2])));
  auto* tiles = static_cast<C*>(scratch(1, threads * tile * 2 * sizeof(C)));
  parallel_for(chunks, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    C *z_tile = tiles + thread * tile * 2, *y_tile = z_tile + tile;
    for (int64_t k = begin; k < end; ++k) {
      Totals<C> total;
      const int64_t stop = min((k + 1) * chunk, o.rows);
      for (int64_t r = k * chunk, n; r < stop; r += n) {
        n = min(o.group(), stop - r);
        Sums<C> sums;
        if (o.by_row) {
          for (int64_t i = 0; i < n; ++i) {
            sums.others[i] = 1;  // what an ignored row keeps: finite statistics
            if (!lse && o.ignored(r + i)) continue;
            const int64_t label = K == soft || o.ignored(r + i) ? -1 : o.labels[r + i];
            reduce_row<K, Capped>(o, z.row(r + i), y.row(r + i), label, i, sums);
          }
        } else {
          z.gather(r, n, z_tile);
          if constexpr (K == soft) y.gather(r, n, y_tile);
          reduce_tile<K, Capped>(o, z_tile, y_tile, o.labels_of(r, n), exps, sums);
        }
        finish_group<K>(o, sums, r, n, loss.as<C>(), lse.as<C>(), total);
        if (grad_input)
          grad_group<K, Capped>(o, grad_by_row, streamed, out, z, y, z_tile, y_tile, exps,
                                slopes_of<K, C>(o, r, n, nullptr, nullptr, scale), r, n);
      }
      partial[k][0] = partial[k][1] = 0;
      for (int l = 0; l < lanes<C>; ++l) {
        partial[k][0] += total.loss[l];
        partial[k][1] += total.weight[l];
      }
    }
    if (streamed) stream_end();
  });
  double sums[2] = {0, 0};
  for (int64_t k = 0; k < chunks; ++k)
    for (int i = 0; i < 2; ++i) sums[i] += partial[k][i];
  total.as<C>()[0] = sums[1];
  if (o.reduction != none) loss.as<C>()[0] = o.reduction == mean ? sums[0] / sums[1] : sums[0];
  return {};
}

}  // namespace

Status cross_entropy(View loss, View lse, View stats, View total, View grad_input, View input, View target, View weight,
                     int reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                     double grad_loss, int threads) {
  if (Status s = check_cross_entropy(loss, lse, stats, total, input, target, weight, reduction); s.code != Status::ok)
    return s;
  if (grad_input) {
    PYFUSED_REQUIRE(reduction != none && !weight, "grad_input", "needs a reduction and no class weights");
    PYFUSED_REQUIRE(grad_input.dtype == input.dtype && same_shape(grad_input, input), "grad_input",
                    "must be like input");
  }
  return for_dtype(input.dtype, [&](auto type) {
    using T = decltype(type);
    Options<compute_t<T>> o(input, target, weight, stats, reduction, ignore_index, label_smoothing, z_loss, softcap);
    const bool grad_by_row = o.by_row && grad_input && grad_input.strides[1] == 1;
    o.by_row = o.by_row && o.classes >= (o.labels ? kByRowForward<compute_t<T>> : kByRowForwardSoft<compute_t<T>>);
    if (Status s = o.check_labels(); s.code != Status::ok) return s;
    return specialize<T>(target, label_smoothing, softcap, [&](auto kind, auto capped, auto t, auto u) {
      return forward<kind(), capped(), decltype(t), decltype(u)>(loss, lse, total, grad_input, input, target, o,
                                                                 grad_by_row, grad_loss, threads);
    });
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
