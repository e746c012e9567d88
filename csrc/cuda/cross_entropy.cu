// Softmax cross-entropy, forward, on logits z[r, c] of R rows and C classes: one launch, one pass over the logits.
//
//   lse = log ∑_c exp(z_c)                                    z = softcap · tanh(input / softcap) where softcap > 0
//   labels         loss_r = w_t (1-ε) (lse - z_t) + ε/C ∑_c w_c (lse - z_c) + w_t z_loss lse²    label t, class weights w
//   probabilities  loss_r = ∑_c w_c ((1-ε) y_c + ε/C) (lse - z_c) + z_loss lse²
//   loss   = ∑_r loss_r (sum), / total (mean; total = ∑_r w_t of rows not ignored, R for probabilities), or every loss_r
//
// Tiles   Adjacent classes: 4 to 32 lanes share a row up to 4096 classes, beyond that a block of 256 or 512 threads;
//         16-byte loads, what lies outside 16-byte boundaries one by one (at most 2 x 15 bytes of a row). Other layouts,
//         (N, C, P) above all: 32 adjacent positions to a warp, coalesced; from 64 classes on 8 warps share the classes.
// Traffic R C sizeof(T) bytes read, plus 8 R of labels and 12 R of statistics; 8192 x 128256 bf16: 2.1 GB, 0.49 ms at
//         the 4.3 TB/s that an H200 copies. Arithmetic: one exp and about 10 instructions per 16-bit element (read off
//         the disassembly; float32: 18), two thirds of what the multiprocessors issue in that time: bound by memory,
//         not by much. Small problems are bound by the launch (2-3 us). None of these times has been measured.
//         Few rows of many classes use one multiprocessor a row: 256 KB in about 4 us.
// Online  Each thread keeps the maximum so far and ∑ exp(z - maximum), rescaled when the maximum grows; one comparison
//         per 16 bytes. Labels: ∑ leaves the label out, see pyfused/ops/cross_entropy.py for what is saved and why.
// Sums    rows within a thread, threads, blocks in double, in an order that depends on shape, strides and the address
//         modulo 16; the block that ends last adds the blocks' sums. Its counter is cleared before the launch:
//         1 to 2 us more where there are several blocks. One that lives on, and that the last block clears, would be
//         shared by two streams, or by a graph's replay and what runs beside it: both would count to too much.
// Edges   as csrc/cpu/kernels/cross_entropy.cpp, but a label outside [0, C) that is not ignore_index makes the row's loss
//         NaN, is left out of `total` and is reported (index_errors.cuh).
#include "cuda/cross_entropy.cuh"

namespace pyfused {
namespace cuda {
namespace {

template <class C>
struct RowSums {   // of some of a row's classes
  C top, others;   // maximum m; ∑ exp(z - m) without the label
  C at_label;      // the label's logit, or 0 if it is not among these
  C spread, mass;  // ∑ u (m - z) and ∑ u

  static __device__ __forceinline__ RowSums none() { return {-C(INFINITY), C(0), C(0), C(0), C(0)}; }

  // The same sums relative to a maximum that is at least as large. Relative to -inf they are 0 (or never finite again).
  __device__ __forceinline__ void raise_top(C to) {
    if (to > top) {
      if (top > -C(INFINITY)) {
        others *= exp(top - to);
        spread += mass * (to - top);
      }
      top = to;
    }
  }

  // The classes c, c + step, ... with the logits x.
  template <bool SOFT, class T, int N, class U>
  __device__ __forceinline__ void add(const Problem<C>& p, C (&x)[N], const U* y, int64_t y_stride, int label, int c,
                                      int step) {
    p.cap(x);
    C most = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmax(x[i], most);  // ignores NaN
    raise_top(most);
    const C base = top > -C(INFINITY) ? top : C(0);  // nothing but -inf so far: exp(-inf) instead of exp(NaN)
    if (SOFT || p.spread > 0) {
      C u[N];
      p.template spread_target<SOFT>(u, y, y_stride, c, step);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        spread += u[i] * (base - x[i]);
        mass += u[i];
      }
    }
    if (static_cast<unsigned>(label - c) < static_cast<unsigned>(N * step)) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (label == c + i * step) {
          at_label = x[i];
          x[i] = -C(INFINITY);
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) others += exp_of<T>(x[i] - base);
  }

