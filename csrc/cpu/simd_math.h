// Elementary functions of vectors of float and double, each within 2 units in the last place of the exact value
// (tests/test_cross_entropy.py measures it). -inf, +inf and NaN keep their meaning.
#pragma once
#include <cmath>

#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {

template <class C>
PYFUSED_INLINE C reduce_max(Vec<C> v) {
  return fold<C>(v, [](auto a, auto b) { return a < b ? b : a; });
}

// e^x for x <= 88 (float) or 709 (double); results below the smallest normal number are 0. x = n ln 2 + r: the sum with
// a large constant rounds x / ln 2 to an integer and leaves n + bias in the low bits, from where a shift makes 2^n. In
// float, 1 + r + r² P(r) with the P of degree 4 whose largest relative error is smallest, 3e-9.
PYFUSED_INLINE Vec<float> exp(Vec<float> x) {
  const float shift = 0x1.8p23f + 127;
  Vec<float> t = x * 0x1.715476p0f + shift, n = t - shift;
  Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  const auto normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.33654f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);  // p 2^n in one instruction
#else
  Vec<float> y = p * (Vec<float>)((VecI32)t << 23);
  return x < -87.33654f ? Vec<float>{} : y;
#endif
}
PYFUSED_INLINE Vec<double> exp(Vec<double> x) {
  const double shift = 0x1.8p52 + 1023;
  Vec<double> t = x * 0x1.71547652b82fep0 + shift, n = t - shift;
  Vec<double> r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6, s = r * r;
  Vec<double> p = (s * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * s + 1.0;
  Vec<double> q =
      ((s * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * s + 2.27265548208155028766e-1) * s + 2.0;
  p = p * r;
  Vec<double> y = (2 * p / (q - p) + 1.0) * (Vec<double>)((Mask<double>)t << 52);
  return x < -708.39641 ? Vec<double>{} : y;
}

// log(1 + x) for x >= 0, exact to the last bits also for tiny x: what 1 + x rounds away is added to the logarithm.
PYFUSED_INLINE Vec<float> log1p(Vec<float> x) {
  Vec<float> u = 1.0f + x, lost = (x - (u - 1.0f)) / u;
  VecI32 bits = (VecI32)u;
  VecI32 exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> r = (Vec<float>)(bits - (exponent << 23)) - 1.0f, s = r * r;
  Vec<float> p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  Vec<float> tail = p * r * s - e * 2.12194440e-4f - 0.5f * s + lost;
  Vec<float> y = tail + r + e * 0.693359375f;
  return x < __builtin_inff() ? y : x;  // inf and NaN
}
PYFUSED_INLINE Vec<double> log1p(Vec<double> x) {  // once per row, so the C library's will do
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}

// Near 0 a rational function keeps the relative precision; elsewhere 1 - 2 e^-2|x| / (1 + e^-2|x|), whose last step alone
// rounds a number near 1.
template <class C, class V = Vec<C>>
PYFUSED_INLINE V tanh(V x) {
  V a = x < 0 ? -x : x, s = x * x;
  V p = (s * C(-9.64399179425052238628e-1) - C(9.92877231001918586564e1)) * s - C(1.61468768441708447952e3);
  V q = ((s + C(1.12811678491632931402e2)) * s + C(2.23548839060100448583e3)) * s + C(4.84406305325125486048e3);
  V e = exp(-2 * a), far = 1 - 2 * (e / (1 + e));
  return a < C(0.625) ? x + x * s * (p / q) : (x < 0 ? -far : far);
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
