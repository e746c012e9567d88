// Convolution + bias + ReLU, gradients by the weight and the bias, as a product of matrices that are never built. NHWC.
//
//   d_weight[k, r, s, c] = ∑_{n, y, x} g[n, y, x, k] · input[n, y·S - P + r·D, x·S - P + s·D, c]
//   d_bias[k] = ∑_{n, y, x} g[n, y, x, k],   g = grad where output is not 0, else 0
//
// Rows are the convolution's channels k, columns (tap, channel c), the inner dimension is pixels, of which `splits` blocks
// take a part each. Their sums go to a workspace [splits][d_weight, d_bias] in float, which a second kernel adds up.
// Tiles   as in conv2d_implicit_gemm.cu: 128 x 128 or 64 x 64, 32 pixels (float: 16) at a time, 3 buffers; a thread's
//         columns never change, so only pixels are counted. Both operands lie in columns: ldmatrix transposes them.
// Mask    as there, by the output or the codes of 2x2 pooling. The blocks of the first columns also add up the chunks of g
//         that they have masked.
// Traffic M pixels of K channels from C: 2·M·K·C·R² flops; grad, output and input once through memory, and per tile of
//         128 x 128 and 32 pixels 24 KB from the second-level cache for 1 Mflop: 43 flops a byte, 230 Tflop/s at 5.5 TB/s.
//         The workspace is written and read once: splits · K·C·R² floats. 32 x 56 x 56 x 64, 3 x 3 to 64, bfloat16:
//         7.4 Gflop, 32 us; 39 MB, 13 us at 3 TB/s. Not measured.
// Saves   nothing.
// Sums    in float: within a split in the order of the pixels, then the splits in theirs.
// Edges   no images: zeros. A split without pixels is zeros, too.
#include "cuda/conv2d_implicit_gemm.cuh"

namespace pyfused {
namespace cuda {
namespace {

template <class T>
struct WeightGradient {
  float* workspace;
  const T *grad, *input;
  Mask<T> mask;
  int images, height, width, channels, out_height, out_width, out_channels;  // out: the convolution's
  int taps, weight_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int chunks, grad_image, input_image;    // of a pixel of the input; numbers of an image
  int64_t steps, steps_per_split, slice;  // of kInner pixels; numbers that a split writes
  Counter step;                           // kInner pixels over (image, row, column)
  bool with_bias, grad_aligned, input_aligned;
};

// What a thread copies of the input: always the same tap and channels.
struct Column {
  int y, x, channel;  // what the tap adds to a pixel's position times the stride
  bool exists;
};
template <class T>
__device__ __forceinline__ Column find_column(const WeightGradient<T>& p, int chunk) {
  const int tap = chunk / p.chunks, r = tap / p.weight_width, s = tap - r * p.weight_width;
  return {r * p.dilation_h - p.padding_h, s * p.dilation_w - p.padding_w, (chunk - tap * p.chunks) * kWidth<T>,
          tap < p.taps};
}

template <class T, bool EXACT, bool LARGE>
__global__ void __launch_bounds__(Tile<LARGE>::threads, LARGE && sizeof(T) == 2 ? 2 : 1)
    backward_weight(WeightGradient<T> p) {
  constexpr int size = Tile<LARGE>::size, bytes = Tile<LARGE>::bytes, width = kWidth<T>;
  constexpr int chunks = size / width, lines = kInner<T> / 2;
  static_assert(chunks * lines == Tile<LARGE>::threads, "a thread copies one chunk of two pixels of each operand");
  PYFUSED_DYNAMIC_SHARED(unsigned char, shared);
  const int chunk = threadIdx.x % chunks, line = threadIdx.x / chunks;
  const int slot[2] = {column_chunk<T, LARGE>(line, chunk), column_chunk<T, LARGE>(line + lines, chunk)};
  const int buffer_bytes = (p.mask ? 3 : 2) * bytes, shift = p.mask.code ? 1 : 0;
  const int first_row = blockIdx.y * size;
  int k = first_row + chunk * width;
  const Column column = find_column(p, blockIdx.x * chunks + chunk);
  const int64_t first_step = blockIdx.z * p.steps_per_split, pixel = first_step * kInner<T> + line;
  Counter at[2] = {Counter(pixel, p.out_width, p.out_height), Counter(pixel + lines, p.out_width, p.out_height)};
  auto load = [&](int buffer) {
    unsigned char* const to = shared + buffer * buffer_bytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Within an image in 32 bits, as in the other kernel.
      const bool exists = at[i].high < p.images, has_grad = exists && k < p.out_channels;
      const int pixel = (at[i].middle >> shift) * (p.out_width >> shift) + (at[i].low >> shift);
      const int64_t g = has_grad ? int64_t(at[i].high) * p.grad_image + (pixel * p.out_channels + k) : 0;
      copy_chunk<width>(to + slot[i], p.grad + g, p.out_channels - k, has_grad, p.grad_aligned);
      const int place = at[i].middle % 2 * 2 + at[i].low % 2;
      p.mask.copy(to + 2 * bytes + slot[i], g, place, p.out_channels - k, has_grad);
      const int y = at[i].middle * p.stride_h + column.y, x = at[i].low * p.stride_w + column.x;
      const bool valid = exists && column.exists && y >= 0 && y < p.height && x >= 0 && x < p.width;
      const int64_t from =
          valid ? int64_t(at[i].high) * p.input_image + ((y * p.width + x) * p.channels + column.channel) : 0;
      copy_chunk<width>(to + bytes + slot[i], p.input + from, p.channels - column.channel, valid, p.input_aligned);
      at[i].advance(p.step, p.out_width, p.out_height);
    }
  };
  // Each thread's sums of the chunks of g that it copies; in registers they would make large tiles spill.
  __shared__ float bias[lines][size];
  const bool with_bias = p.with_bias && blockIdx.x == 0;
  for (int i = 0; i < width; ++i) bias[line][chunk * width + i] = 0;
  auto arrive = [&](int buffer) {
    if (!p.mask && !with_bias) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint4* const grad = reinterpret_cast<uint4*>(shared + buffer * buffer_bytes + slot[i]);
      const uint4 g = p.mask.apply(*grad, grad + 2 * bytes / 16);
      *grad = g;
      if (with_bias) {
        float numbers[width];
        unpack<T>(numbers, g);
#pragma unroll
        for (int j = 0; j < width; ++j) bias[line][chunk * width + j] += numbers[j];
      }
    }
  };
  Sums<LARGE> sums = {};
  auto compute = [&](int buffer) {
    const unsigned char* const operands = shared + buffer * buffer_bytes;
    multiply_tiles<T, EXACT, LARGE, true>(sums, operands, operands + bytes);
  };
  const int64_t left = p.steps - first_step;
  pipeline(static_cast<int>(max(int64_t(0), min(left, p.steps_per_split))), load, arrive, compute);