  __device__ __forceinline__ void combine_lanes(int lanes, bool with_spread) {
    raise_top(group_max(top, lanes));
    others = group_sum(others, lanes);
    at_label = group_sum(at_label, lanes);
    if (with_spread) {
      spread = group_sum(spread, lanes);
      mass = group_sum(mass, lanes);
    }
  }
  __device__ __forceinline__ void combine(RowSums other) {
    raise_top(other.top);
    other.raise_top(top);
    others += other.others;
    at_label += other.at_label;
    spread += other.spread;
    mass += other.mass;
  }
};

template <class C>
struct Outputs {
  C *loss, *lse, *total;  // lse may be null
  unsigned* counter;      // of blocks that have ended
  double* partial;        // [blocks, 2]
};

// Writes what one row keeps; adds its loss and weight to `sums`.
template <bool SOFT, class C>
__device__ __forceinline__ void finish_row(const Problem<C>& p, const Outputs<C>& out, RowSums<C> s, int64_t r,
                                           int label, double (&sums)[2]) {
  if (!SOFT && label == kIgnored && !out.lse) s.top = 0, s.others = 1;  // was not read: finite statistics
  const C w = p.row_weight(label), at_label = label >= 0 ? exp(s.at_label - s.top) : C(0);
  // S - 1, which is exactly the sum of the others where the label has the maximum (at_label = 1)
  const C log_sum = log1p(s.others + (at_label - C(1))), all = s.others + at_label, lse = s.top + log_sum;
  C loss = SOFT ? s.mass * log_sum + s.spread : w * p.keep * ((s.top - s.at_label) + log_sum);
  if (!SOFT && p.spread > 0) loss += p.spread * (s.mass * log_sum + s.spread);
  if (p.z_loss != 0) loss += p.z_loss * w * lse * lse;
  if (!SOFT && label < 0) loss = label == kIgnored ? C(0) : C(NAN);
  if (!SOFT && label == kBadLabel) report_out_of_range(p.index_error, Argument::target, r, p.labels[r], p.classes);
  p.stats[r] = s.top;
  p.stats[p.rows + r] = all;
  p.stats[2 * p.rows + r] = SOFT ? s.mass : s.others / at_label;
  if (out.lse) out.lse[r] = lse;
  if (p.reduction == none) out.loss[r] = loss;
  sums[0] += loss;
  sums[1] += w;
}

// Writes loss and total from what every thread of every block has summed.
template <class C>
__device__ void finish(const Problem<C>& p, const Outputs<C>& out, const double (&sums)[2]) {
  __shared__ double shared[2][32];
  double loss = block_sum(sums[0], shared[0]), total = block_sum(sums[1], shared[1]);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      out.partial[2 * blockIdx.x] = loss;
      out.partial[2 * blockIdx.x + 1] = total;
    }
    if (!is_last_block(out.counter)) return;
    loss = total = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      loss += __ldcg(out.partial + 2 * i);
      total += __ldcg(out.partial + 2 * i + 1);
    }
    loss = block_sum(loss, shared[0]);
    total = block_sum(total, shared[1]);
  }
  if (threadIdx.x == 0) {
    *out.total = static_cast<C>(total);
    if (p.reduction != none) *out.loss = static_cast<C>(p.reduction == mean ? loss / total : loss);
  }
}

// Classes adjacent: p.lanes threads to a row.
template <bool SOFT, bool PLAIN, class T, class U, class C = compute_t<T>>
__global__ void __launch_bounds__(512, kBlocksAtOnce<C, !PLAIN>)
    forward_rows(Problem<C> p, Outputs<C> out, Matrix<const T> logits, Matrix<const U> probabilities) {
  if (PLAIN) p.spread = p.softcap = 0;  // as they are: now the compiler knows
  __shared__ RowSums<C> of_warp[16];
  const int lane = threadIdx.x % p.lanes, group = threadIdx.x / p.lanes, groups = blockDim.x / p.lanes;
  const bool with_spread = SOFT || p.spread > 0;
  double sums[2] = {0, 0};
  for (int64_t first = int64_t(blockIdx.x) * groups; first < p.rows; first += int64_t(gridDim.x) * groups) {
    const int64_t r = first + group;
    const int label = p.label(r);
    RowSums<C> s = RowSums<C>::none();
    if (r < p.rows && (SOFT || label != kIgnored || out.lse)) {
      const T* z = logits.row(r);
      const U* y = SOFT ? probabilities.row(r) : nullptr;
      for_each_vector(z, p.classes, lane, p.lanes,
                      [&](int c, auto& x) { s.template add<SOFT, T>(p, x, y, 1, label, c, 1); });
    }
    s.combine_lanes(min(p.lanes, 32), with_spread);
    if (p.lanes > 32) {
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = s;
      __syncthreads();
      s = threadIdx.x < p.lanes / 32 ? of_warp[threadIdx.x] : RowSums<C>::none();
      __syncthreads();
      s.combine_lanes(32, with_spread);
    }
    if (lane == 0 && r < p.rows) finish_row<SOFT>(p, out, s, r, label, sums);
  }
  finish(p, out, sums);
}

