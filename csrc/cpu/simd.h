// The vectors every CPU kernel is written in: GCC/Clang vector extensions, so +, *, < and ?: work on whole vectors and
// the same source compiles to SSE2, AVX2 + FMA or AVX-512 (a * b + c contracts to one FMA where there is one). Storage
// types float, double, bf16, f16; 16-bit types are converted on load and store and computed in float.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "tensor_view.h"

namespace pyfused {
namespace PYFUSED_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Compute {  // the type that arithmetic and accumulation use for tensors of T
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class C>
struct VecOf {
  typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vec = typename VecOf<C>::type;  // C = float or double; Vec<C> < Vec<C> gives an integer mask for ?:
template <class C>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
using Mask = decltype(Vec<C>{} < Vec<C>{});  // also the vector of integers as wide as C

template <class C, int... lane>
PYFUSED_INLINE Mask<C> lanes_from(std::integer_sequence<int, lane...>) {
  return Mask<C>{lane...};  // an initialiser, because GCC makes no constant of a loop
}
template <class C>
PYFUSED_INLINE Mask<C> lane_numbers() {
  return lanes_from<C>(std::make_integer_sequence<int, lanes<C>>());
}

template <class N>
PYFUSED_INLINE N min(N a, N b) {
  return b < a ? b : a;
}
template <class N>
PYFUSED_INLINE constexpr N max(N a, N b) {
  return a < b ? b : a;
}
PYFUSED_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- Scalars
PYFUSED_INLINE float to_compute(float x) { return x; }
PYFUSED_INLINE double to_compute(double x) { return x; }
PYFUSED_INLINE float to_compute(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
template <class T>
T from_compute(compute_t<T> x);
template <>
PYFUSED_INLINE float from_compute<float>(float x) {
  return x;
}
template <>
PYFUSED_INLINE double from_compute<double>(double x) {
  return x;
}
template <>
PYFUSED_INLINE bf16 from_compute<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// --- Whole vectors, unaligned
template <class C>
PYFUSED_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};  // x - 0, not x + 0: keeps the sign of -0
}
PYFUSED_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PYFUSED_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PYFUSED_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
PYFUSED_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

PYFUSED_INLINE Vec<float> load(const bf16* p) {
  VecU16 half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, VecU32) << 16);
}
PYFUSED_INLINE void store(bf16* p, Vec<float> v) {
  VecU32 bits = (VecU32)v;
  VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  VecU32 nan = (VecU32)(v != v);
  VecU16 half = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), VecU16);
  std::memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
PYFUSED_INLINE Vec<float> load(const f16* p) {
  __m256i half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)_mm512_cvtph_ps(half);
}
PYFUSED_INLINE void store(f16* p, Vec<float> v) {
  __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
}
#elif defined(__F16C__)
PYFUSED_INLINE Vec<float> load(const f16* p) {
  __m128i half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)_mm256_cvtph_ps(half);
}
PYFUSED_INLINE void store(f16* p, Vec<float> v) {
  __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
}
#else
// No conversion instruction: shift the exponent and mantissa into place and let one float multiplication re-bias the
// exponent, which is exact and turns half subnormals into float normals.
PYFUSED_INLINE Vec<float> load(const f16* p) {
  VecU16 half;
  std::memcpy(&half, p, sizeof half);
  VecU32 h = __builtin_convertvector(half, VecU32);
  VecU32 magnitude = (h & 0x7fff) << 13;
  Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  VecU32 special = (VecU32)((h & 0x7c00) == 0x7c00);  // inf and NaN keep their mantissa under an all-ones exponent
  VecU32 bits = (special & (magnitude | 0x7f800000)) | (~special & (VecU32)scaled);
  return (Vec<float>)(bits | ((h & 0x8000) << 16));
}
PYFUSED_INLINE void store(f16* p, Vec<float> v) {
  VecU32 bits = (VecU32)v, sign = bits & 0x80000000u, x = bits ^ sign;
  // Normal halves: re-bias and round to nearest even in integers. Subnormal halves: adding 0.5 makes the float addition
  // itself round the mantissa to units of 2^-24. Too large (>= 65520): inf. NaN: quiet NaN.
  VecU32 normal = (x + (((x >> 13) & 1) + 0xfff) - (112u << 23)) >> 13;
  VecU32 small = (VecU32)((Vec<float>)x + 0.5f) - 0x3f000000u;
  VecU32 is_small = (VecU32)(x < (113u << 23)), is_large = (VecU32)(x >= 0x477ff000u),
         is_nan = (VecU32)(x > 0x7f800000u);
  VecU32 h = (is_small & small) | (~is_small & normal);
  h = (is_large & 0x7c00) | (~is_large & h);
  h = (is_nan & 0x7e00) | (~is_nan & h);
  VecU16 half = __builtin_convertvector(h | (sign >> 16), VecU16);
  std::memcpy(p, &half, sizeof half);
}
#endif

