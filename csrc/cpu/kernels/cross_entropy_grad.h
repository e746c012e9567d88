// The gradient of cross_entropy for a group of rows, from their logits and statistics: all of the backward, whose formula,
// tiles and edges stand in cross_entropy_backward.cpp, and what the forward does when it writes the gradient as well.
#pragma once
#include "cpu/kernels/cross_entropy.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

template <class C>
struct Slopes {  // one lane per row
  Vec<C> top, factor, scale, at_label;
  Mask<C> live;
};

template <Target K, class C>
PYFUSED_INLINE Slopes<C> slopes_of(const Options<C>& o, int64_t r, int64_t n, const C* grad_loss, const C* grad_lse,
                                   C scale) {
  Mask<C> label = o.labels_of(r, n);
  Vec<C> top = load_first(o.stats + r, n), all = load_first(o.stats + o.rows + r, n, C(1)),
         odds = load_first(o.stats + 2 * o.rows + r, n), w = o.weights_of(label, n), lse_slope{};
  Vec<C> g = o.reduction == none ? load_first(grad_loss + r, n) : splat(scale);
  if (o.z_loss != 0) lse_slope = g * w * (2 * o.z_loss) * (top + log1p(all - C(1)));
  Mask<C> live = ~Mask<C>{};
  if constexpr (K != soft) {
    live = label >= 0;
    g = live ? g : Vec<C>{};
    lse_slope = live ? lse_slope : Vec<C>{};
  }
  if (grad_lse) lse_slope += load_first(grad_lse + r, n);
  if constexpr (K == soft) return {top, (g * odds + lse_slope) / all, g, g, live};
  Vec<C> p_label = C(1) / (C(1) + odds);
  Vec<C> mass = w * o.keep, at_label = lse_slope * p_label - g * mass / (C(1) + C(1) / odds);
  if constexpr (K == smooth) {
    mass += o.spread * o.weight_sum;
    at_label += g * o.spread * (o.weight_sum * p_label - w);
  }
  if (grad_lse) live = ~Mask<C>{};
  return {top, (g * mass + lse_slope) / all, g * o.spread, at_label, live};
}

template <Target K, class U, class C>
PYFUSED_INLINE Vec<C> slope(const Options<C>& o, Vec<C> e, Vec<C> factor, Vec<C> scale, const U* y, Vec<C> w) {
  Vec<C> d = e * factor;
  if constexpr (K != hard) d -= scale * spread_target<K>(o, y, w);
  return d;
}
template <bool Capped, class C>
PYFUSED_INLINE Vec<C> uncap(Vec<C> d, Vec<C> x, C softcap) {  // times dz / d input = 1 - tanh²
  if constexpr (Capped) d *= (C(1) - x / softcap) * (C(1) + x / softcap);
  return d;
}

template <Target K, bool Capped, class T, class U, class C = compute_t<T>>
PYFUSED_INLINE void grad_row(const Options<C>& o, T* out, const T* z, const U* y, int64_t label, const Slopes<C>& s,
                             int lane, bool streamed) {
  constexpr int64_t width = lanes<C>, line = 64 / sizeof(T);
  const Vec<C> top = splat<C>(s.top[lane]), factor = splat<C>(s.factor[lane]), scale = splat<C>(s.scale[lane]);
  auto grad = [&](int64_t c) {
    Vec<C> x = logits<Capped>(z + c, o.softcap);
    Vec<C> w = K != hard && o.weight ? load(o.weight + c) : splat(C(1));
    return uncap<Capped>(slope<K>(o, exp(x - top), factor, scale, y + c, w), x, o.softcap);
  };
  // Out may be z: the overlapping last vector and the label's logit are read before anything is written.
  const int64_t last = o.classes - width;
  const Vec<C> tail = grad(last);
  const Vec<C> x_label = label < 0 ? Vec<C>{} : logits<Capped>(z + min(label, last), o.softcap);
  int64_t c = 0;
  if (streamed) {
    const int64_t first = -(reinterpret_cast<intptr_t>(out) / int64_t{sizeof(T)}) & (line - 1);  // of a whole line
    for (; c < first; c += width) store(out + c, grad(c));
    for (c = first; c + line <= o.classes; c += line) {
      T numbers[line];
      for (int64_t i = 0; i < line; i += width) store(numbers + i, grad(c + i));
      stream(out + c, numbers, 64);
    }
  }
  for (; c < last; c += width) store(out + c, grad(c));
  store(out + last, tail);
  if (label >= 0)
    out[label] =
        from_compute<T>(uncap<Capped>(splat<C>(s.at_label[lane]), x_label, o.softcap)[label - min(label, last)]);
}

// `exps`: z holds exp(z - top) already.
template <Target K, bool Capped, class T, class C = compute_t<T>>
PYFUSED_INLINE void grad_tile(const Options<C>& o, T* out, int64_t stride, const C* z, const C* y, Mask<C> label,
                              const Slopes<C>& s, bool exps) {
  constexpr int64_t width = lanes<C>;
  for (int64_t c = 0; c < o.classes; ++c) {
    Vec<C> x = logits<Capped>(z + c * width, o.softcap), e = exps ? x : exp(x - s.top);
    Vec<C> d = slope<K>(o, e, s.factor, s.scale, y + c * width, splat(o.weight_of(c)));
    d = label == static_cast<int>(c) ? s.at_label : d;
    store(out + c * stride, s.live ? uncap<Capped>(d, x, o.softcap) : Vec<C>{});
  }
}

// Whether rows go past the caches, which saves reading their memory before it is written: a gradient larger than most
// third-level caches. Measured with its consumer, two products with 32 to 64 features: 131 MB equal (the kernels alone
// 1.2 times as fast), 4 to 32 MB up to 1.3 times as slow.
template <class T>
bool is_streamed(const Matrix<T>& out, const Matrix<T>& z, int64_t rows) {
  return out.data != z.data && rows * out.classes * int64_t{sizeof(T)} > (64 << 20);
}

// The rows r, ..., r + n - 1; as they lie (`by_row`), or from their tiles, of which that of z is overwritten.
template <Target K, bool Capped, class T, class U, class C = compute_t<T>>
PYFUSED_INLINE void grad_group(const Options<C>& o, bool by_row, bool streamed, const Matrix<T>& out,
                               const Matrix<T>& z, const Matrix<U>& y, C* z_tile, const C* y_tile, bool exps,
                               const Slopes<C>& s, int64_t r, int64_t n) {
  const Mask<C> label = o.labels_of(r, n);
  if (by_row) {
    for (int64_t i = 0; i < n; ++i) {
      if (s.live[i])
        grad_row<K, Capped>(o, out.row(r + i), z.row(r + i), y.row(r + i), label[i], s, i, streamed);
      else
        std::memset(out.row(r + i), 0, o.classes * sizeof(T));
    }
  } else if (out.lanes_adjacent(r, n)) {
    grad_tile<K, Capped>(o, out.row(r), out.class_stride, z_tile, y_tile, label, s, exps);
  } else {
    grad_tile<K, Capped>(o, z_tile, lanes<C>, z_tile, y_tile, label, s, exps);
    out.scatter(r, n, z_tile);
  }
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
