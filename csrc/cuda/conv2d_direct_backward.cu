// Direct convolution + bias + ReLU (+ 2x2 max-pooling) for few input channels: gradients of weight and bias.
//
//   g = grad where saved is alive (output > 0 or NaN; code != 255), at its place in the window if pooled
//   d_weight[o, c, i, j] = ∑_{n, y, x} g[n, o, y, x] · input[n, c, y·sh + i − ph, x·sw + j − pw];   d_bias[o] = ∑ g
//
// Tiles   a block takes every gridDim.x-th tile of up to 128 output positions, and up to 32 output channels. The input
//         under a tile and g, masked or unpooled, lie in shared memory; a thread has 8 taps x 8 channels in registers for
//         its share of the positions; the bias is one tap more, of a plane of ones. Per position 64 FMAs for 12 to 16
//         wavefronts of shared memory, of which a multiprocessor serves one, and 128 FMAs, a clock.
// Traffic reads input (more often where tiles overlap: 1.2 to 2 times), grad and saved once; writes and reads `parts` sums
//         of the weight's size.
// Flops   2 · (C_in · KH · KW + 1) per element of g, in units of 8 taps. 8x3x224x224 -> 32, 3x3, float32: 0.8 GFLOP, 105 MB,
//         pooled 20 MB: 24 us at the 4.3 TB/s that an H200 copies, pooled 12 at its 67 TFLOP/s. Not measured.
// Sums    in float: a thread's positions, the threads of a block, the blocks, each in a fixed order.
// Edges   NaN: alive. Positions that no window covers give nothing. No images: 0.
#include "cuda/conv2d_direct.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kTaps = 8;  // of a thread
constexpr int kTilePositions = 128;
constexpr int kMostChannels = 32;  // of a block

template <class T>
struct Backward {
  Direct d;
  const T *grad, *input;
  const void* saved;  // T, or codes
  float* sums;        // [parts][chunks][taps + 1][chunk]
  bool nhwc;

  __host__ __device__ int g_pitch() const { return d.chunk + 4; }  // keeps 16 bytes, spreads a column over the banks
  __host__ __device__ int tap_groups() const { return (d.taps() + kTaps) / kTaps; }  // of taps + 1
};

// g[position][channel] of a tile, position by position of its rows; 0 past the last channel.
template <class T, bool POOL>
__device__ __forceinline__ void stage_gradient(float* g, const Backward<T>& p, const Tile& tile, int first) {
  const Direct& d = p.d;
  const int units = tile.rows * tile.columns, pitch = p.g_pitch();
  const int64_t positions = int64_t(d.rows) * d.columns;
  for (int i = threadIdx.x; i < units * d.chunk; i += kBlock) {
    const int k = p.nhwc ? i % d.chunk : i / units, unit = p.nhwc ? i / d.chunk : i % units, o = first + k;
    const int y = unit / tile.columns, x = unit % tile.columns;
    const int64_t place = int64_t(tile.y + y) * d.columns + tile.x + x;
    const int64_t at =
        p.nhwc ? (tile.image * positions + place) * d.c_out + o : (tile.image * d.c_out + o) * positions + place;
    float value = 0;
    int code = 0;
    if (o < d.c_out) {
      value = to_compute(p.grad[at]);
      if constexpr (POOL)
        code = static_cast<const uint8_t*>(p.saved)[at];
      else
        value = to_compute(static_cast<const T*>(p.saved)[at]) <= 0 ? 0.0f : value;
    }
    if constexpr (POOL) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
        g[((2 * y + q / 2) * 2 * tile.columns + 2 * x + q % 2) * pitch + k] = code == q ? value : 0.0f;
    } else {
      g[unit * pitch + k] = value;
    }
  }
}

template <class T, bool POOL>
__global__ void __launch_bounds__(kBlock, 2) sum_products(Backward<T> p) {
  PYFUSED_DYNAMIC_SHARED(float, g);      // [kTilePositions][g_pitch] (later kBlock · kChannels numbers), then the input
  __shared__ int under[kTilePositions];  // where a position's first tap is in the staged input
  const Direct& d = p.d;
  float* const staged = g + max(kTilePositions * p.g_pitch(), kBlock * kChannels);
  const int channel_groups = d.chunk / kChannels, tap_groups = p.tap_groups(), threads = channel_groups * tap_groups;
  const int slices = kBlock / threads, slice = threadIdx.x / threads, first = blockIdx.y * d.chunk;
  const int channel = threadIdx.x % channel_groups * kChannels, tap = threadIdx.x / channel_groups % tap_groups * kTaps;
  int at[kTaps];  // of a tap in the staged input; those past the bias, which are not wanted, in its plane
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const int c = (tap + t) / (d.kh * d.kw), i = (tap + t) / d.kw % d.kh, j = (tap + t) % d.kw;
    at[t] = tap + t < d.taps() ? c * d.plane + i * d.pitch + j : d.c_in * d.plane;
  }
  for (int i = threadIdx.x; i < d.plane; i += kBlock) staged[d.c_in * d.plane + i] = 1;
  float sum[kTaps][kChannels] = {};
  for (int64_t number = blockIdx.x; number < d.tiles(); number += gridDim.x) {
    const Tile tile(d, number);
    const int columns = d.fold * tile.columns, positions = d.fold * tile.rows * columns;
    __syncthreads();  // the tile before has been used
    stage_input(staged, p.input, d, tile);
    stage_gradient<T, POOL>(g, p, tile, first);
    if (threadIdx.x < positions)
      under[threadIdx.x] = threadIdx.x / columns * d.stride_h * d.pitch + threadIdx.x % columns * d.stride_w;
    __syncthreads();
#pragma unroll 1
    for (int q = slice; q < (slice < slices ? positions : 0); q += slices) {
      const float* const x = staged + under[q];
      float v[kChannels];
      load<kChannels>(v, g + q * p.g_pitch() + channel, true);
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const float value = x[at[t]];
#pragma unroll
        for (int k = 0; k < kChannels; ++k) sum[t][k] += value * v[k];
      }
    }
  }
  float* const out = p.sums + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * (d.taps() + 1) * d.chunk;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    __syncthreads();
    store(g + threadIdx.x * kChannels, sum[t], true);
    __syncthreads();
    for (int i = threadIdx.x; i < threads * kChannels; i += kBlock) {
      float total = 0;
      for (int s = 0; s < slices; ++s) total += g[s * threads * kChannels + i];
      const int row = i / d.chunk * kTaps + t;
      if (row <= d.taps()) out[row * d.chunk + i % d.chunk] = total;
    }
  }
}

