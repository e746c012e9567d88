// What is left to do around a convolution by cuDNN, in one pass each: NHWC, M pixels of K channels.
//
//   conv2d_bias_relu   x[m, k] = max(0, x[m, k] + bias[k]), in place
//   conv2d_relu_grad   g[m, k] = grad[m, k] where output[m, k] is not 0, else 0;   d_bias[k] = ∑_m g[m, k]
//
// Tiles   4 to 32 lanes to a pixel, 16 bytes each (one number where pixels are not whole 16-byte blocks), always the same
//         channels; a block takes every gridDim.x-th group of pixels.
// Traffic conv2d_bias_relu reads and writes M·K numbers (PyTorch: twice that, bias and ReLU apart); conv2d_relu_grad
//         reads two and writes one (PyTorch: reads one more for the sum). 32 x 56 x 56 x 64, bfloat16: 26 and 39 MB, 6 and 9
//         us at the 4.3 TB/s that an H200 copies. Not measured.
// Sums    in float (double for double): a thread's pixels in order, the threads of a block, then every eighth block, whose
//         sums lie in a workspace [parts][K].
// Edges   NaN stays, also through the mask. No pixels: d_bias is 0.
#include "cuda/common.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kBlock = 256;

template <class T>
struct Pixels {
  T* out;  // may be null
  const T *grad, *output, *bias;
  compute_t<T>* sums;  // [gridDim.x][channels], or null
  int64_t pixels;
  int channels, lanes;
};

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kBlock) bias_relu(Pixels<T> p) {
  using C = compute_t<T>;
  constexpr int N = VECTORS ? kWidth<T> : 1;
  const int k = (blockIdx.y * p.lanes + threadIdx.x % p.lanes) * N, lines = kBlock / p.lanes;
  if (k >= p.channels) return;
  C bias[N];
  load<N>(bias, p.bias + k, VECTORS);
#pragma unroll 4
  for (int64_t m = int64_t(blockIdx.x) * lines + threadIdx.x / p.lanes; m < p.pixels; m += int64_t(gridDim.x) * lines) {
    C x[N];
    load<N>(x, p.out + m * p.channels + k, VECTORS);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] += bias[i];
      if (x[i] < 0) x[i] = 0;
    }
    store<N>(p.out + m * p.channels + k, x, VECTORS);
  }
}

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kBlock) relu_grad(Pixels<T> p) {
  using C = compute_t<T>;
  constexpr int N = VECTORS ? kWidth<T> : 1;
  __shared__ C of_threads[N][kBlock];
  const int lane = threadIdx.x % p.lanes, k = (blockIdx.y * p.lanes + lane) * N, lines = kBlock / p.lanes;
  const int64_t first = int64_t(blockIdx.x) * lines + threadIdx.x / p.lanes;
  C sum[N] = {};
#pragma unroll 4
  for (int64_t m = k < p.channels ? first : p.pixels; m < p.pixels; m += int64_t(gridDim.x) * lines) {
    C g[N], y[N];
    load<N>(g, p.grad + m * p.channels + k, VECTORS);
    load<N>(y, p.output + m * p.channels + k, VECTORS);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[i] = y[i] != 0 ? g[i] : C(0);
      sum[i] += g[i];
    }
    if (p.out) store<N>(p.out + m * p.channels + k, g, VECTORS);
  }
  if (!p.sums) return;
#pragma unroll
  for (int i = 0; i < N; ++i) of_threads[i][threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.x >= p.lanes || k >= p.channels) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    C total = 0;
    for (int j = lane; j < kBlock; j += p.lanes) total += of_threads[i][j];
    p.sums[int64_t(blockIdx.x) * p.channels + k + i] = total;
  }
}

