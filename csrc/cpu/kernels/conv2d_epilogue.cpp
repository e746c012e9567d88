// The passes around a convolution that another library computes: ReLU's gradient with the bias gradient, and max-pooling
// fused with ReLU, forward and backward. One read and one write of every element; both layouts are native.
//
//   conv2d_relu_grad      g = grad where saved is alive, else 0;  d_bias[c] = ∑ g[:, c]
//                         alive: output > 0 or NaN for a saved output, code != 255 for saved codes
//   relu_max_pool2d       out = max over the window of max(0, activation), code = its place in the window, 255 where out = 0
//   relu_max_unpool2d     g[n, c, y, x] = ∑ grad over the windows whose code points at (y, x)
//
// Floor: memory bandwidth. Bytes per element of T bytes: 3T (g given) or 2T; T + (T + 1) / window; T + (T + 1) · windows
// that cover an element.
#include "conv2d_grad.h"
#include "cpu/kernels.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kStrip = 256;  // pooled columns handled at a time in NCHW

struct KeepAlive {
  template <class C, class S>
  PYFUSED_INLINE Vec<C> of(Vec<C> grad, Vec<C> saved) const {
    if constexpr (std::is_same_v<S, uint8_t>)
      return saved == splat<C>(kDead) ? Vec<C>{} : grad;
    else
      return saved <= Vec<C>{} ? Vec<C>{} : grad;
  }
};

struct Pool {
  int64_t kh, kw, sh, sw;
};

// NHWC: one row of pooled outputs, vectors over channels.
template <class T>
PYFUSED_INLINE void pool_row_nhwc(T* out, uint8_t* code, const T* x, int64_t columns, int64_t width, int64_t channels,
                                  const Pool& k) {
  using C = compute_t<T>;
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t c = 0; c < channels; c += lanes<C>) {
      int64_t n = min<int64_t>(channels - c, lanes<C>);
      const T* corner = x + column * k.sw * channels + c;
      Vec<C> best = read<C>(corner, n), place{};
      for (int64_t i = 0; i < k.kh; ++i)
        for (int64_t j = 0; j < k.kw; ++j) {
          Vec<C> value = read<C>(corner + (i * width + j) * channels, n);
          auto better = (value > best) | (value != value);
          best = better ? value : best;
          place = better ? splat<C>(static_cast<C>(i * k.kw + j)) : place;
        }
      place = best <= Vec<C>{} ? splat<C>(kDead) : place;
      write<C>(out + column * channels + c, relu<C>(best), n);
      write<C>(code + column * channels + c, place, n);
    }
}

// NCHW: up to kStrip pooled outputs of one row. Each input row is converted once; SW: the window step where it is known,
// so that the compiler turns strided reads into shuffles, else 0.
template <class T, int SW>
void pool_strip_nchw(T* out, uint8_t* code, const T* x, compute_t<T>* row, int64_t columns, int64_t width,
                     const Pool& k) {
  using C = compute_t<T>;
  C best[kStrip], place[kStrip];
  int64_t sw = SW ? SW : k.sw, span = (columns - 1) * sw + k.kw;
  for (int64_t i = 0; i < k.kh; ++i) {
    int64_t w = 0;
    for (; w + lanes<C> <= span; w += lanes<C>) store(row + w, load(x + i * width + w));
    for (; w < span; ++w) row[w] = to_compute(x[i * width + w]);
    for (int64_t j = 0; j < k.kw; ++j) {
      C here = static_cast<C>(i * k.kw + j);
      for (int64_t p = 0; p < columns; ++p) {
        C value = row[p * sw + j];
        bool better = here == 0 || value > best[p] || value != value;
        best[p] = better ? value : best[p];
        place[p] = better ? here : place[p];
      }
    }
  }
  for (int64_t p = 0; p < columns; p += lanes<C>) {
    int64_t n = min<int64_t>(columns - p, lanes<C>);
    Vec<C> v = load(best + p), at = load(place + p);
    write<C>(code + p, v <= Vec<C>{} ? splat<C>(kDead) : at, n);
    write<C>(out + p, relu<C>(v), n);
  }
}

