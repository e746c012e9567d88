// Max-pooling fused with ReLU, forward and backward, for convolutions that another kernel or library computes.
//
//   relu_max_pool2d    out = max over the window of max(0, activation), code = its place in the window, 255 where out = 0
//   relu_max_unpool2d  g[n, c, y, x] = ∑ grad over the windows whose code points at (y, x)
//
// Tiles   a thread has one number of the output, NHWC 16 bytes of adjacent channels; neighbours are adjacent in memory.
// Traffic forward reads the activation and writes out and a byte per element of it: windows that overlap read again, from
//         cache; backward writes g and reads grad and codes for each window that covers an element, from cache beyond the
//         first. Bound by memory. 8x32x222x222, 2x2, float32: 66 MB each, 15 us at the 4.3 TB/s that an H200 copies. Not
//         measured.
// Sums    backward: over the windows by row, then column, in float (double for double).
// Edges   NaN: the last of a window is its maximum; of equal ones, the first. Rows and columns under no window get 0.
#include "cuda/conv2d_maximum.cuh"

namespace pyfused {
namespace cuda {
namespace {

constexpr int kBlock = 256;  // three at a time leave a thread 80 registers; left to itself, nvcc 13 takes 64 and spills

struct Pool {
  int channels, height, width, rows, columns;  // of the activation; rows, columns: of the pooled tensor
  int kh, kw, sh, sw;
  bool nhwc;

