// What the direct convolution's forward and weight gradient share: sizes, the tiles of output positions that blocks take,
// and the input under such a tile, staged in shared memory.
#pragma once
#include "cuda/conv2d_maximum.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kChannels = 8;                     // output channels of a thread
constexpr int kMostInputs = 4, kMostKernel = 7;  // channels of the input; rows and columns of the kernel
// Dynamic; with the arrays 48 KB. Two or more blocks then share a multiprocessor.
constexpr size_t kSharedBytes = 47 << 10;

// A tile is tile_rows x tile_columns units of one image: output positions, or (fold 2) pooling windows of 2 x 2 of them.
struct Direct {
  int64_t batch;
  int c_in, h, w, c_out, kh, kw, stride_h, stride_w, pad_h, pad_w;
  int fold, rows, columns;         // of units
  int64_t in_n, in_c, in_y, in_x;  // strides of the input
  int chunk;                       // output channels of a block, a multiple of kChannels
  int tile_rows, tile_columns, tiles_y, tiles_x;
  int pitch, plane;  // of the staged input: [c_in][rows][pitch]

  __host__ __device__ int taps() const { return c_in * kh * kw; }
  __host__ __device__ int64_t tiles() const { return batch * tiles_y * tiles_x; }
  int chunks() const { return static_cast<int>(ceil_div(c_out, chunk)); }

  // Splits the units evenly into tiles of at most so many rows and columns.
  void set_tile(int most_rows, int most_columns) {
    tiles_x = static_cast<int>(ceil_div(columns, most_columns));
    tiles_y = static_cast<int>(ceil_div(rows, most_rows));
    tile_columns = static_cast<int>(ceil_div(columns, tiles_x));
    tile_rows = static_cast<int>(ceil_div(rows, tiles_y));
    pitch = (tile_columns * fold - 1) * stride_w + kw;
    plane = ((tile_rows * fold - 1) * stride_h + kh) * pitch;
  }
  // `capacity` units, in rows of at most `widest`; fewer where bytes(*this) exceeds kSharedBytes.
  template <class Bytes>
  void choose_tile(int capacity, int widest, const Bytes& bytes) {
    set_tile(rows, widest);
    set_tile(capacity / tile_columns, widest);
    while (bytes(*this) > kSharedBytes && tile_rows * tile_columns > 1)
      tile_rows > 1 ? set_tile(tile_rows / 2, tile_columns) : set_tile(1, tile_columns / 2);
  }
};

// The tile with a number: its image, its first unit, and how many of its units lie in the output.
struct Tile {
  int64_t image;
  int y, x, rows, columns;
  __device__ __forceinline__ Tile(const Direct& d, int64_t number) {
    const int64_t row = number / d.tiles_x;
    x = static_cast<int>(number % d.tiles_x) * d.tile_columns;
    y = static_cast<int>(row % d.tiles_y) * d.tile_rows;
    image = row / d.tiles_y;
    rows = min(d.tile_rows, d.rows - y);
    columns = min(d.tile_columns, d.columns - x);
  }
};

// staged[c][row][column]: the input under a tile, in float, zeros where it is padded. Any strides;
// neighbouring threads read along the channels where those are adjacent, else along the columns.
template <class T>
__device__ __forceinline__ void stage_input(float* staged, const T* input, const Direct& d, const Tile& tile) {
  const int top = tile.y * d.fold * d.stride_h - d.pad_h, left = tile.x * d.fold * d.stride_w - d.pad_w;
  const T* const image = input + tile.image * d.in_n;
  const bool interleaved = d.in_c < d.in_x;
  for (int i = threadIdx.x; i < d.c_in * d.plane; i += kBlock) {
    const int c = interleaved ? i % d.c_in : i / d.plane, in_plane = interleaved ? i / d.c_in : i % d.plane;
    const int y = top + in_plane / d.pitch, x = left + in_plane % d.pitch;
    const bool inside = y >= 0 && y < d.h && x >= 0 && x < d.w;
    staged[c * d.plane + in_plane] = inside ? to_compute(image[c * d.in_c + y * d.in_y + x * d.in_x]) : 0.0f;
  }
}

// As for_dtype; float64 is left to PyTorch: 64 sums in double do not fit the registers.
template <class Run>
Status for_low_precision(DType dtype, const Run& run) {
  if (dtype == DType::f64) return invalid("input", "must be float32, bfloat16 or float16");
  return for_dtype(dtype, [&](auto type) {
    if constexpr (sizeof(type) == 8)
      return Status();
    else
      return run(type);
  });
}

// The sizes, but for the chunk and the tile, or what is wrong with the tensors. out: of the convolution, or pooled.
inline Status sizes_of(Direct& d, const View& out, const View& input, const View& weight, bool pooled, int64_t stride_h,
                       int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  PYFUSED_REQUIRE(input.ndim == 4 && weight.ndim == 4 && weight.shape[1] == input.shape[1], "weight",
                  "must be (C_out, C_in, KH, KW) for the input's C_in");
  PYFUSED_REQUIRE(weight.shape[1] >= 1 && weight.shape[1] <= kMostInputs && weight.shape[2] >= 1 &&
                      weight.shape[3] >= 1 && weight.shape[2] <= kMostKernel && weight.shape[3] <= kMostKernel,
                  "weight", "must have at most 4 input channels and 7 x 7 taps");
  PYFUSED_REQUIRE(out.ndim == 4 && out.shape[0] == input.shape[0] && out.shape[1] == weight.shape[0], "out",
                  "must be (N, C_out, ...)");
  PYFUSED_REQUIRE(stride_h >= 1 && stride_w >= 1 && stride_h <= 2 && stride_w <= 2, "stride", "must be 1 or 2");
  constexpr int64_t most = 1 << 28;
  PYFUSED_REQUIRE(pad_h >= 0 && pad_w >= 0 && pad_h < most && pad_w < most, "padding", "must be from 0 to 2^28");
  PYFUSED_REQUIRE(input.shape[2] < most && input.shape[3] < most && out.shape[2] * out.shape[3] < most, "input",
                  "must have fewer than 2^28 rows, columns and positions");
  const int64_t fold = pooled ? 2 : 1;
  PYFUSED_REQUIRE(out.shape[2] > 0 && out.shape[3] > 0 &&
                      (fold * out.shape[2] - 1) * stride_h + weight.shape[2] <= input.shape[2] + 2 * pad_h &&
                      (fold * out.shape[3] - 1) * stride_w + weight.shape[3] <= input.shape[3] + 2 * pad_w,
                  "out", "is not of the convolution's output");
  auto number = [](int64_t x) { return static_cast<int>(x); };
  d = {input.shape[0],          number(input.shape[1]),  number(input.shape[2]),  number(input.shape[3]),
       number(weight.shape[0]), number(weight.shape[2]), number(weight.shape[3]), number(stride_h),
       number(stride_w),        number(pad_h),           number(pad_w),           number(fold),
       number(out.shape[2]),    number(out.shape[3]),    input.strides[0],        input.strides[1],
       input.strides[2],        input.strides[3]};
  return {};
}

}  // namespace
}  // namespace cuda
}  // namespace pyfused
