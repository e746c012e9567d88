// Convolution + bias + ReLU (+ 2x2 max-pooling) and its gradient by the input, as products of matrices that are never
// built. NHWC.
//
//   out[n, y, x, k] = max(0, bias[k] + ∑_{r, s, c} input[n, y·S - P + r·D, x·S - P + s·D, c] · weight[k, r, s, c])
//   d_input[n, y, x, c] = ∑_{r, s, k} g[n, (y + P - r·D) / S, (x + P - s·D) / S, k] · weight[k, r, s, c]
//   g = grad where output is not 0, else 0; the sum takes the taps (r, s) for which S divides
//
// Both are the same kernel: rows are results (pixels), columns result channels, the inner dimension is (tap, channel).
// For stride S the gradient is S·S convolutions, one launch for each residue of y and x, with the taps that meet it; each
// reads its source at stride 1.
// Tiles   128 x 128 results in 8 warps, or 64 x 64 in 4; 64 bytes of the inner dimension, 3 buffers: two are on their
//         way by cp.async while one is multiplied. A chunk of 16 bytes belongs to one tap; where channels are not whole
//         chunks, its end is zeros, and numbers are copied one by one.
// Pooling four rows after each other are the places of a window: their maximum is taken from the tile on its way out,
//         and the activation is never stored. What no window covers is not computed.
// Mask    g is not stored: the output's chunk, or that of the codes of 2x2 pooling, is copied along with the gradient's,
//         and the thread that copied both clears what nothing flows back through before the block reads it.
// Traffic M results of K channels from C: 2·M·K·C·R² flops; input, weight and result once through memory, and per tile
//         of 128 x 128 and 64 bytes inside 16 KB from the second-level cache (masked: 24 KB) for 1 Mflop (16 bits),
//         64 flops a byte: at 5.5 TB/s of an H100 that bounds it at 350 Tflop/s, a third of its peak; the 246 instructions
//         of a warp for 32 mma (in sm_90's machine code) at 490. 32 x 56 x 56 x 64, 3 x 3 to 64, bfloat16: 7.4 Gflop,
//         21 us; 26 MB, 9 us at 3 TB/s. Not measured.
// Saves   the output, which is also the mask; pooled: a byte for each of its numbers.
// Sums    in float, in the order of the inner dimension; see conv2d_implicit_gemm.cuh for how float is multiplied.
// Edges   an image has fewer than 2^31 numbers, a batch any. No images; no taps that meet a residue (those gradients are
//         0); NaN (stays, also through the mask). What lies outside the source counts as 0, so that an infinite weight
//         gives NaN where it meets that.
#include "cuda/conv2d_implicit_gemm.cuh"

