// Softmax cross-entropy, backward: the gradient of the logits from those of the loss and the log-sum-exps. Notation, layout
// and edges are cross_entropy.cpp's.
//
//   dz_c = exp(z_c - lse) A - g (what of the target falls on c),   A = g ∑ of the target + 2 g w_t z_loss lse + grad_lse
//   dinput_c = dz_c (1 - tanh²(input_c / softcap)) where softcap > 0;   g: grad_loss of the row, divided by total for a mean
//
// Tiles   rows of 40 adjacent classes or more as they lie, others in gathered tiles; these are transposed back, or stored as
//         they are where rows are adjacent.
// Traffic of the logits: one read and one write. One exp per element.
// Reads   the statistics of the forward: [maximum m, S, x]; exp(z_c - m) / S instead of exp(z_c - lse), and x for the label,
//         so that a confident row's gradient keeps its digits.
// Edges   grad_input may be the input itself: a row's tail and label are read before anything of it is written.
#include "cpu/kernels.h"
#include "cpu/kernels/cross_entropy.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

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
         x = load_first(o.stats + 2 * o.rows + r, n), w = o.weights_of(label, n), lse_slope{};
  Vec<C> g = o.reduction == none ? load_first(grad_loss + r, n) : splat(scale);
  if (o.z_loss != 0) lse_slope = g * w * (2 * o.z_loss) * (top + log1p(all - C(1)));
  Mask<C> live = ~Mask<C>{};
  if constexpr (K != soft) {
    live = label >= 0;
    g = live ? g : Vec<C>{};
    lse_slope = live ? lse_slope : Vec<C>{};
  }
  if (grad_lse) lse_slope += load_first(grad_lse + r, n);
  if constexpr (K == soft) return {top, (g * x + lse_slope) / all, g, g, live};
  Vec<C> mass = w * o.keep, at_label = g * mass * x + lse_slope * (x + C(1));
  if constexpr (K == smooth) {
    mass += o.spread * o.weight_sum;
    at_label += g * o.spread * (o.weight_sum * (x + C(1)) - w);
  }
  if (grad_lse) live = ~Mask<C>{};
  return {top, (g * mass + lse_slope) / all, g * o.spread, at_label, live};
}

template <Target K, bool Capped, class U, class C>
PYFUSED_INLINE Vec<C> slope(const Options<C>& o, Vec<C> x, Vec<C> top, Vec<C> factor, Vec<C> scale, const U* y,
                            Vec<C> w) {
  Vec<C> d = exp(x - top) * factor;
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
                             int lane) {
  constexpr int64_t width = lanes<C>;
  const Vec<C> top = splat<C>(s.top[lane]), factor = splat<C>(s.factor[lane]), scale = splat<C>(s.scale[lane]);
  auto grad = [&](int64_t c) {
    Vec<C> x = logits<Capped>(z + c, o.softcap);
    Vec<C> w = K != hard && o.weight ? load(o.weight + c) : splat(C(1));
    return uncap<Capped>(slope<K, Capped>(o, x, top, factor, scale, y + c, w), x, o.softcap);
  };
  // Out may be z: the overlapping last vector and the label's logit are read before anything is written.
  const int64_t last = o.classes - width;
  const Vec<C> tail = grad(last);
  const Vec<C> x_label = label < 0 ? Vec<C>{} : logits<Capped>(z + min(label, last), o.softcap);
  for (int64_t c = 0; c < last; c += width) store(out + c, grad(c));
  store(out + last, tail);
  if (label >= 0)
    out[label] =
        from_compute<T>(uncap<Capped>(splat<C>(s.at_label[lane]), x_label, o.softcap)[label - min(label, last)]);
}

