// Direct convolution + bias + ReLU (+ 2x2 max-pooling) for few input channels, forward.
//
//   out[n, o, y, x] = max(0, bias[o] + ∑_{c, i, j} weight[o, c, i, j] · input[n, c, y·sh + i − ph, x·sw + j − pw])
//   pooled:  the maximum over 2x2 windows of that, and its place in the window as a one-byte code (255: it is 0)
//
// Tiles   a block takes up to 512 output positions of one image (2048 for up to 8 channels) and up to 64 output channels;
//         the input under them and the weights lie in shared memory. A thread has 8 positions, or 2 windows, by 8
//         channels in registers; per tap it reads 8 numbers of the input and, 16 bytes at a time, 8 weights: 64 FMAs for
//         12 to 16 wavefronts of shared memory, of which a multiprocessor serves one, and 128 FMAs, a clock. NHWC: lanes
//         side by side have one position and adjacent channels; NCHW: a warp has adjacent positions and the same channels.
// Traffic reads the input 1 to 1.8 times (overlap of tiles), writes the output once, pooled a quarter of it and codes.
// Flops   2 · C_in · KH · KW per output element. 8x3x224x224 -> 32, 3x3, float32: 0.68 GFLOP and 55 MB, pooled 20 MB: 10 us
//         at an H200's 67 TFLOP/s, 13 and 5 us at the 4.3 TB/s that it copies. Not measured.
// Saves   nothing, pooled the codes.
// Sums    in float, by channel, row and column of the kernel.
// Edges   NaN passes ReLU, and the last NaN of a window is its maximum; of equal ones, the first. Any padding.
#include "cuda/conv2d_direct.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kPositions = 8;  // of a thread

template <class T>
struct Forward {
  Direct d;
  T* out;
  uint8_t* code;
  const T *input, *weight, *bias;  // bias: may be null
  int64_t w_o, w_c, w_i, w_j, bias_stride;
  int groups;          // of kChannels channels that a block computes at a time
  bool nhwc, aligned;  // aligned: kChannels channels of the output are whole 16-byte blocks (codes: one of 8 bytes)
};

// weights[tap][o], then the bias, for the block's channels; 0 past the last.
template <class T>
__device__ __forceinline__ void stage_weights(float* weights, const Forward<T>& p, int first) {
  const Direct& d = p.d;
  for (int i = threadIdx.x; i < (d.taps() + 1) * d.chunk; i += kBlock) {
    const int tap = i / d.chunk, o = first + i % d.chunk;
    const int c = tap / (d.kh * d.kw), y = tap / d.kw % d.kh, x = tap % d.kw;
    float value = 0;
    if (o < d.c_out && tap < d.taps()) value = to_compute(p.weight[o * p.w_o + c * p.w_c + y * p.w_i + x * p.w_j]);
    if (o < d.c_out && tap == d.taps() && p.bias) value = to_compute(p.bias[o * p.bias_stride]);
    weights[i] = value;
  }
}

// sum[position][channel] += ∑ taps; x[u]: the staged input under the first tap of unit u.
template <int PER>
__device__ __forceinline__ void add_taps(float (&sum)[kPositions][kChannels], const float* staged,
                                         const int (&at)[kPositions / PER], const float* weights, const Direct& d) {
  const int below = d.stride_h * d.pitch;
  for (int c = 0; c < d.c_in; ++c)
    for (int i = 0; i < d.kh; ++i) {
      const float* x = staged + c * d.plane + i * d.pitch;
#pragma unroll 1
      for (int j = 0; j < d.kw; ++j, ++x, weights += d.chunk) {
        float w[kChannels];
        load<kChannels>(w, weights, true);
#pragma unroll
        for (int q = 0; q < kPositions; ++q) {
          const float value = x[at[q / PER] + q % PER / 2 * below + q % PER % 2 * d.stride_w];
#pragma unroll
          for (int k = 0; k < kChannels; ++k) sum[q][k] += value * w[k];
        }
      }
    }
}

// kChannels channels from o on, at one place of an image's output.
template <class T>
__device__ __forceinline__ void write(const Forward<T>& p, int64_t image, int place, int o, const float (&x)[kChannels],
                                      const uint8_t* codes) {
  const int64_t positions = int64_t(p.d.rows) * p.d.columns, step = p.nhwc ? 1 : positions;
  const int64_t first =
      p.nhwc ? (image * positions + place) * p.d.c_out + o : (image * p.d.c_out + o) * positions + place;
  if (p.aligned && o + kChannels <= p.d.c_out) {
    store(p.out + first, x, true);
    if (!codes) return;
    uint2 word;
    memcpy(&word, codes, sizeof word);
    *reinterpret_cast<uint2*>(p.code + first) = word;
    return;
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (o + k >= p.d.c_out) continue;
    p.out[first + k * step] = from_compute<T>(x[k]);
    if (codes) p.code[first + k * step] = codes[k];
  }
}

