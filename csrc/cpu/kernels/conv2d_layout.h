// What the direct convolution and the pooling passes share: (N, C, H, W) tensors in either layout, read and written as
// vectors over channels, and vectors of one-byte pooling codes.
#pragma once
#include <type_traits>
#include <utility>

#include "cpu/simd.h"
#include "image_layout.h"

namespace pyfused {
namespace PYFUSED_ISA {

// --- Codes as numbers of the compute type: 0..255 are exact, and comparisons then give masks of the right width.
template <class C>
struct BytesOf {
  typedef uint8_t type __attribute__((vector_size(lanes<C>)));
};
template <class C>
using Places =
    decltype(Vec<C>{} < Vec<C>{});  // by way of integers as wide as C: one instruction each way, not one a lane
template <class C>
PYFUSED_INLINE Vec<C> load_bytes(const uint8_t* p, int64_t n = lanes<C>) {
  typename BytesOf<C>::type bytes{};
  if (n == lanes<C>)
    std::memcpy(&bytes, p, sizeof bytes);
  else
    std::memcpy(&bytes, p, n);
  return __builtin_convertvector(__builtin_convertvector(bytes, Places<C>), Vec<C>);
}
template <class C>
PYFUSED_INLINE void store_bytes(uint8_t* p, Vec<C> v, int64_t n = lanes<C>) {
  auto bytes = __builtin_convertvector(__builtin_convertvector(v, Places<C>), typename BytesOf<C>::type);
  if (n == lanes<C>)
    std::memcpy(p, &bytes, sizeof bytes);
  else
    std::memcpy(p, &bytes, n);
}

// --- load/store of the first n lanes, for any storage type, codes included
template <class C, class T>
PYFUSED_INLINE Vec<C> read(const T* p, int64_t n) {
  if constexpr (std::is_same_v<T, uint8_t>)
    return load_bytes<C>(p, n);
  else
    return n == lanes<C> ? load(p) : load_first(p, n);
}
template <class C, class T>
PYFUSED_INLINE void write(T* p, Vec<C> v, int64_t n) {
  if constexpr (std::is_same_v<T, uint8_t>)
    store_bytes<C>(p, v, n);
  else
    n == lanes<C> ? store(p, v) : store_first(p, v, n);
}

// ReLU that keeps NaN, as PyTorch's does.
template <class C>
PYFUSED_INLINE Vec<C> relu(Vec<C> v) {
  return v <= Vec<C>{} ? Vec<C>{} : v;
}

// Channels [0, channels) of `count` consecutive positions of one NCHW image, as rows of vectors over channels:
// strip[position][`pitch`]. `planes` points at the first channel's first position. Channels past the last one: 0.
// Both strips have room for whole squares: `count` rounded up to lanes, `pitch` at least `channels` rounded up.
template <class C, class T>
PYFUSED_INLINE void planes_to_strip(C* strip, int64_t pitch, const T* planes, int64_t plane, int64_t channels,
                                    int64_t count) {
  constexpr int L = lanes<C>;
  for (int64_t c = 0; c < channels; c += L)
    for (int64_t p = 0; p < count; p += L) {
      Vec<C> square[L];
      for (int i = 0; i < L; ++i)
        square[i] = c + i < channels ? read<C>(planes + (c + i) * plane + p, min<int64_t>(count - p, L)) : Vec<C>{};
      transpose<C>(square);
      for (int i = 0; i < L; ++i) store(strip + (p + i) * pitch + c, square[i]);
    }
}
template <class C, class T>
PYFUSED_INLINE void strip_to_planes(T* planes, int64_t plane, const C* strip, int64_t pitch, int64_t channels,
                                    int64_t count) {
  constexpr int L = lanes<C>;
  for (int64_t c = 0; c < channels; c += L)
    for (int64_t p = 0; p < count; p += L) {
      Vec<C> square[L];
      for (int i = 0; i < L; ++i) square[i] = load(strip + (p + i) * pitch + c);
      transpose<C>(square);
      for (int i = 0; i < min<int64_t>(channels - c, L); ++i)
        write<C>(planes + (c + i) * plane + p, square[i], min<int64_t>(count - p, L));
    }
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