// Any strides: a lane to a row, p.slices warps to 32 rows.
template <bool SOFT, class T, class U, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock, 2 * kBlocksAtOnce<C, SOFT>)
    forward_columns(Problem<C> p, Outputs<C> out, Matrix<const T> logits, Matrix<const U> probabilities) {
  __shared__ RowSums<C> of_slice[kBlock / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % p.slices;
  const int at_once = kBlock / p.slices;  // rows
  double sums[2] = {0, 0};
  for (int64_t first = int64_t(blockIdx.x) * at_once; first < p.rows; first += int64_t(gridDim.x) * at_once) {
    const int64_t r = first + warp / p.slices * 32 + lane;
    const int label = p.label(r);
    RowSums<C> s = RowSums<C>::none();
    if (r < p.rows && (SOFT || label != kIgnored || out.lse)) {
      const T* z = logits.row(r);
      const U* y = SOFT ? probabilities.row(r) : nullptr;
      const int64_t stride = logits.class_stride, y_stride = SOFT ? probabilities.class_stride : 0;
      int c = slice;
      for (; c < p.classes - (kAtOnce - 1) * p.slices; c += kAtOnce * p.slices) {
        C x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) x[i] = to_compute(z[(c + i * p.slices) * stride]);
        s.template add<SOFT, T>(p, x, y, y_stride, label, c, p.slices);
      }
      for (; c < p.classes; c += p.slices) {
        C x[1] = {to_compute(z[c * stride])};
        s.template add<SOFT, T>(p, x, y, y_stride, label, c, p.slices);
      }
    }
    if (p.slices > 1) {
      of_slice[warp][lane] = s;
      __syncthreads();
      if (slice == 0)
        for (int i = 1; i < p.slices; ++i) s.combine(of_slice[warp + i][lane]);
      __syncthreads();
    }
    if (slice == 0 && r < p.rows) finish_row<SOFT>(p, out, s, r, label, sums);
  }
  finish(p, out, sums);
}

}  // namespace

Status cross_entropy(View loss, View lse, View stats, View total, View workspace, View input, View target, View weight,
                     int reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                     Stream stream) {
  PYFUSED_TRY(check_cross_entropy(loss, lse, stats, total, input, target, weight, reduction));
  PYFUSED_REQUIRE(workspace.dtype == DType::f64 && workspace.contiguous() && workspace.numel() >= 1 + 2 * kMaxBlocks,
                  "workspace", "must be 2 contiguous float64 numbers per block and a counter");
  return for_dtype(input.dtype, [&](auto type) {
    using C = compute_t<decltype(type)>;
    const auto p = problem_of<decltype(type)>(input, target, weight, stats, reduction, ignore_index, label_smoothing,
                                              z_loss, softcap);
    const bool adjacent = input.strides[1] == 1 && (p.labels || target.strides[1] == 1);
    const Grid grid = grid_of(p, adjacent);
    double* memory = workspace.as<double>();
    const Outputs<C> out = {loss.as<C>(), lse ? lse.as<C>() : nullptr, total.as<C>(),
                            reinterpret_cast<unsigned*>(memory), memory + 1};
    if (grid.blocks > 1) PYFUSED_TRY(status_of(cudaMemsetAsync(memory, 0, sizeof(unsigned), stream)));
    return specialize<decltype(type)>(p, target, [&](auto soft, auto plain, auto t, auto u) {
      using T = decltype(t);
      using U = decltype(u);
      const Matrix<const T> z(input);
      const Matrix<const U> y(soft ? target : input);
      const auto kernel = adjacent ? forward_rows<soft(), plain(), T, U> : forward_columns<soft(), T, U>;
      return launch(kernel, grid.blocks, grid.threads, 0, stream, p, out, z, y);
    });
  });
}

}  // namespace cuda
}  // namespace pyfused
