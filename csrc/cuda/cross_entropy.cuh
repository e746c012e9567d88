// What both directions of cross_entropy stand on: the problem, its labels, its rows in memory.
#pragma once
#include "cross_entropy_arguments.h"
#include "cuda/common.cuh"
#include "cuda/index_errors.cuh"

namespace pyfused {
namespace cuda {

constexpr int kBlock = 256;  // threads, where a block serves several rows
// More blocks than this take several rows or groups of rows each: bounds the sums that the last block adds. So few in
// the emulation that its small cases get there.
#ifdef PYFUSED_CUDA_EMULATION
constexpr int kMaxBlocks = 3;
#else
constexpr int kMaxBlocks = 4096;
#endif
// Blocks of 512 threads that a multiprocessor must hold at once: bounds the registers, to 64 or 128 a thread.
template <class C, bool INVOLVED>
constexpr int kBlocksAtOnce = INVOLVED || sizeof(C) == 8 ? 1 : 2;
constexpr int kAtOnce = 8;  // loads that a thread has under way where classes are not adjacent
enum : int { kIgnored = -1, kBadLabel = -2 };

template <class T>
struct Matrix {  // rows x classes in memory; row r = (r / inner, r % inner)
  T* data;
  int64_t class_stride, outer_stride, inner_stride, inner;

  explicit Matrix(const View& v)
      : data(v.as<T>()),
        class_stride(v.strides[1]),
        outer_stride(v.ndim == 3 ? v.strides[0] : 0),
        inner_stride(v.ndim == 3 ? v.strides[2] : v.strides[0]),
        inner(v.ndim == 3 ? v.shape[2] : INT64_MAX) {}
  __device__ __forceinline__ T* row(int64_t r) const {
    if (r < inner) return data + r * inner_stride;  // also spares most 2-d problems a 64-bit division
    return data + r / inner * outer_stride + r % inner * inner_stride;
  }
};

template <class C>
struct Problem {
  int64_t rows, ignore_index;
  const int64_t* labels;  // null for probabilities
  const C* weight;        // may be null
  C* stats;               // [3, rows]
  IndexError* index_error;
  C keep, spread;  // 1 - ε and ε / C
  C z_loss, softcap, inverse_softcap;
  int classes, reduction;
  int lanes;   // threads that share a row whose classes are adjacent
  int slices;  // warps that share 32 rows whose classes are not

  // The row's label, kIgnored or kBadLabel; kIgnored for probabilities and past the last row.
  __device__ __forceinline__ int label(int64_t r) const {
    if (!labels || r >= rows) return kIgnored;
    const int64_t t = labels[r];
    if (t == ignore_index) return kIgnored;
    return static_cast<uint64_t>(t) < static_cast<uint64_t>(classes) ? static_cast<int>(t) : kBadLabel;
  }
  // What the row counts: its label's weight, 1 for probabilities, 0 for an ignored row or a bad label.
  __device__ __forceinline__ C row_weight(int label) const {
    if (!labels) return C(1);
    return label < 0 ? C(0) : weight ? weight[label] : C(1);
  }
  template <int N>
  __device__ __forceinline__ void cap(C (&x)[N]) const {
    if (softcap > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = softcap * tanh(x[i] * inverse_softcap);
    }
  }
  // u: what of the target falls on each of N classes, besides the label: w_c ((1-ε) y_c + ε/C) for probabilities, w_c
  // (times ε/C) for labels. The classes are c, c + step, ...; y_stride is the distance of adjacent ones' probabilities.
  template <bool SOFT, int N, class U>
  __device__ __forceinline__ void spread_target(C (&u)[N], const U* y, int64_t y_stride, int c, int step) const {
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = C(1);
    if (weight) {
      if (step == 1)
        load(u, weight + c, is_aligned(weight + c));
      else
#pragma unroll
        for (int i = 0; i < N; ++i) u[i] = weight[c + i * step];
    }
    if constexpr (SOFT) {
      C given[N];
      if (step * y_stride == 1)
        load(given, y + c, is_aligned(y + c));
      else
#pragma unroll
        for (int i = 0; i < N; ++i) given[i] = to_compute(y[(c + i * step) * y_stride]);
#pragma unroll
      for (int i = 0; i < N; ++i) u[i] *= given[i] * keep + spread;
    }
  }
};

template <class T, class C = compute_t<T>>
Problem<C> problem_of(const View& input, const View& target, const View& weight, const View& stats, int reduction,
                      int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  Problem<C> p;
  p.rows = stats.shape[1];
  p.classes = static_cast<int>(input.shape[1]);
  p.ignore_index = ignore_index;
  p.labels = target.dtype == DType::i64 ? target.as<int64_t>() : nullptr;
  p.weight = weight ? weight.as<C>() : nullptr;
  p.stats = stats.as<C>();
  p.index_error = index_error();
  p.keep = static_cast<C>(1 - label_smoothing);
  p.spread = static_cast<C>(label_smoothing / input.shape[1]);
  p.z_loss = static_cast<C>(z_loss);
  p.softcap = static_cast<C>(softcap);
  p.inverse_softcap = static_cast<C>(softcap > 0 ? 1 / softcap : 0);
  p.reduction = reduction;
  // About four 16-byte loads a thread: several rows to a warp up to 512 classes of 16 bits, 256 of 32. At 1000, two rows
  // to a warp would share the some 45 instructions that reduce a row, besides 310 (10 a class, 31 classes a lane) that add
  // up its classes, and 8192 rows would be one wave of warps on an H200 (132 x 32, by their registers), not two; but each
  // lane's chain of dependent steps would be twice as long. Beyond 4096 a block of 256 or 512 threads for every row.
  const int64_t loads = ceil_div(p.classes, 4 * kWidth<T>);
  p.lanes = 4;
  while (p.lanes < 32 && p.lanes < loads) p.lanes *= 2;
  if (p.classes > 4096) p.lanes = loads > 512 ? 512 : 256;
  p.slices = p.classes >= 64 ? kBlock / 32 : 1;
  return p;
}

struct Grid {
  int blocks, threads;
};
// For rows whose classes are adjacent (one or several rows to a block), or not (32 / 256 rows to a block).
template <class C>
Grid grid_of(const Problem<C>& p, bool adjacent) {
  const int threads = adjacent && p.lanes > 32 ? p.lanes : kBlock;
  const int rows = adjacent ? threads / p.lanes : kBlock / p.slices;
  const int64_t blocks = ceil_div(p.rows, rows);
  return {static_cast<int>(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks), threads};
}

// Calls run(soft, plain, T{}, U{}) for this problem's types: U holds probabilities, in the logits' type or in the type of
// the arithmetic. plain: labels without smoothing and softcap, the most frequent problem, whose loop then has no branches
// for them.
template <class T, class Run, class C = compute_t<T>>
Status specialize(const Problem<C>& p, const View& target, const Run& run) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (p.labels) return p.spread > 0 || p.softcap > 0 ? run(No(), No(), T(), T()) : run(No(), Yes(), T(), T());
  if (target.dtype == DType::f32 && !std::is_same_v<T, C>) return run(Yes(), No(), T(), C());
  return run(Yes(), No(), T(), T());
}

}  // namespace cuda
}  // namespace pyfused
