// What the direct convolution's forward and weight gradient share: its sizes, the staged input, and the bands of rows
// that are its unit of work.
#pragma once
#include "conv2d_layout.h"

namespace pyfused {
namespace PYFUSED_ISA {

// Direct convolution is for training and inference, in float32 and below; float64 is left to PyTorch.
template <class Body>
PYFUSED_INLINE Status for_low_precision(DType dtype, const Body& body) {
  return for_dtype(dtype, [&](auto tag) {
    if constexpr (std::is_same_v<decltype(tag), double>)
      return invalid("input", "dtype must be float32, bfloat16 or float16");
    else
      return body(tag);
  });
}

struct DirectSizes {
  int64_t n, c_in, h, w;  // input
  int64_t c_out, kh, kw;  // weight
  int64_t rows, columns;  // of the convolution's output that are computed: all, or what the pooling uses
  int64_t stride_h, stride_w, pad_h, pad_w;
  int64_t band, bands;   // rows per band, bands per image
  int64_t pitch, plane;  // of the staged input: [c_in][band's input rows][pitch]

  PYFUSED_INLINE int64_t taps() const { return c_in * kh * kw; }
};

// `rows`, `columns`: of the output to be computed; `step`: a band's rows are a multiple of it (2 under a 2x2 pooling).
// `bytes`: what a band's staged input and its strip, of `strip` numbers of `item` bytes a position, may take;
// `least_bands`: of an image, if it has the rows.
PYFUSED_INLINE DirectSizes direct_sizes(const View& input, const View& weight, int64_t rows, int64_t columns,
                                        int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t step,
                                        int64_t item, int64_t strip, int64_t bytes, int64_t least_bands) {
  DirectSizes s{input.shape[0],
                input.shape[1],
                input.shape[2],
                input.shape[3],
                weight.shape[0],
                weight.shape[2],
                weight.shape[3],
                rows,
                columns,
                stride_h,
                stride_w,
                pad_h,
                pad_w,
                0,
                0,
                0,
                0};
  s.pitch = (columns - 1) * stride_w + s.kw;
  int64_t per_row = (s.c_in * stride_h * s.pitch + columns * strip) * item;
  s.band = max<int64_t>(bytes / max<int64_t>(per_row, 1) / step, 1) * step;
  s.band = ceil_div(ceil_div(rows, max(ceil_div(rows, s.band), least_bands)), step) * step;  // of equal size
  s.bands = ceil_div(rows, s.band);
  s.plane = ((s.band - 1) * stride_h + s.kh) * s.pitch;
  return s;
}

// The input rows under output rows [first, first + count) of image n, in the compute type, zeros where it is padded. Any
// dtype, any strides; afterwards the kernels know one layout and no borders.
template <class T>
PYFUSED_INLINE void stage_input(compute_t<T>* staged, const View& input, const DirectSizes& s, int64_t n, int64_t first,
                                int64_t count) {
  using C = compute_t<T>;
  int64_t stride_x = input.strides[3];
  int64_t begin = min(s.pad_w, s.pitch);                       // first staged column inside the input
  int64_t width = max<int64_t>(min(s.w, s.pitch - begin), 0);  // columns inside
  for (int64_t c = 0; c < s.c_in; ++c)
    for (int64_t r = 0; r < (count - 1) * s.stride_h + s.kh; ++r) {
      C* to = staged + c * s.plane + r * s.pitch;
      int64_t y = first * s.stride_h + r - s.pad_h;
      if (y < 0 || y >= s.h) {
        for (int64_t x = 0; x < s.pitch; ++x) to[x] = 0;
        continue;
      }
      const T* from = input.as<T>() + n * input.strides[0] + c * input.strides[1] + y * input.strides[2];
      for (int64_t x = 0; x < begin; ++x) to[x] = 0;
      int64_t x = 0;
      if (stride_x == 1)
        for (; x + lanes<C> <= width; x += lanes<C>) store(to + begin + x, load(from + x));
      for (; x < width; ++x) to[begin + x] = to_compute(from[x * stride_x]);
      for (x += begin; x < s.pitch; ++x) to[x] = 0;
    }
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