  __device__ __forceinline__ int64_t at(int64_t n, int c, int y, int x, int h, int w) const {
    return nhwc ? ((n * h + y) * w + x) * channels + c : ((n * channels + c) * h + y) * w + x;
  }
};

template <int N>
struct alignas(N) Codes {
  uint8_t of[N];
};

// Where the thread's N channels of a tensor [batch, channels, h, w] are; false past the last. The block's first image is
// found in 64 bits, the rest in 32.
template <int N>
__device__ __forceinline__ bool find(const Pool& p, int64_t batch, int h, int w, int64_t& n, int& c, int& y, int& x) {
  const int64_t begin = int64_t(blockIdx.x) * kBlock;
  const unsigned groups = p.channels / N, image = groups * h * w;
  n = begin / image;
  unsigned i = static_cast<unsigned>(begin - n * image) + threadIdx.x;
  n += i / image;
  i %= image;
  if (p.nhwc) {
    c = i % groups * N, i /= groups;
    x = i % w, y = i / w;
  } else {
    x = i % w, i /= w;
    y = i % h, c = i / h;
  }
  return n < batch;
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock, 3) pool(T* out, uint8_t* code, const T* activation, int64_t batch, Pool p) {
  using C = compute_t<T>;
  int64_t n;
  int c, y, x;
  if (!find<N>(p, batch, p.rows, p.columns, n, c, y, x)) return;
  Maximum<C> top[N];
  C value[N];
  load<N>(value, activation + p.at(n, c, y * p.sh, x * p.sw, p.height, p.width), true);
#pragma unroll
  for (int k = 0; k < N; ++k) top[k].begin(value[k]);
  for (int i = 0; i < p.kh; ++i)
    for (int j = 0; j < p.kw; ++j) {
      load<N>(value, activation + p.at(n, c, y * p.sh + i, x * p.sw + j, p.height, p.width), true);
#pragma unroll
      for (int k = 0; k < N; ++k) top[k].meet(value[k], i * p.kw + j);
    }
  const int64_t to = p.at(n, c, y, x, p.rows, p.columns);
  Codes<N> codes;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    codes.of[k] = top[k].code();
    value[k] = relu(top[k].best);
  }
  *reinterpret_cast<Codes<N>*>(code + to) = codes;
  store<N>(out + to, value, true);
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock, 3) unpool(T* g, const T* grad, const uint8_t* code, int64_t batch, Pool p) {
  using C = compute_t<T>;
  int64_t n;
  int c, y, x;
  if (!find<N>(p, batch, p.height, p.width, n, c, y, x)) return;
  const int top = y < p.kh ? 0 : (y - p.kh) / p.sh + 1, bottom = min(y / p.sh, p.rows - 1);  // the windows over (y, x)
  const int left = x < p.kw ? 0 : (x - p.kw) / p.sw + 1, right = min(x / p.sw, p.columns - 1);
  C sum[N] = {}, value[N];
  for (int i = top; i <= bottom; ++i)
    for (int j = left; j <= right; ++j) {
      const int64_t from = p.at(n, c, i, j, p.rows, p.columns);
      const int here = (y - i * p.sh) * p.kw + x - j * p.sw;
      load<N>(value, grad + from, true);
      const Codes<N> codes = *reinterpret_cast<const Codes<N>*>(code + from);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += codes.of[k] == here ? value[k] : C(0);
    }
  store<N>(g + p.at(n, c, y, x, p.height, p.width), sum, true);
}

// The sizes, or what is wrong with the tensors.
Status sizes_of(Pool& p, const View& full, const View& pooled, const View& code, int64_t kh, int64_t kw, int64_t sh,
                int64_t sw) {
  PYFUSED_REQUIRE(full.ndim == 4 && pooled.ndim == 4 && pooled.shape[0] == full.shape[0] &&
                      pooled.shape[1] == full.shape[1] && pooled.dtype == full.dtype,
                  "out", "must be (N, C, ...) of the activation's dtype");
  PYFUSED_REQUIRE(code.dtype == DType::u8 && same_shape(code, pooled), "code", "must be uint8 with the pooled shape");
  PYFUSED_REQUIRE(kh > 0 && kw > 0 && kh <= kDead && kw <= kDead && kh * kw <= kDead, "pool_size",
                  "must be positive, at most 255 elements");
  PYFUSED_REQUIRE(sh > 0 && sw > 0 && sh < 1 << 28 && sw < 1 << 28, "pool_stride", "must be positive");
  PYFUSED_REQUIRE(pooled.numel() == 0 || ((pooled.shape[2] - 1) * sh + kh <= full.shape[2] &&
                                          (pooled.shape[3] - 1) * sw + kw <= full.shape[3]),
                  "out", "the windows reach past the activation");
  PYFUSED_REQUIRE(full.shape[1] * full.shape[2] * full.shape[3] < INT32_MAX - kBlock, "activation",
                  "must have fewer than 2^31 numbers an image");
  const bool nhwc = is_nhwc(full) && is_nhwc(pooled) && is_nhwc(code);
  PYFUSED_REQUIRE(nhwc || (is_nchw(full) && is_nchw(pooled) && is_nchw(code)), "out",
                  "all tensors must be contiguous, or all channels_last");
  auto number = [](int64_t x) { return static_cast<int>(x); };
  p = {number(full.shape[1]),
       number(full.shape[2]),
       number(full.shape[3]),
       number(pooled.shape[2]),
       number(pooled.shape[3]),
       number(kh),
       number(kw),
       number(sh),
       number(sw),
       nhwc};
  return {};
}

// Launches with a thread for each number, or each 16 bytes, of `out`.
template <class T, class Run>
Status per_number(const View& out, const View& full, const View& pooled, const View& code, const Pool& p,
                  const Run& run) {
  const bool vectors = p.nhwc && p.channels % kWidth<T> == 0 && is_aligned(full.as<T>()) &&
                       is_aligned(pooled.as<T>()) && reinterpret_cast<uintptr_t>(code.data) % kWidth<T> == 0;
  const int64_t blocks = ceil_div(out.numel(), int64_t(kBlock) * (vectors ? kWidth<T> : 1));
  PYFUSED_REQUIRE(blocks <= INT32_MAX, "out", "is too large");
  return run(vectors, static_cast<unsigned>(blocks));
}

}  // namespace

Status relu_max_pool2d(View out, View code, View activation, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                       Stream stream) {
  Pool p;
  PYFUSED_TRY(sizes_of(p, activation, out, code, kh, kw, sh, sw));
  return for_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    return per_number<T>(out, activation, out, code, p, [&](bool vectors, unsigned blocks) {
      return launch(vectors ? pool<T, kWidth<T>> : pool<T, 1>, blocks, kBlock, 0, stream, out.as<T>(),
                    code.as<uint8_t>(), activation.as<T>(), out.shape[0], p);
    });
  });
}

Status relu_max_unpool2d(View g, View grad, View code, int64_t kh, int64_t kw, int64_t sh, int64_t sw, Stream stream) {
  Pool p;
  PYFUSED_TRY(sizes_of(p, g, grad, code, kh, kw, sh, sw));
  return for_dtype(g.dtype, [&](auto type) {
    using T = decltype(type);
    return per_number<T>(g, g, grad, code, p, [&](bool vectors, unsigned blocks) {
      return launch(vectors ? unpool<T, kWidth<T>> : unpool<T, 1>, blocks, kBlock, 0, stream, g.as<T>(), grad.as<T>(),
                    code.as<uint8_t>(), g.shape[0], p);
    });
  });
}

}  // namespace cuda
}  // namespace pyfused