// The parts of 32 numbers, added up by 8 warps: each every 8th part, then their sums in order.
template <class T>
__global__ void __launch_bounds__(kBlock) sum_parts(T* d_weight, T* d_bias, const float* sums, Direct d, int parts,
                                                    int64_t w_o, int64_t w_c, int64_t w_i, int64_t w_j) {
  __shared__ float of_warps[kBlock / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x * 32 + lane;
  const int per_chunk = (d.taps() + 1) * d.chunk, all = static_cast<int>(gridDim.y) * per_chunk;
  float total = 0;
  if (number < per_chunk)
#pragma unroll 4
    for (int part = warp; part < parts; part += kBlock / 32)
      total += sums[int64_t(part) * all + blockIdx.y * per_chunk + number];
  of_warps[warp][lane] = total;
  __syncthreads();
  const int o = blockIdx.y * d.chunk + number % d.chunk, tap = number / d.chunk;
  if (warp > 0 || number >= per_chunk || o >= d.c_out) return;
  total = 0;
  for (int w = 0; w < kBlock / 32; ++w) total += of_warps[w][lane];
  const int c = tap / (d.kh * d.kw), i = tap / d.kw % d.kh, j = tap % d.kw;
  if (tap < d.taps())
    d_weight[o * w_o + c * w_c + i * w_i + j * w_j] = from_compute<T>(total);
  else if (d_bias)
    d_bias[o] = from_compute<T>(total);
}

}  // namespace

// workspace: [parts, (taps + 1) · C_out rounded up to a multiple of 8, beyond 32 of 32], in float; as many blocks.
Status conv2d_direct_backward_weight(View d_weight, View d_bias, View workspace, View grad, View saved, View input,
                                     int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, Stream stream) {
  const bool pooled = saved.dtype == DType::u8, nhwc = is_nhwc(grad) && is_nhwc(saved);
  Direct d;
  PYFUSED_TRY(sizes_of(d, grad, input, d_weight, pooled, stride_h, stride_w, pad_h, pad_w));
  PYFUSED_REQUIRE(same_shape(grad, saved) && (nhwc || (is_nchw(grad) && is_nchw(saved))), "saved",
                  "must have the shape and the layout of grad, contiguous or channels_last");
  PYFUSED_REQUIRE(grad.dtype == input.dtype && d_weight.dtype == input.dtype &&
                      (pooled || saved.dtype == input.dtype) && (!d_bias || d_bias.dtype == input.dtype),
                  "d_weight", "all tensors must have the input's dtype, codes uint8");
  PYFUSED_REQUIRE(!d_bias || (d_bias.ndim == 1 && d_bias.shape[0] == d_weight.shape[0] && d_bias.contiguous()),
                  "d_bias", "must be (C_out,)");
  d.chunk = d.c_out < kMostChannels ? static_cast<int>(ceil_div(d.c_out, kChannels)) * kChannels : kMostChannels;
  const int64_t chunks = d.chunks(), size = chunks * d.chunk * (d.taps() + 1);
  PYFUSED_REQUIRE(size <= INT32_MAX && chunks <= 65535, "d_weight", "is too large");
  PYFUSED_REQUIRE(workspace.ndim == 2 && workspace.contiguous() && workspace.shape[0] >= 1 &&
                      workspace.shape[0] <= INT32_MAX && workspace.shape[1] == size && workspace.dtype == DType::f32,
                  "workspace", "must be float32 [parts, (taps + 1) · rounded C_out]");
  return for_low_precision(input.dtype, [&](auto type) {
    using T = decltype(type);
    auto bytes = [](const Direct& d) {
      const int g = kTilePositions * (d.chunk + 4);
      return ((g < kBlock * kChannels ? kBlock * kChannels : g) + (d.c_in + 1) * d.plane) * sizeof(float);
    };
    d.choose_tile(kTilePositions / (d.fold * d.fold), 32 / d.fold, bytes);
    const Backward<T> p = {d, grad.as<T>(), input.as<T>(), saved.data, workspace.as<float>(), nhwc};
    const int parts = static_cast<int>(workspace.shape[0]);
    const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(chunks));
    PYFUSED_TRY(launch(pooled ? sum_products<T, true> : sum_products<T, false>, grid, kBlock, bytes(d), stream, p));
    const dim3 of_sums(static_cast<unsigned>(ceil_div((d.taps() + 1) * d.chunk, 32)), static_cast<unsigned>(chunks));
    const int64_t* const w = d_weight.strides;
    return launch(sum_parts<T>, of_sums, kBlock, 0, stream, d_weight.as<T>(), d_bias ? d_bias.as<T>() : nullptr, p.sums,
                  d, parts, w[0], w[1], w[2], w[3]);
  });
}

}  // namespace cuda
}  // namespace pyfused
