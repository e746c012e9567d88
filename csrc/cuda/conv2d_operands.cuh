// What implicit-GEMM convolutions read, in channels_last: chunks of a pixel's channels, on their way to shared memory; the
// mask of the gradient; pixels and taps, which are counted without divisions.
#pragma once
#include "cuda/conv2d_maximum.cuh"

namespace pyfused {
namespace cuda {
namespace {

// --- Copying
// N numbers, of which `left` are a pixel's own, to shared memory; zeros where !valid and in place of others. aligned: from
// and left are multiples of N numbers.
template <int N, class T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const T* from, int left, bool valid, bool aligned) {
  constexpr int bytes = N * sizeof(T);
  using Word = std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, uint32_t>>;
  if (aligned) {
    copy_async<bytes>(to, from, valid);
    return;
  }
  T numbers[N];
  memset(numbers, 0, bytes);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (valid && i < left) numbers[i] = from[i];
  Word word;
  memcpy(&word, numbers, bytes);
  *reinterpret_cast<Word*>(to) = word;
}

// --- The gradient's mask. With each of its chunks comes one of what the forward saved: the output, or the codes of 2x2
// pooling, then with the pixel's place in its window, see Mask::copy. The thread that copied both applies it.
// What the output, never negative, has as 0 becomes 0. NaN passes.
template <class T>
__device__ __forceinline__ uint4 masked(uint4 grad, uint4 output) {
  constexpr bool halves = sizeof(T) == 2;
  auto one = [](uint32_t g, uint32_t o) {
    if (!halves) return o << 1 ? g : 0u;
    return g & (((o & 0x7fff7fffu) + 0x7fff7fffu) >> 15 & 0x10001u) * 0xffffu;
  };
  return {one(grad.x, output.x), one(grad.y, output.y), one(grad.z, output.z), one(grad.w, output.w)};
}

// The same for a pooled output: where a byte of the codes, low first, is `place`, the window's maximum is here.
template <class T>
__device__ __forceinline__ uint4 unpooled(uint4 grad, uint32_t low, uint32_t high, uint32_t place) {
  auto one = [place](uint32_t g, uint32_t codes) {
    if (sizeof(T) == 4) return (codes & 255) == place ? g : 0u;
    return g & (((codes & 255) == place ? 0xffffu : 0u) | ((codes >> 8 & 255) == place ? 0xffff0000u : 0u));
  };
  if (sizeof(T) == 4) return {one(grad.x, low), one(grad.y, low >> 8), one(grad.z, low >> 16), one(grad.w, low >> 24)};
  return {one(grad.x, low), one(grad.y, low >> 16), one(grad.z, high), one(grad.w, high >> 16)};
}

template <class T>
struct Mask {  // both null: none
  const T* output;
  const uint8_t* code;  // [pixels of grad]; grad is pooled, too
  bool aligned;

  __host__ __device__ __forceinline__ explicit operator bool() const { return output || code; }
  // `at`: where the chunk is in grad; its pixel's place in the window, if there are windows.
  __device__ __forceinline__ void copy(unsigned char* to, int64_t at, int place, int left, bool valid) const {
    if (output) {
      copy_chunk<kWidth<T>>(to, output + at, left, valid, aligned);
    } else if (code) {
      copy_chunk<kWidth<T>>(to, code + at, left, valid, aligned);
      *reinterpret_cast<int*>(to + 12) = place;
    }
  }
  __device__ __forceinline__ uint4 apply(uint4 grad, const uint4* copied) const {
    if (output) return masked<T>(grad, *copied);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(copied);
    if (code) return unpooled<T>(grad, words[0], sizeof(T) == 2 ? words[1] : 0, words[3]);
    return grad;
  }
};

// A number of three digits that counts up by the same step, by conditional subtractions instead of divisions.
struct Counter {
  int low, middle, high;
  __host__ __device__ __forceinline__ Counter(int64_t value, int low_radix, int middle_radix) {
    const int64_t upper = value / low_radix;
    low = static_cast<int>(value - upper * low_radix);
    high = static_cast<int>(upper / middle_radix);
    middle = static_cast<int>(upper - int64_t(high) * middle_radix);
  }
  __device__ __forceinline__ void advance(const Counter& step, int low_radix, int middle_radix) {
    low += step.low;
    middle += step.middle;
    high += step.high;
    if (low >= low_radix) {
      low -= low_radix;
      ++middle;
    }
    if (middle >= middle_radix) {
      middle -= middle_radix;
      ++high;
    }
  }
};

// --- What launchers check
// Within an image kernels count in 32 bits.
inline bool fits(const View& v) {
  return v.shape[0] < INT32_MAX / 8 && v.numel() / max(v.shape[0], int64_t(1)) < INT32_MAX;
}
// Pixels are whole chunks of kWidth<T> numbers, at addresses that are multiples of the chunks' size.
template <class T>
bool in_chunks(const View& v) {
  const int bytes = v.dtype == DType::u8 ? kWidth<T> : 16;
  return !v || (v.shape[1] % kWidth<T> == 0 && reinterpret_cast<uintptr_t>(v.data) % bytes == 0);
}
inline bool is_like(const View& v, const View& other) { return is_nhwc(v) && same_shape(v, other); }
inline bool is_code_of(const View& v, const View& pooled) { return v && v.dtype == DType::u8 && is_like(v, pooled); }
inline bool is_saved_with(const View& v, const View& grad) {
  return is_code_of(v, grad) || (v.dtype == grad.dtype && is_like(v, grad));
}
template <class T>
Mask<T> mask_of(const View& saved) {
  const bool codes = saved && saved.dtype == DType::u8;
  return {saved && !codes ? saved.as<T>() : nullptr, codes ? saved.as<uint8_t>() : nullptr, in_chunks<T>(saved)};
}

}  // namespace
}  // namespace cuda
}  // namespace pyfused