// --- Whole cache lines of 64 bytes, aligned, written past the caches: memory that is written once and not read soon need
// not be read first. Each thread that streamed calls stream_end() before others may read.
PYFUSED_INLINE void stream(void* to, const void* from, int64_t bytes) {
#if defined(__AVX512F__)
  auto *out = static_cast<__m512i*>(to), *end = out + bytes / 64;
  for (auto* in = static_cast<const __m512i*>(from); out < end;) _mm512_stream_si512(out++, _mm512_loadu_si512(in++));
#elif defined(__SSE2__)
  auto *out = static_cast<__m128i*>(to), *end = out + bytes / 16;
  for (auto* in = static_cast<const __m128i*>(from); out < end;) _mm_stream_si128(out++, _mm_loadu_si128(in++));
#else
  std::memcpy(to, from, bytes);
#endif
}
PYFUSED_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- The first n lanes only (0 <= n <= lanes): tails. Lanes past n read as `fill` and are not written. Under a mask where
// there is one; else by memcpy, a call, which takes longer than the arithmetic on a short tail.
template <class T>
PYFUSED_INLINE Vec<compute_t<T>> load_first(const T* p, int64_t n, compute_t<T> fill = 0) {
  using C = compute_t<T>;
  if (n == lanes<C>) return load(p);
#if defined(__AVX512F__)
  const uint32_t first = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>)
    return (Vec<C>)_mm512_mask_loadu_ps((__m512)splat(fill), first, p);
  else if constexpr (std::is_same_v<T, double>)
    return (Vec<C>)_mm512_mask_loadu_pd((__m512d)splat(fill), first, p);
#elif defined(__AVX2__)
  const Mask<C> first = lane_numbers<C>() < static_cast<int>(n);
  if constexpr (std::is_same_v<T, float>)
    return first ? (Vec<C>)_mm256_maskload_ps(p, (__m256i)first) : splat(fill);
  else if constexpr (std::is_same_v<T, double>)
    return first ? (Vec<C>)_mm256_maskload_pd(p, (__m256i)first) : splat(fill);
#endif
  T buffer[lanes<C>];
  for (int i = 0; i < lanes<C>; ++i) buffer[i] = from_compute<T>(fill);
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
PYFUSED_INLINE void store_first(T* p, Vec<compute_t<T>> v, int64_t n) {
  using C = compute_t<T>;
  if (n == lanes<C>) return store(p, v);
#if defined(__AVX512F__)
  const uint32_t first = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, first, (__m512)v);
  else if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_storeu_pd(p, first, (__m512d)v);
#elif defined(__AVX2__)
  const Mask<C> first = lane_numbers<C>() < static_cast<int>(n);
  if constexpr (std::is_same_v<T, float>)
    return _mm256_maskstore_ps(p, (__m256i)first, (__m256)v);
  else if constexpr (std::is_same_v<T, double>)
    return _mm256_maskstore_pd(p, (__m256i)first, (__m256d)v);
#endif
  T buffer[lanes<C>];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// --- fp16 scalars, through the vector code