  float* const out = p.workspace + blockIdx.z * p.slice;
  for_each_pair<LARGE>(sums, [&](int i, int j, float x, float y) {
    const int from = blockIdx.x * chunks + j / width, tap = from / p.chunks;
    const int c = (from - tap * p.chunks) * width + j % width;
    if (first_row + i >= p.out_channels || tap >= p.taps) return;
    float* const to = out + (int64_t(first_row + i) * p.taps + tap) * p.channels + c;
    if (c < p.channels) to[0] = x;
    if (c + 1 < p.channels) to[1] = y;
  });
  k = first_row + threadIdx.x;
  if (!with_bias || threadIdx.x >= size || k >= p.out_channels) return;
  float sum = 0;
  for (int i = 0; i < lines; ++i) sum += bias[i][threadIdx.x];
  out[int64_t(p.out_channels) * p.taps * p.channels + k] = sum;
}

// d_weight [K, C, KH, KW], in any strides, and d_bias: the sums of the splits' parts.
template <class T>
struct Parts {
  T *d_weight, *d_bias;  // d_bias may be null
  const float* workspace;
  int64_t slice, weights, strides[4];
  int splits, channels, weight_height, weight_width;
};
template <class T>
__global__ void __launch_bounds__(256) sum_parts(Parts<T> p) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.slice || (i >= p.weights && !p.d_bias)) return;
  float sum = 0;
#pragma unroll 4
  for (int s = 0; s < p.splits; ++s) sum += p.workspace[s * p.slice + i];
  if (i >= p.weights) {
    p.d_bias[i - p.weights] = from_compute<T>(sum);
    return;
  }
  const int64_t tap = i / p.channels, line = tap / p.weight_width, k = line / p.weight_height;
  p.d_weight[k * p.strides[0] + (i - tap * p.channels) * p.strides[1] + (line - k * p.weight_height) * p.strides[2] +
             (tap - line * p.weight_width) * p.strides[3]] = from_compute<T>(sum);
}

template <class T>
Status add_up(const View& d_weight, const View& d_bias, const View& workspace, Stream stream) {
  const Parts<T> p = {d_weight.as<T>(),
                      d_bias ? d_bias.as<T>() : nullptr,
                      workspace.as<float>(),
                      workspace.shape[1],
                      d_weight.numel(),
                      {d_weight.strides[0], d_weight.strides[1], d_weight.strides[2], d_weight.strides[3]},
                      static_cast<int>(workspace.shape[0]),
                      static_cast<int>(d_weight.shape[1]),
                      static_cast<int>(d_weight.shape[2]),
                      static_cast<int>(d_weight.shape[3])};
  return launch(sum_parts<T>, static_cast<unsigned>(ceil_div(p.slice, 256)), 256, 0, stream, p);
}