template <class T, bool POOL>
__global__ void __launch_bounds__(kBlock, 2) forward(Forward<T> p) {
  constexpr int PER = POOL ? 4 : 1, UNITS = kPositions / PER;
  PYFUSED_DYNAMIC_SHARED(float, weights);  // [taps + 1][chunk], then the input
  const Direct& d = p.d;
  float* const staged = weights + (d.taps() + 1) * d.chunk;
  const Tile tile(d, blockIdx.x);
  const int first = blockIdx.y * d.chunk;
  stage_weights(weights, p, first);
  stage_input(staged, p.input, d, tile);
  __syncthreads();

  const int warp = threadIdx.x / 32, lanes = kBlock / p.groups;
  const int group = (p.nhwc ? threadIdx.x : warp) % p.groups;
  const int lane = p.nhwc ? threadIdx.x / p.groups : warp / p.groups * 32 + threadIdx.x % 32;
  int at[UNITS], place[UNITS];  // in the staged input; in the image's output, -1 for no unit
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int unit = lane + u * lanes, y = unit / tile.columns, x = unit % tile.columns;
    place[u] = y < tile.rows ? (tile.y + y) * d.columns + tile.x + x : -1;
    at[u] = y < tile.rows ? d.fold * (y * d.stride_h * d.pitch + x * d.stride_w) : 0;
  }
  if (place[0] < 0) return;
  for (int o = group * kChannels; o < d.chunk; o += p.groups * kChannels) {
    float sum[kPositions][kChannels], bias[kChannels];
    load<kChannels>(bias, weights + d.taps() * d.chunk + o, true);
#pragma unroll
    for (int q = 0; q < kPositions; ++q) memcpy(sum[q], bias, sizeof bias);
    add_taps<PER>(sum, staged, at, weights + o, d);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      if (place[u] < 0) continue;
      uint8_t codes[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        Maximum<float> top;
        top.begin(sum[u * PER][k]);
#pragma unroll
        for (int q = 1; q < PER; ++q) top.meet(sum[u * PER + q][k], q);
        codes[k] = top.code();
        sum[u * PER][k] = relu(top.best);
      }
      write(p, tile.image, place[u], first + o, sum[u * PER], POOL ? codes : nullptr);
    }
  }
}

}  // namespace

Status conv2d_direct(View out, View code, View input, View weight, View bias, int64_t stride_h, int64_t stride_w,
                     int64_t pad_h, int64_t pad_w, Stream stream) {
  if (out.numel() == 0) return {};
  Direct d;
  PYFUSED_TRY(sizes_of(d, out, input, weight, bool(code), stride_h, stride_w, pad_h, pad_w));
  const bool nhwc = is_nhwc(out);
  PYFUSED_REQUIRE(nhwc || is_nchw(out), "out", "must be dense, contiguous or channels_last");
  PYFUSED_REQUIRE(!code || (code.dtype == DType::u8 && same_shape(code, out) && (nhwc ? is_nhwc(code) : is_nchw(code))),
                  "code", "must be uint8 with the shape and layout of out");
  PYFUSED_REQUIRE(out.dtype == input.dtype && weight.dtype == input.dtype && (!bias || bias.dtype == input.dtype),
                  "weight", "all tensors must have the input's dtype");
  PYFUSED_REQUIRE(!bias || (bias.ndim == 1 && bias.shape[0] == weight.shape[0]), "bias", "must be (C_out,)");
  return for_low_precision(out.dtype, [&](auto type) {
    using T = decltype(type);
    // As few equal chunks as have at most 64 channels and 24 KB of weights.
    int most = 64;
    while (most > kChannels && (d.taps() + 1) * most * sizeof(float) > kSharedBytes / 2) most /= 2;
    d.chunk = static_cast<int>(ceil_div(ceil_div(d.c_out, ceil_div(d.c_out, most)), kChannels)) * kChannels;
    int groups = 1;
    while (groups < 4 && groups * kChannels < d.chunk) groups *= 2;
    auto bytes = [](const Direct& d) { return ((d.taps() + 1) * d.chunk + d.c_in * d.plane) * sizeof(float); };
    const int units = kPositions / (d.fold * d.fold);
    d.choose_tile(kBlock / groups * units, 64 / d.fold, bytes);
    PYFUSED_REQUIRE(d.tiles() <= INT32_MAX && d.chunks() <= 65535, "out", "is too large");
    const int64_t* const w = weight.strides;
    const bool aligned = nhwc && is_aligned(out.as<T>()) && d.c_out % (code ? kChannels : kWidth<T>) == 0 &&
                         (!code || reinterpret_cast<uintptr_t>(code.data) % 8 == 0);
    const Forward<T> p = {d,
                          out.as<T>(),
                          code ? code.as<uint8_t>() : nullptr,
                          input.as<T>(),
                          weight.as<T>(),
                          bias ? bias.as<T>() : nullptr,
                          w[0],
                          w[1],
                          w[2],
                          w[3],
                          bias ? bias.strides[0] : 0,
                          groups,
                          nhwc,
                          aligned};
    const dim3 grid(static_cast<unsigned>(d.tiles()), static_cast<unsigned>(d.chunks()));
    return launch(code ? forward<T, true> : forward<T, false>, grid, kBlock, bytes(d), stream, p);
  });
}

}  // namespace cuda
}  // namespace pyfused