// The windows [first, last] along one dimension that cover position `at`.
struct Cover {
  int64_t first, last;
  PYFUSED_INLINE Cover(int64_t at, int64_t size, int64_t step, int64_t windows)
      : first(at < size ? 0 : (at - size) / step + 1), last(min(at / step, windows - 1)) {}
};

// NHWC: one row y of the gradient of the activation.
template <class T>
PYFUSED_INLINE void unpool_row_nhwc(T* g, const T* grad, const uint8_t* code, int64_t y, int64_t width,
                                    int64_t channels, int64_t pooled_rows, int64_t pooled_columns, const Pool& k) {
  using C = compute_t<T>;
  Cover rows(y, k.kh, k.sh, pooled_rows);
  for (int64_t x = 0; x < width; ++x) {
    Cover columns(x, k.kw, k.sw, pooled_columns);
    for (int64_t c = 0; c < channels; c += lanes<C>) {
      int64_t n = min<int64_t>(channels - c, lanes<C>);
      Vec<C> sum{};
      for (int64_t r = rows.first; r <= rows.last; ++r)
        for (int64_t q = columns.first; q <= columns.last; ++q) {
          int64_t at = (r * pooled_columns + q) * channels + c;
          Vec<C> here = splat<C>(static_cast<C>((y - r * k.sh) * k.kw + x - q * k.sw));
          sum += read<C>(code + at, n) == here ? read<C>(grad + at, n) : Vec<C>{};
        }
      write<C>(g + x * channels + c, sum, n);
    }
  }
}

// NCHW: the same into a row in the compute type.
template <class T, int SW>
void unpool_row_nchw(T* g, compute_t<T>* row, const T* grad, const uint8_t* code, int64_t y, int64_t width,
                     int64_t pooled_rows, int64_t pooled_columns, const Pool& k) {
  using C = compute_t<T>;
  int64_t sw = SW ? SW : k.sw;
  for (int64_t x = 0; x < width; ++x) row[x] = 0;
  Cover rows(y, k.kh, k.sh, pooled_rows);
  for (int64_t r = rows.first; r <= rows.last; ++r)
    for (int64_t j = 0; j < k.kw; ++j) {
      uint8_t here = static_cast<uint8_t>((y - r * k.sh) * k.kw + j);
      const T* from = grad + r * pooled_columns;
      const uint8_t* place = code + r * pooled_columns;
      for (int64_t q = 0; q < pooled_columns; ++q) row[q * sw + j] += place[q] == here ? to_compute(from[q]) : C(0);
    }
  for (int64_t x = 0; x < width; x += lanes<C>) write<C>(g + x, load(row + x), min<int64_t>(width - x, lanes<C>));
}

Status check_pool(const View& full, const View& pooled, const View& code, const Pool& k) {
  PYFUSED_REQUIRE(full.ndim == 4 && pooled.ndim == 4 && pooled.shape[0] == full.shape[0] &&
                      pooled.shape[1] == full.shape[1] && pooled.dtype == full.dtype,
                  "out", "must be (N, C, ...) of the activation's dtype");
  PYFUSED_REQUIRE(code.dtype == DType::u8 && same_shape(code, pooled), "code", "must be uint8 with the pooled shape");
  PYFUSED_REQUIRE(k.kh > 0 && k.kw > 0 && k.sh > 0 && k.sw > 0 && k.kh * k.kw <= kDead, "pool_size",
                  "must be positive, at most 255 elements");
  PYFUSED_REQUIRE(pooled.numel() == 0 || ((pooled.shape[2] - 1) * k.sh + k.kh <= full.shape[2] &&
                                          (pooled.shape[3] - 1) * k.sw + k.kw <= full.shape[3]),
                  "out", "the windows reach past the activation");
  bool nhwc = is_nhwc(full) && is_nhwc(pooled) && is_nhwc(code);
  PYFUSED_REQUIRE(nhwc || (is_nchw(full) && is_nchw(pooled) && is_nchw(code)), "out",
                  "all tensors must be contiguous, or all channels_last");
  return {};
}

}  // namespace