template <Target K, bool Capped, class T, class C = compute_t<T>>
PYFUSED_INLINE void grad_tile(const Options<C>& o, T* out, int64_t stride, const C* z, const C* y, Mask<C> label,
                              const Slopes<C>& s) {
  constexpr int64_t width = lanes<C>;
  for (int64_t c = 0; c < o.classes; ++c) {
    Vec<C> x = logits<Capped>(z + c * width, o.softcap);
    Vec<C> d = slope<K, Capped>(o, x, s.top, s.factor, s.scale, y + c * width, splat(o.weight_of(c)));
    d = label == static_cast<int>(c) ? s.at_label : d;
    store(out + c * stride, s.live ? uncap<Capped>(d, x, o.softcap) : Vec<C>{});
  }
}

template <Target K, bool Capped, class T, class U>
Status backward(const View& grad_input, const View& grad_loss, const View& grad_lse, const View& input,
                const View& target, const View& total, const Options<compute_t<T>>& o, int threads) {
  using C = compute_t<T>;
  const Matrix<T> out(grad_input), z(input);
  const Matrix<U> y(K == soft ? target : input);
  const int64_t chunk = o.chunk(), tile = o.by_row ? 0 : o.classes * lanes<C>;
  auto* tiles = static_cast<C*>(scratch(1, threads * tile * 2 * sizeof(C)));
  const C* grads = grad_loss.as<C>();
  const C scale = o.reduction == none ? C(0) : o.reduction == mean ? grads[0] / total.as<C>()[0] : grads[0];
  parallel_for((o.rows + chunk - 1) / chunk, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    C *z_tile = tiles + thread * tile * 2, *y_tile = z_tile + tile;
    const int64_t stop = min(end * chunk, o.rows);
    for (int64_t r = begin * chunk, n; r < stop; r += n) {
      n = min(o.group(), stop - r);
      const Slopes<C> slopes = slopes_of<K>(o, r, n, grads, grad_lse.as<C>(), scale);
      const Mask<C> label = o.labels_of(r, n);
      if (!o.by_row) {
        z.gather(r, n, z_tile);
        if constexpr (K == soft) y.gather(r, n, y_tile);
        if (out.lanes_adjacent(r, n)) {
          grad_tile<K, Capped>(o, out.row(r), out.class_stride, z_tile, y_tile, label, slopes);
        } else {
          grad_tile<K, Capped>(o, z_tile, lanes<C>, z_tile, y_tile, label, slopes);
          out.scatter(r, n, z_tile);
        }
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        if (slopes.live[i])
          grad_row<K, Capped>(o, out.row(r + i), z.row(r + i), y.row(r + i), label[i], slopes, i);
        else
          std::memset(out.row(r + i), 0, o.classes * sizeof(T));
      }
    }
  });
  return {};
}

}  // namespace

Status cross_entropy_backward(View grad_input, View grad_loss, View grad_lse, View input, View target, View weight,
                              View stats, View total, int reduction, int64_t ignore_index, double label_smoothing,
                              double z_loss, double softcap, int threads) {
  if (Status s = check_cross_entropy(grad_loss, grad_lse, stats, total, input, target, weight, reduction);
      s.code != Status::ok)
    return s;
  PYFUSED_REQUIRE(grad_input.ndim == input.ndim && grad_input.dtype == input.dtype, "grad_input", "must be like input");
  for (int i = 0; i < input.ndim; ++i)
    PYFUSED_REQUIRE(grad_input.shape[i] == input.shape[i], "grad_input", "must be like input");
  return for_dtype(input.dtype, [&](auto type) {
    using T = decltype(type);
    Options<compute_t<T>> o(input, target, weight, stats, reduction, ignore_index, label_smoothing, z_loss, softcap);
    o.by_row = o.by_row && grad_input.strides[1] == 1;
    if (Status s = o.check_labels(); s.code != Status::ok) return s;
    return specialize<T>(target, label_smoothing, softcap, [&](auto kind, auto capped, auto t, auto u) {
      return backward<kind(), capped(), decltype(t), decltype(u)>(grad_input, grad_loss, grad_lse, input, target, total,
                                                                  o, threads);
    });
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