PYFUSED_INLINE float to_compute(f16 x) {
  f16 buffer[lanes<float>] = {x};
  return load(buffer)[0];
}
template <>
PYFUSED_INLINE f16 from_compute<f16>(float x) {
  f16 buffer[lanes<float>];
  store(buffer, splat(x));
  return buffer[0];
}

// --- Sums over lanes in a fixed order: lane i with lane i + width, width halved until one is left
// The lanes `index` of (a, b) put one behind the other.
template <class C, int... index>
PYFUSED_INLINE Vec<C> shuffle(Vec<C> a, Vec<C> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else  // GCC knows the former from version 12 on
  return __builtin_shuffle(a, b, Mask<C>{index...});
#endif
}

// Transposition of a square of vectors, in log2(lanes) rounds: round `half` exchanges the off-diagonal half-blocks.
template <class C, int half, int... lane>
PYFUSED_INLINE void exchange(Vec<C>& a, Vec<C>& b, std::integer_sequence<int, lane...>) {
  constexpr int L = lanes<C>;
  Vec<C> low = shuffle<C, (lane & half ? L + lane - half : lane)...>(a, b);
  b = shuffle<C, (lane & half ? L + lane : lane + half)...>(a, b);
  a = low;
}
template <class C, int half = lanes<C> / 2>
PYFUSED_INLINE void transpose(Vec<C> (&rows)[lanes<C>]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i)
    if (!(i & half)) exchange<C, half>(rows[i], rows[i + half], std::make_integer_sequence<int, lanes<C>>{});
  if constexpr (half > 1) transpose<C, half / 2>(rows);
}

template <class C, int width, int... lane>
PYFUSED_INLINE Vec<C> rotate(Vec<C> v, std::integer_sequence<int, lane...>) {
  return shuffle<C, (lane + width) % lanes<C>...>(v, v);
}
template <class C, int width = lanes<C> / 2, class Combine>
PYFUSED_INLINE C fold(Vec<C> v, const Combine& combine) {
  if constexpr (width == 0)
    return v[0];
  else
    return fold<C, width / 2>(combine(v, rotate<C, width>(v, std::make_integer_sequence<int, lanes<C>>())), combine);
}
PYFUSED_INLINE float reduce_add(Vec<float> v) {
  return fold<float>(v, [](auto a, auto b) { return a + b; });
}
PYFUSED_INLINE double reduce_add(Vec<double> v) {
  return fold<double>(v, [](auto a, auto b) { return a + b; });
}
// Adds the upper half of every group of `width` lanes of a, then of b, to its lower half, and closes the gaps.
template <class C, int width, int... i>
PYFUSED_INLINE Vec<C> fold_pair(Vec<C> a, Vec<C> b, std::integer_sequence<int, i...>) {
  constexpr int half = width / 2;
  return shuffle<C, i / half * width + i % half...>(a, b) + shuffle<C, i / half * width + i % half + half...>(a, b);
}
// out[i] = reduce_add(v[i]), four at once for the price of two, the same bits.
template <class C>
PYFUSED_INLINE void reduce_add4(const Vec<C>* v, C* out) {
  constexpr int W = lanes<C>;
  constexpr auto every = std::make_integer_sequence<int, W>{};
  Vec<C> low = fold_pair<C, W>(v[0], v[1], every), high = fold_pair<C, W>(v[2], v[3], every);
  if constexpr (W == 2) {
    store(out, low);
    store(out + 2, high);
  } else {
    Vec<C> sums = fold_pair<C, W / 2>(low, high, every);
    if constexpr (W >= 8) sums = fold_pair<C, W / 4>(sums, sums, every);
    if constexpr (W >= 16) sums = fold_pair<C, W / 8>(sums, sums, every);
    std::memcpy(out, &sums, 4 * sizeof(C));
  }
}

// Calls body(T{}) with T the storage type of `dtype`; for a dtype that is none of the four, returns an invalid Status.
template <class Body>
PYFUSED_INLINE Status for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    default:
      return invalid("input", "dtype must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