// The parts of 32 channels, added up by 8 warps: each every 8th part, then their sums in order. (One thread for all 512
// parts of a channel would wait for memory a hundred times, longer than what the parts come from takes.)
template <class T>
__global__ void __launch_bounds__(kBlock) sum_parts(T* d_bias, const compute_t<T>* sums, int channels, int parts) {
  using C = compute_t<T>;
  __shared__ C of_warps[kBlock / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = blockIdx.x * 32 + lane;
  C total = 0;
  if (k < channels)
#pragma unroll 8
    for (int i = warp; i < parts; i += kBlock / 32) total += sums[int64_t(i) * channels + k];
  of_warps[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || k >= channels) return;
  total = 0;
  for (int w = 0; w < kBlock / 32; ++w) total += of_warps[w][lane];
  d_bias[k] = from_compute<T>(total);
}

// Launches run<T, VECTORS> with `parts` blocks of pixels.
template <class T>
Status over_pixels(void (*vectors)(Pixels<T>), void (*numbers)(Pixels<T>), Pixels<T> p, bool aligned, int64_t parts,
                   Stream stream) {
  const int width = aligned ? kWidth<T> : 1;
  p.lanes = 4;
  while (p.lanes < 32 && p.lanes * width < p.channels) p.lanes *= 2;
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(ceil_div(p.channels, p.lanes * width)));
  PYFUSED_REQUIRE(grid.y <= 65535, "x", "has too many channels");
  return launch(aligned ? vectors : numbers, grid, kBlock, 0, stream, p);
}

// [pixels, channels] without gaps.
bool is_pixels(const View& v) { return v.ndim == 2 && v.contiguous() && v.shape[1] < INT32_MAX / 8; }
template <class T>
bool in_chunks(const View& v) {
  return !v || (v.shape[v.ndim - 1] % kWidth<T> == 0 && is_aligned(v.as<T>()));
}

}  // namespace

// x: [M, K]
Status conv2d_bias_relu(View x, View bias, Stream stream) {
  PYFUSED_REQUIRE(is_pixels(x), "x", "must be a contiguous matrix");
  PYFUSED_REQUIRE(bias.dtype == x.dtype && bias.ndim == 1 && bias.contiguous() && bias.shape[0] == x.shape[1], "bias",
                  "must be contiguous, one number per channel");
  return for_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    const Pixels<T> p = {x.as<T>(), nullptr, nullptr, bias.as<T>(), nullptr, x.shape[0], static_cast<int>(x.shape[1])};
    const int64_t parts = x.shape[0] / 32 + 1;  // some pixels a thread
    return over_pixels<T>(bias_relu<T, true>, bias_relu<T, false>, p, in_chunks<T>(x) && in_chunks<T>(bias),
                          parts < 1024 ? parts : 1024, stream);
  });
}

// g, grad, output: [M, K]; g and d_bias may be None, then nobody asks for them. workspace: [parts, K], in float (double).
Status conv2d_relu_grad(View g, View d_bias, View workspace, View grad, View output, Stream stream) {
  PYFUSED_REQUIRE(is_pixels(grad), "grad", "must be a contiguous matrix");
  auto like_grad = [&](const View& v) {
    return v.dtype == grad.dtype && is_pixels(v) && v.shape[0] == grad.shape[0] && v.shape[1] == grad.shape[1];
  };
  PYFUSED_REQUIRE(like_grad(output), "output", "must be like grad");
  PYFUSED_REQUIRE(!g || like_grad(g), "g", "must be like grad");
  PYFUSED_REQUIRE(!d_bias || (d_bias.dtype == grad.dtype && d_bias.contiguous() && d_bias.numel() == grad.shape[1]),
                  "d_bias", "must be contiguous, one number per channel");
  PYFUSED_REQUIRE(is_pixels(workspace) && workspace.shape[0] > 0 && workspace.shape[1] == grad.shape[1] &&
                      workspace.dtype == (grad.dtype == DType::f64 ? DType::f64 : DType::f32),
                  "workspace", "must be [parts, channels], of the arithmetic's dtype");
  return for_dtype(grad.dtype, [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const int channels = static_cast<int>(grad.shape[1]), parts = static_cast<int>(workspace.shape[0]);
    const Pixels<T> p = {
        g ? g.as<T>() : nullptr, grad.as<T>(), output.as<T>(), nullptr, d_bias ? workspace.as<C>() : nullptr,
        grad.shape[0],           channels};
    const bool aligned = in_chunks<T>(grad) && in_chunks<T>(output) && in_chunks<T>(g);
    PYFUSED_TRY(over_pixels<T>(relu_grad<T, true>, relu_grad<T, false>, p, aligned, parts, stream));
    if (!d_bias) return Status();
    return launch(sum_parts<T>, static_cast<unsigned>(ceil_div(channels, 32)), kBlock, 0, stream, d_bias.as<T>(),
                  workspace.as<C>(), channels, parts);
  });
}

}  // namespace cuda
}  // namespace pyfused