namespace pyfused {
namespace cuda {
namespace {

// One spatial dimension: tap t of result i reads the source at i * step + first + t * spacing.
struct Axis {
  int results, step, first, spacing, taps, source;
  int out_first, out_step;        // result i is row (column) out_first + i * out_step of `out`
  int weight_first, weight_step;  // tap t is row (column) weight_first + t * weight_step of the weight
};

template <class T>
struct Convolution {
  T* out;
  uint8_t* code;                    // null: out is not pooled
  const T *source, *weight, *bias;  // bias may be null
  Mask<T> mask;
  Axis h, w;
  int64_t results;  // rows of the product
  int out_height, out_width, out_channels, channels, weight_width;
  int filter;  // numbers of the weight for one result channel
  int chunks;  // of a pixel of the source
  int column_tiles;
  Counter step;  // over (row of taps, tap in it, chunk)
  bool relu, aligned, out_aligned;
};

struct Row {           // a result
  int64_t image, out;  // offsets in source and out; out < 0: none
  int y, x;            // where tap 0 reads
};

// With pooling four rows after each other are a window's places.
template <class T>
__device__ __forceinline__ Row find_row(const Convolution<T>& p, int64_t i) {
  if (i >= p.results) return {0, -1, INT32_MIN / 2, 0};
  const int place = p.code ? static_cast<int>(i % 4) : 0, scale = p.code ? 2 : 1, shift = p.mask.code ? 1 : 0;
  if (p.code) i /= 4;
  const int64_t line = i / p.w.results, n = line / p.h.results;
  const int y = static_cast<int>(line - n * p.h.results), x = static_cast<int>(i - line * p.w.results);
  const int64_t pixel = (n * p.out_height + p.h.out_first + y * p.h.out_step) * p.out_width;
  return {n * (p.h.source >> shift) * (p.w.source >> shift) * p.channels,
          (pixel + p.w.out_first + x * p.w.out_step) * p.out_channels, (y * scale + place / 2) * p.h.step + p.h.first,
          (x * scale + place % 2) * p.w.step + p.w.first};
}

// The maxima of WIDTH channels over a window, four rows of the tile, into the first of them, and their codes.
template <int WIDTH, int PITCH, class T>
__device__ __forceinline__ void pool_window(T* window, uint8_t* code, int count, bool aligned) {
  using Word = std::conditional_t<WIDTH == 8, uint2, uint32_t>;
  uint8_t codes[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    Maximum<float> top;
    top.begin(to_compute(window[i]));
#pragma unroll
    for (int j = 1; j < 4; ++j) top.meet(to_compute(window[j * PITCH + i]), j);
    window[i] = from_compute<T>(top.best);
    codes[i] = top.code();
  }
  if (aligned) {
    Word word;
    memcpy(&word, codes, sizeof word);
    *reinterpret_cast<Word*>(code) = word;
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count) code[i] = codes[i];
  }
}

// The sums, with bias and ReLU, through shared memory, so that a row's channels are stored side by side.
template <class T, bool LARGE>
__device__ __forceinline__ void store_tile(const Convolution<T>& p, const Sums<LARGE>& sums, const Row* rows,
                                           const float* bias, int first_column, unsigned char* shared) {
  constexpr int size = Tile<LARGE>::size, width = kWidth<T>, pitch = size + width;  // pitch: no bank conflicts
  using Pair = std::conditional_t<sizeof(T) == 2, uint32_t, uint2>;
  T* const tile = reinterpret_cast<T*>(shared);
  for_each_pair<LARGE>(sums, [&](int row, int column, float x, float y) {
    x += bias[column];
    y += bias[column + 1];
    const T numbers[2] = {from_compute<T>(p.relu ? relu(x) : x), from_compute<T>(p.relu ? relu(y) : y)};
    Pair pair;
    memcpy(&pair, numbers, sizeof pair);
    *reinterpret_cast<Pair*>(tile + row * pitch + column) = pair;
  });
  __syncthreads();
  const int places = p.code ? 4 : 1;
  for (int i = threadIdx.x; i < size / places * (size / width); i += Tile<LARGE>::threads) {
    const int row = i / (size / width) * places, c = i % (size / width) * width;
    const int left = p.out_channels - first_column - c;
    if (rows[row].out < 0 || left <= 0) continue;
    const int64_t to = rows[row].out + first_column + c;
    T* const from = tile + row * pitch + c;
    if (p.code) pool_window<width, pitch>(from, p.code + to, left, p.out_aligned);
    if (p.out_aligned) {
      *reinterpret_cast<uint4*>(p.out + to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < min(width, left); ++j) p.out[to + j] = from[j];
    }
  }
}

template <class T, bool EXACT, bool LARGE>
__global__ void __launch_bounds__(Tile<LARGE>::threads) convolve(Convolution<T> p) {
  constexpr int size = Tile<LARGE>::size, bytes = Tile<LARGE>::bytes, lines = size / 2;
  PYFUSED_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ Row rows[size];
  __shared__ float bias[size];
  const int first_column = static_cast<int>(blockIdx.x % p.column_tiles) * size;
  if (threadIdx.x < size) {
    const int k = first_column + threadIdx.x;
    rows[threadIdx.x] = find_row(p, int64_t(blockIdx.x / p.column_tiles) * size + threadIdx.x);
    bias[threadIdx.x] = p.bias && k < p.out_channels ? to_compute(p.bias[k]) : 0;
  }
  __syncthreads();

  // A thread copies one chunk of two lines of each operand.
  const int chunk = threadIdx.x % kChunks, line = threadIdx.x / kChunks;
  const Row mine[2] = {rows[line], rows[line + lines]};
  const int slot[2] = {row_chunk(line, chunk), row_chunk(line + lines, chunk)};
  const int buffer_bytes = (p.mask ? 3 : 2) * bytes, shift = p.mask.code ? 1 : 0;
  Counter k(chunk, p.chunks, p.w.taps);
  auto load = [&](int buffer) {
    unsigned char* const to = shared + buffer * buffer_bytes;
    const int c = k.low * kWidth<T>;
    const int dy = k.high * p.h.spacing, dx = k.middle * p.w.spacing;
    const int tap =
        (p.h.weight_first + k.high * p.h.weight_step) * p.weight_width + p.w.weight_first + k.middle * p.w.weight_step;
    const bool inside = k.high < p.h.taps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int y = mine[i].y + dy, x = mine[i].x + dx, column = first_column + line + i * lines;
      const bool valid = inside && y >= 0 && y < p.h.source && x >= 0 && x < p.w.source;
      // Within an image in 32 bits: 64-bit products would take a tenth of all instructions.
      const int64_t at =
          valid ? mine[i].image + (((y >> shift) * (p.w.source >> shift) + (x >> shift)) * p.channels + c) : 0;
      copy_chunk<kWidth<T>>(to + slot[i], p.source + at, p.channels - c, valid, p.aligned);
      p.mask.copy(to + 2 * bytes + slot[i], at, y % 2 * 2 + x % 2, p.channels - c, valid);
      const bool has_weight = inside && column < p.out_channels;
      const int64_t from = has_weight ? int64_t(column) * p.filter + (tap * p.channels + c) : 0;
      copy_chunk<kWidth<T>>(to + bytes + slot[i], p.weight + from, p.channels - c, has_weight, p.aligned);
    }
    k.advance(p.step, p.chunks, p.w.taps);
  };
  auto arrive = [&](int buffer) {
    if (!p.mask) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint4* const grad = reinterpret_cast<uint4*>(shared + buffer * buffer_bytes + slot[i]);
      *grad = p.mask.apply(*grad, grad + 2 * bytes / 16);
    }
  };
  Sums<LARGE> sums = {};
  auto compute = [&](int buffer) {
    const unsigned char* const operands = shared + buffer * buffer_bytes;
    multiply_tiles<T, EXACT, LARGE, false>(sums, operands, operands + bytes);
  };
  const int inner_chunks = p.h.taps * p.w.taps * p.chunks;
  pipeline((inner_chunks + kChunks - 1) / kChunks, load, arrive, compute);
  store_tile<T, LARGE>(p, sums, rows, bias, first_column, shared);
}

