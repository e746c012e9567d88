// Activations and their derivatives, on vectors. Numbered as ACTIVATIONS on the page ops/conv_act.py.
//
// value       at z; inf, NaN and the edges of the piecewise ones as in PyTorch, but GELU of inf is inf, not NaN
// derivative  at z, or, for the first four (slope > 0), at the activation's output, where it is the same number
//
// Error       GELU 1e-7 absolute in float; the others a few units in the last place.
#pragma once
#include "cpu/simd_math.h"

namespace pyfused {
namespace PYFUSED_ISA {

enum Activation : int { kNone, kRelu, kLeakyRelu, kRelu6, kHardswish, kSilu, kGelu, kGeluTanh, kActivations };

// σ(x) and 1 - σ(x), each to the last bits.
template <class C>
struct Sigmoid {
  Vec<C> value, rest;
  PYFUSED_INLINE explicit Sigmoid(Vec<C> x) {
    Vec<C> e = exp(x < 0 ? x : -x), high = 1 / (1 + e), low = e * high;  // e is at most 1: no overflow
    value = x < 0 ? low : high;
    rest = x < 0 ? high : low;
  }
};

// The normal distribution's Φ(x), with bell = e^(-x²/2). Φ(-|x|) / bell is smooth: in float t P(t), t = 1 / (1 + p |x|),
// with P of degree 7 and p fitted to the least relative error, 1e-7.
PYFUSED_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float> bell) {
  Vec<float> t = 1.0f / (1.0f + 0.305f * (x < 0 ? -x : x));
  Vec<float> p = t * 3.66993038e-2f - 1.52988791e-1f;
  p = p * t + 1.85717737e-1f;
  p = p * t - 3.79776024e-2f;
  p = p * t + 1.21022089e-1f;
  p = p * t + 1.03420743e-1f;
  p = p * t + 1.22466836e-1f;
  p = p * t + 1.21639731e-1f;
  Vec<float> tail = p * t * bell;
  return x < 0 ? tail : 1.0f - tail;
}
PYFUSED_INLINE Vec<double> normal_cdf(Vec<double> x, Vec<double>) {  // double is rare: the C library's will do
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * __builtin_erfc(-0x1.6a09e667f3bcdp-1 * x[i]);
  return x;
}

// The tanh form of GELU is x sigmoid(v), v = √(8/π) (x + 0.044715 x³).
constexpr double kTanhLinear = 1.5957691216057308, kTanhCubic = kTanhLinear * 0.044715;

template <class C, class V = Vec<C>>
PYFUSED_INLINE V activate(int kind, C slope, V x) {
  switch (kind) {
    case kRelu:
      return x <= 0 ? V{} : x;
    case kLeakyRelu:
      return x > 0 ? x : x * slope;
    case kRelu6:
      return x <= 0 ? V{} : x >= 6 ? splat<C>(6) : x;
    case kHardswish: {
      V shifted = x + 3;
      return x * (shifted <= 0 ? V{} : shifted >= 6 ? splat<C>(6) : shifted) / 6;
    }
    case kSilu:
      return x * Sigmoid<C>(x).value;
    case kGelu:
      return x * normal_cdf(x, exp(x * x * C(-0.5)));
    case kGeluTanh:
      return x * Sigmoid<C>(x * (C(kTanhLinear) + C(kTanhCubic) * x * x)).value;
    default:
      return x;
  }
}

template <class C, class V = Vec<C>>
PYFUSED_INLINE V derivative(int kind, C slope, V z) {
  V zero{}, one = splat<C>(1);
  switch (kind) {
    case kRelu:
      return z <= 0 ? zero : one;
    case kLeakyRelu:
      return z > 0 ? one : splat<C>(slope);
    case kRelu6:
      return z <= 0 ? zero : z >= 6 ? zero : one;
    case kHardswish:
      return z <= -3 ? zero : z >= 3 ? one : z / 3 + C(0.5);
    case kSilu: {
      Sigmoid<C> s(z);
      return s.value * (1 + z * s.rest);
    }
    case kGelu: {
      V bell = exp(z * z * C(-0.5));
      return normal_cdf(z, bell) + z * bell * C(0.3989422804014327);  // 1 / √(2π)
    }
    case kGeluTanh: {
      Sigmoid<C> s(z * (C(kTanhLinear) + C(kTanhCubic) * z * z));
      return s.value + z * s.value * s.rest * (C(kTanhLinear) + 3 * C(kTanhCubic) * z * z);
    }
    default:
      return one;
  }
}

// The epilogue of a convolution: what becomes of the `count` channels from `offset` on of an output like the residual.
struct AddAndActivate {
  const float* residual;  // or nullptr
  int activation;
  float slope;
  PYFUSED_INLINE Vec<float> operator()(Vec<float> value, int64_t offset, int64_t count) const {
    const float* add = residual + offset;
    if (residual) value += count >= lanes<float> ? load(add) : load_first(add, count);
    return activate<float>(activation, slope, value);
  }
  PYFUSED_INLINE void prefetch(int64_t offset) const {
    if (residual) __builtin_prefetch(residual + offset);
  }
};

}  // namespace PYFUSED_ISA
}  // namespace pyfused