Status conv2d_relu_grad(View g, View d_bias, View grad, View saved, int threads) {
  return saved.dtype == DType::u8 ? grad_pass<true>(g, d_bias, grad, saved, threads, KeepAlive{})
                                  : grad_pass<false>(g, d_bias, grad, saved, threads, KeepAlive{});
}

Status relu_max_pool2d(View out, View code, View activation, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                       int threads) {
  Pool k{kh, kw, sh, sw};
  if (Status bad = check_pool(activation, out, code, k); bad.code != Status::ok) return bad;
  if (out.numel() == 0) return {};
  bool nhwc = is_nhwc(activation) && is_nhwc(out) && is_nhwc(code);
  int64_t channels = out.shape[1], rows = out.shape[2], columns = out.shape[3];
  int64_t height = activation.shape[2], width = activation.shape[3];
  return for_dtype(out.dtype, [&](auto tag) {
    using T = decltype(tag);
    using C = compute_t<T>;
    int64_t row_size = kStrip * sw + kw + lanes<C>;
    C* buffers = static_cast<C*>(scratch(0, threads * row_size * sizeof(C)));
    int64_t images = nhwc ? out.shape[0] : out.shape[0] * channels;
    int64_t pixel = nhwc ? channels : 1;
    int64_t grain = ceil_div(4096, columns * pixel * kh * kw);
    parallel_for(images * rows, grain, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* x = activation.as<T>() + (unit / rows * height + unit % rows * sh) * width * pixel;
        T* to = out.as<T>() + unit * columns * pixel;
        uint8_t* to_code = code.as<uint8_t>() + unit * columns * pixel;
        if (nhwc)
          pool_row_nhwc<T>(to, to_code, x, columns, width, channels, k);
        else
          for (int64_t first = 0; first < columns; first += kStrip) {
            auto strip = sw == 2 ? pool_strip_nchw<T, 2> : pool_strip_nchw<T, 0>;
            strip(to + first, to_code + first, x + first * sw, buffers + thread * row_size,
                  min(columns - first, kStrip), width, k);
          }
      }
    });
    return Status{};
  });
}

Status relu_max_unpool2d(View g, View grad, View code, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int threads) {
  Pool k{kh, kw, sh, sw};
  if (Status bad = check_pool(g, grad, code, k); bad.code != Status::ok) return bad;
  bool nhwc = is_nhwc(g) && is_nhwc(grad) && is_nhwc(code);
  int64_t channels = g.shape[1], height = g.shape[2], width = g.shape[3];
  int64_t rows = grad.shape[2], columns = grad.shape[3];
  return for_dtype(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    using C = compute_t<T>;
    int64_t row_size = width + lanes<C>;
    C* buffers = static_cast<C*>(scratch(0, threads * row_size * sizeof(C)));
    int64_t images = nhwc ? g.shape[0] : g.shape[0] * channels, pixel = nhwc ? channels : 1;
    int64_t grain = ceil_div(4096, max<int64_t>(width * pixel, 1));
    parallel_for(images * height, grain, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t unit = begin; unit < end; ++unit) {
        int64_t y = unit % height, from = unit / height * rows * columns * pixel;
        T* to = g.as<T>() + unit * width * pixel;
        const T* pooled = grad.as<T>() + from;
        const uint8_t* place = code.as<uint8_t>() + from;
        if (nhwc) {
          unpool_row_nhwc<T>(to, pooled, place, y, width, channels, rows, columns, k);
        } else {
          auto unpool = sw == 2 ? unpool_row_nchw<T, 2> : unpool_row_nchw<T, 0>;
          unpool(to, buffers + thread * row_size, pooled, place, y, width, rows, columns, k);
        }
      }
    });
    return Status{};
  });
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
