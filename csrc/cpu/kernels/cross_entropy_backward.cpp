// Softmax cross-entropy, backward: the gradient of the logits from those of the loss and the log-sum-exps. Notation, layout
// and edges are cross_entropy.cpp's.
//
//   dz_c = exp(z_c - lse) A - g (what of the target falls on c),   A = g ∑ of the target + 2 g w_t z_loss lse + grad_lse
//   dinput_c = dz_c (1 - tanh²(input_c / softcap)) where softcap > 0;   g: grad_loss of the row, divided by total for a mean
//
// Tiles   rows of 40 adjacent classes or more as they lie, others in gathered tiles; these are transposed back, or stored as
//         they are where rows are adjacent.
// Traffic of the logits: one read and one write, past the caches for a large gradient. One exp per element.
// Reads   the statistics of the forward: [maximum m, S, x]; exp(z_c - m) / S instead of exp(z_c - lse), and x for the label,
//         so that a confident row's gradient keeps its digits.
// Edges   grad_input may be the input itself: a row's tail and label are read before anything of it is written.
#include "cpu/kernels.h"
#include "cpu/kernels/cross_entropy_grad.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

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
  const bool streamed = is_streamed(out, z, o.rows);
  parallel_for((o.rows + chunk - 1) / chunk, 1, threads, [&](int64_t begin, int64_t end, int thread) {
    C *z_tile = tiles + thread * tile * 2, *y_tile = z_tile + tile;
    const int64_t stop = min(end * chunk, o.rows);
    for (int64_t r = begin * chunk, n; r < stop; r += n) {
      n = min(o.group(), stop - r);
      const Slopes<C> slopes = slopes_of<K>(o, r, n, grads, grad_lse.as<C>(), scale);
      if (!o.by_row) {
        z.gather(r, n, z_tile);
        if constexpr (K == soft) y.gather(r, n, y_tile);
      }
      grad_group<K, Capped>(o, o.by_row, streamed, out, z, y, z_tile, y_tile, false, slopes, r, n);
    }
    if (streamed) stream_end();
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
  PYFUSED_REQUIRE(grad_input.dtype == input.dtype && same_shape(grad_input, input), "grad_input", "must be like input");
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