// Launches the convolution of `source` with weight [out's channels, source's channels, KH, KW] along two axes.
Status run(View out, View code, View source, View saved, View weight, View bias, Axis h, Axis w, bool relu, bool exact,
           bool large, Stream stream) {
  if (w.taps == 0) {  // no taps at all; the kernel counts in units of w.taps
    h.taps = 0;
    w.taps = 1;
  }
  return for_products(out.dtype, exact, large, [&](auto type, auto exactly, auto size) {
    using T = decltype(type);
    constexpr bool kExact = decltype(exactly)::value, kLarge = decltype(size)::value;
    using Size = Tile<kLarge>;
    const int64_t channels = source.shape[1], chunks = ceil_div(channels, kWidth<T>);
    const Convolution<T> p = {out.as<T>(),
                              code ? code.as<uint8_t>() : nullptr,
                              source.as<T>(),
                              weight.as<T>(),
                              bias ? bias.as<T>() : nullptr,
                              mask_of<T>(saved),
                              h,
                              w,
                              out.shape[0] * h.results * w.results * (code ? 4 : 1),
                              static_cast<int>(out.shape[2]),
                              static_cast<int>(out.shape[3]),
                              static_cast<int>(out.shape[1]),
                              static_cast<int>(channels),
                              static_cast<int>(weight.shape[3]),
                              static_cast<int>(weight.numel() / weight.shape[0]),
                              static_cast<int>(chunks),
                              static_cast<int>(ceil_div(out.shape[1], Size::size)),
                              Counter(kChunks, static_cast<int>(chunks), w.taps),
                              relu,
                              in_chunks<T>(source) && is_aligned(weight.as<T>()),
                              in_chunks<T>(out) && in_chunks<T>(code)};
    const int64_t blocks = ceil_div(p.results, Size::size) * p.column_tiles;
    PYFUSED_REQUIRE(blocks <= INT32_MAX, "input", "has too many pixels");
    const size_t buffers = kStages * (saved ? 3 : 2) * Size::bytes;
    const size_t tile = Size::size * (Size::size + kWidth<T>)*sizeof(T);
    return launch(convolve<T, kExact, kLarge>, static_cast<unsigned>(blocks), Size::threads, max(buffers, tile), stream,
                  p);
  });
}