Status check(const View& d_weight, const View& d_bias, const View& workspace, const View& grad, const View& saved,
             const View& input) {
  PYFUSED_REQUIRE(is_nhwc(grad) && fits(grad), "grad", "must be (N, C, H, W) in channels_last without gaps");
  PYFUSED_REQUIRE(!saved || is_saved_with(saved, grad), "saved", "must be the output or codes, like grad");
  PYFUSED_REQUIRE(is_nhwc(input) && fits(input) && input.shape[0] == grad.shape[0], "input",
                  "must be (N, C, H, W) in channels_last without gaps");
  PYFUSED_REQUIRE(d_weight.ndim == 4 && fits(d_weight) && d_weight.numel() > 0 && d_weight.shape[0] == grad.shape[1] &&
                      d_weight.shape[1] == input.shape[1],
                  "d_weight", "must be (C_out, C_in, KH, KW), groups = 1");
  PYFUSED_REQUIRE(!d_bias || (d_bias.dtype == grad.dtype && d_bias.contiguous() && d_bias.numel() == grad.shape[1]),
                  "d_bias", "must be contiguous, one number per channel");
  PYFUSED_REQUIRE(input.dtype == grad.dtype && d_weight.dtype == grad.dtype, "input", "must share one dtype");
  PYFUSED_REQUIRE(workspace.dtype == DType::f32 && workspace.ndim == 2 && workspace.contiguous() &&
                      workspace.shape[0] > 0 && workspace.shape[0] <= 65535 &&
                      workspace.shape[1] == d_weight.numel() + grad.shape[1],
                  "workspace", "must be float32 [splits, d_weight and d_bias]");
  return {};
}

}  // namespace

// Everything but d_weight in channels_last. saved: the output, the code of 2x2 pooling, then grad is the pooled output's;
// None: grad is masked already. exact: float as 3xTF32, in tiles of 64 x 64 (larger ones would not fit into registers); large:
// tiles of 128 x 128.
Status conv2d_implicit_gemm_backward_weight(View d_weight, View d_bias, View workspace, View grad, View saved,
                                            View input, int stride_h, int stride_w, int padding_h, int padding_w,
                                            int dilation_h, int dilation_w, bool exact, bool large, Stream stream) {
  PYFUSED_TRY(check(d_weight, d_bias, workspace, grad, saved, input));
  return for_products(grad.dtype, exact, large, [&](auto type, auto exactly, auto tile) {
    using T = decltype(type);
    constexpr bool kExact = decltype(exactly)::value, kLarge = decltype(tile)::value && !kExact;
    using Size = Tile<kLarge>;
    auto size = [](const View& v, int d) { return static_cast<int>(v.shape[d]); };
    const int pool = is_code_of(saved, grad) ? 2 : 1;  // what is under no window has no gradient: it is left out
    WeightGradient<T> p = {workspace.as<float>(),
                           grad.as<T>(),
                           input.as<T>(),
                           mask_of<T>(saved),
                           size(input, 0),
                           size(input, 2),
                           size(input, 3),
                           size(input, 1),
                           size(grad, 2) * pool,
                           size(grad, 3) * pool,
                           size(grad, 1),
                           size(d_weight, 2) * size(d_weight, 3),
                           size(d_weight, 3),
                           stride_h,
                           stride_w,
                           padding_h,
                           padding_w,
                           dilation_h,
                           dilation_w,
                           0,
                           static_cast<int>(grad.numel() / max(grad.shape[0], int64_t(1))),
                           static_cast<int>(input.numel() / max(input.shape[0], int64_t(1))),
                           0,
                           0,
                           workspace.shape[1],
                           Counter(kInner<T>, size(grad, 3) * pool, size(grad, 2) * pool),
                           bool(d_bias),
                           in_chunks<T>(grad),
                           in_chunks<T>(input)};
    p.chunks = static_cast<int>(ceil_div(p.channels, kWidth<T>));
    p.steps = ceil_div(int64_t(p.images) * p.out_height * p.out_width, kInner<T>);
    p.steps_per_split = ceil_div(p.steps, workspace.shape[0]);
    PYFUSED_REQUIRE(p.steps_per_split <= INT32_MAX, "workspace", "needs more splits");
    const int64_t across = ceil_div(int64_t(p.taps) * p.chunks, Size::size / kWidth<T>);
    const int64_t down = ceil_div(p.out_channels, Size::size);
    PYFUSED_REQUIRE(across <= INT32_MAX && down <= 65535, "d_weight", "has too many channels");
    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down),
                    static_cast<unsigned>(workspace.shape[0]));
    const size_t buffers = kStages * (saved ? 3 : 2) * Size::bytes;
    PYFUSED_TRY(launch(backward_weight<T, kExact, kLarge>, grid, Size::threads, buffers, stream, p));
    return add_up<T>(d_weight, d_bias, workspace, stream);
  });
}

}  // namespace cuda
}  // namespace pyfused
