// Between the two layouts of a (N, C, H, W) tensor: per image, the transpose of a C x HW matrix.
//
// Tiles   squares of one vector by one vector, transposed in registers. Reads and writes are whole vectors (but where HW
//         or C is less); where HW or C is a multiple of the vector's length, whole cache lines, so nothing is fetched twice.
// Traffic one read and one write of every element. PyTorch's copy_ between layouts reads or writes one element at a
//         time, a tenth of this.
#include "cpu/kernels.h"
#include "cpu/kernels/conv2d_layout.h"
#include "cpu/parallel.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

// Of a strip: the lines that its rows start in are still near when its next square comes.
constexpr int64_t kColumns = 64;

// out[column][row] = in[row][column] for `count` columns. Whole: there is a whole square; the last one then reaches back
// over the one before, since a part of a vector takes several times as long as a vector.
template <bool Whole, class T>
void transpose_strip(T* out, int64_t out_row, const T* in, int64_t in_row, int64_t rows, int64_t count) {
  using C = typename Compute<T>::type;
  constexpr int L = lanes<C>;
  for (int64_t next_r = 0; next_r < rows; next_r += L)
    for (int64_t next_c = 0; next_c < count; next_c += L) {
      int64_t r = Whole ? min(next_r, rows - L) : next_r, c = Whole ? min(next_c, count - L) : next_c;
      int64_t height = Whole ? L : min<int64_t>(rows - r, L), width = Whole ? L : min<int64_t>(count - c, L);
      Vec<C> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = i < height ? read<C>(in + (r + i) * in_row + c, width) : Vec<C>{};
      transpose<C>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < width) write<C>(out + (c + i) * out_row + r, square[i], height);
    }
}

}  // namespace

// out = input (float32 or uint8), one of them contiguous and the other channels_last.
Status convert_layout(View out, View input, int threads) {
  PYFUSED_REQUIRE(out.dtype == input.dtype && (out.dtype == DType::f32 || out.dtype == DType::u8), "out",
                  "must be float32 or uint8 like input");
  PYFUSED_REQUIRE(same_shape(out, input), "out", "must have the shape of input");
  bool to_nhwc = is_nchw(input) && is_nhwc(out);
  PYFUSED_REQUIRE(to_nhwc || (is_nhwc(input) && is_nchw(out)), "out",
                  "must be channels_last where input is contiguous, contiguous where it is channels_last");
  int64_t images = out.shape[0], channels = out.shape[1], plane = out.shape[2] * out.shape[3];
  int64_t rows = to_nhwc ? channels : plane, columns = to_nhwc ? plane : channels, strips = ceil_div(columns, kColumns);
  auto run = [&](auto tag) {
    using T = decltype(tag);
    parallel_for(images * strips, ceil_div(8192, rows * kColumns), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t strip = begin; strip < end; ++strip) {
        int64_t image = strip / strips * rows * columns;
        int64_t first = columns * (strip % strips) / strips, count = columns * (strip % strips + 1) / strips - first;
        bool whole = min(rows, count) >= lanes<typename Compute<T>::type>;
        (whole ? transpose_strip<true, T> : transpose_strip<false, T>)(out.as<T>() + image + first * rows, rows,
                                                                       input.as<T>() + image + first, columns, rows,
                                                                       count);
      }
    });
  };
  if (out.numel()) out.dtype == DType::f32 ? run(float{}) : run(uint8_t{});
  return {};
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