Status check(const View& out, const View& source, const View& weight) {
  PYFUSED_REQUIRE(is_nhwc(out) && fits(out), "out", "must be (N, C, H, W) in channels_last without gaps");
  PYFUSED_REQUIRE(is_nhwc(source) && fits(source) && source.shape[0] == out.shape[0], "source",
                  "must be (N, C, H, W) in channels_last without gaps");
  PYFUSED_REQUIRE(
      is_nhwc(weight) && fits(weight) && weight.shape[0] == out.shape[1] && weight.shape[1] == source.shape[1],
      "weight", "must be (C_out, C_in, KH, KW) in channels_last, groups = 1");
  PYFUSED_REQUIRE(source.dtype == out.dtype && weight.dtype == out.dtype, "weight", "must share one dtype");
  PYFUSED_REQUIRE(weight.numel() > 0, "weight", "must not be empty");
  return {};
}

// The results of one spatial dimension of d_input at positions residue, residue + stride, ...; taps r contribute for
// which stride divides residue + padding - r * dilation: every `spacing`th from `first` on.
Axis backward_axis(int residue, int64_t size, int64_t source, int64_t taps, int stride, int padding, int dilation) {
  int first = 0, spacing = 1;
  while (first < taps && (residue + padding - first * dilation) % stride != 0) ++first;
  while (spacing * dilation % stride != 0) ++spacing;
  const int found = first < taps ? static_cast<int>(ceil_div(taps - first, spacing)) : 0;
  const int results = residue < size ? static_cast<int>(ceil_div(size - residue, stride)) : 0;
  return {results,
          1,
          (residue + padding - first * dilation) / stride,
          -(spacing * dilation / stride),
          found,
          static_cast<int>(source),
          residue,
          stride,
          first,
          spacing};
}

}  // namespace

// weight: (C_out, C_in, KH, KW); everything in channels_last. code: None, or uint8 like out, which then is pooled by 2x2
// windows. exact: float as 3xTF32; large: tiles of 128 x 128.
Status conv2d_implicit_gemm(View out, View code, View input, View weight, View bias, int stride_h, int stride_w,
                            int padding_h, int padding_w, int dilation_h, int dilation_w, bool exact, bool large,
                            Stream stream) {
  PYFUSED_TRY(check(out, input, weight));
  PYFUSED_REQUIRE(!code || is_code_of(code, out), "code", "must be uint8, like out");
  PYFUSED_REQUIRE(!bias || (bias.dtype == out.dtype && bias.contiguous() && bias.numel() == out.shape[1]), "bias",
                  "must be contiguous, one number per channel");
  auto axis = [&](int d, int stride, int padding, int dilation) -> Axis {
    return {static_cast<int>(out.shape[d]),   stride, -padding, dilation, static_cast<int>(weight.shape[d]),
            static_cast<int>(input.shape[d]), 0,      1,        0,        1};
  };
  return run(out, code, input, View(), weight, bias, axis(2, stride_h, padding_h, dilation_h),
             axis(3, stride_w, padding_w, dilation_w), true, exact, large, stream);
}

// weight: (C_in, C_out, KH, KW), the forward's transposed. saved: the output, the code of 2x2 pooling, then grad is the
// pooled output's; None: grad is masked already.
Status conv2d_implicit_gemm_backward_input(View d_input, View grad, View saved, View weight, int stride_h, int stride_w,
                                           int padding_h, int padding_w, int dilation_h, int dilation_w, bool exact,
                                           bool large, Stream stream) {
  PYFUSED_TRY(check(d_input, grad, weight));
  PYFUSED_REQUIRE(!saved || is_saved_with(saved, grad), "saved", "must be the output or codes, like grad");
  const int pool = is_code_of(saved, grad) ? 2 : 1;
  for (int a = 0; a < stride_h; ++a)
    for (int b = 0; b < stride_w; ++b) {
      auto axis = [&](int d, int residue, int stride, int padding, int dilation) {
        return backward_axis(residue, d_input.shape[d], grad.shape[d] * pool, weight.shape[d], stride, padding,
                             dilation);
      };
      PYFUSED_TRY(run(d_input, View(), grad, saved, weight, View(), axis(2, a, stride_h, padding_h, dilation_h),
                      axis(3, b, stride_w, padding_w, dilation_w), false, exact, large, stream));
    }
  return {};
}

}  // namespace cuda
}  // namespace pyfused
