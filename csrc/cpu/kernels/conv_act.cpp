// The passes around a convolution that another kernel computes: residual and activation, and their gradient with the bias
// gradient.
//
//   conv_act        z += residual;  out = act(z)          in place where out is z, which then is not needed again
//   conv_act_grad   g = grad · act'(saved);  d_bias[c] = ∑ g[:, c]       saved: z, or out where act' follows from it
//
// Both layouts; z, out and residual in the same one. Floor: memory bandwidth, 2T bytes an element in place and 2T more
// with a residual that z has to keep; 3T in backward. GELU takes 25 instructions a vector, a half of that time at most.
// Bits do not depend on the threads.
#include "activation.h"
#include "conv2d_grad.h"
#include "cpu/kernels.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kBlock = 1024;

struct Derivative {
  int activation;
  double slope;
  template <class C, class S>
  PYFUSED_INLINE Vec<C> of(Vec<C> grad, Vec<C> saved) const {
    Vec<C> d = derivative<C>(activation, static_cast<C>(slope), saved);
    return d == 0 ? Vec<C>{} : grad * d;  // nothing flows where nothing may, not even an inf
  }
};

bool same_layout(const View& a, const View& b) {
  return same_shape(a, b) && a.dtype == b.dtype && ((is_nhwc(a) && is_nhwc(b)) || (is_nchw(a) && is_nchw(b)));
}

}  // namespace

Status conv_act(View out, View z, View residual, int activation, double slope, int threads) {
  PYFUSED_REQUIRE(same_layout(out, z), "out", "must have the shape, dtype and layout of z");
  PYFUSED_REQUIRE(!residual || same_layout(residual, z), "residual", "must have the shape, dtype and layout of z");
  PYFUSED_REQUIRE(activation >= 0 && activation < kActivations, "activation", "is unknown");
  int64_t count = z.numel();
  return for_dtype(z.dtype, [&](auto tag) {
    using T = decltype(tag);
    using C = compute_t<T>;
    T *to = out.as<T>(), *at = z.as<T>();
    const T* add = residual.as<T>();
    parallel_for(ceil_div(count, kBlock), 16, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin * kBlock; i < min(count, end * kBlock); i += lanes<C>) {
        int64_t n = min<int64_t>(count - i, lanes<C>);
        Vec<C> x = read<C>(at + i, n);
        if (add) {
          x += read<C>(add + i, n);
          if (to != at) write<C>(at + i, x, n);
        }
        write<C>(to + i, activate<C>(activation, static_cast<C>(slope), x), n);
      }
    });
    return Status{};
  });
}

Status conv_act_grad(View g, View d_bias, View grad, View saved, int activation, double slope, int threads) {
  PYFUSED_REQUIRE(activation >= 0 && activation < kActivations, "activation", "is unknown");
  return grad_pass<false>(g, d_bias, grad, saved, threads, Derivative{activation, slope});
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
