// What every .cu file stands on, and the three conventions by which the same source runs on a GPU under nvcc and, in
// the tests, on the CPU under tests/cuda_emulation (g++, PYFUSED_CUDA_EMULATION defined):
//   1. kernels are launched by `launch`, never by <<<>>>; it also turns a failed launch into a Status;
//   2. dynamic shared memory is declared by PYFUSED_DYNAMIC_SHARED;
//   3. inline PTX stands in ptx.cuh only, where each wrapper has an emulated twin.
// A warp intrinsic is reached by all the threads that it names: the full warp, or a group that took a branch together; a
// barrier by the full block: kernels keep threads without work in the loop instead of returning early. Sums go in an
// order that depends on shapes and strides alone: no floating-point atomics.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/kernels.h"
#include "tensor_view.h"

#ifdef PYFUSED_CUDA_EMULATION
#include "cuda_emulation.h"
#define PYFUSED_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuda_emulation::dynamic_shared())
#else
#define PYFUSED_DYNAMIC_SHARED(T, name)                       \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
#endif

#include "cuda/ptx.cuh"

namespace pyfused {
namespace cuda {

// --- Launching
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // forget it: PyTorch would take it for its own
  return {Status::failed, nullptr, cudaGetErrorString(error), 0, 0, 0};
}

#define PYFUSED_TRY(expression) \
  if (Status status_ = (expression); status_.code != Status::ok) return status_

// A block may use 48 KB of shared memory without asking, its static arrays included. A kernel that has dynamic memory,
// too, declares at most this much (tests/test_cuda_resources.py), so that no launch has to ask how much it is.
constexpr size_t kMostStaticBytes = 8 << 10;

template <class T>
struct Same {
  using type = T;
};

template <class... P>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
              typename Same<P>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
#ifdef PYFUSED_CUDA_EMULATION
  cuda_emulation::launch(kernel, grid, block, shared_bytes, arguments...);
  return status_of(cudaGetLastError());
#else
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > (48 << 10) - kMostStaticBytes) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    PYFUSED_TRY(status_of(cudaFuncSetAttribute(function, attribute, static_cast<int>(shared_bytes))));
  }
  void* pointers[] = {&arguments...};
  return status_of(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream));
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- Types. Arithmetic is in float, in double for double.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__host__ __device__ __forceinline__ float to_compute(float x) { return x; }
__host__ __device__ __forceinline__ double to_compute(double x) { return x; }
__host__ __device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }
__host__ __device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_compute(compute_t<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// Calls run(T{}) with the type of the kernels' floating tensors.
template <class Run>
Status for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float());
    case DType::f64:
      return run(double());
    case DType::bf16:
      return run(__nv_bfloat16());
    case DType::f16:
      return run(__half());
    default:
      return invalid("input", "must be float32, float64, bfloat16 or float16");
  }
}

// --- Memory, 16 bytes at a time
template <class T>
constexpr int kWidth = 16 / sizeof(T);  // numbers in 16 bytes

template <class T>
__host__ __device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T>
__device__ __forceinline__ void unpack(compute_t<T> (&out)[kWidth<T>], uint4 word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float: an instruction each, not nvcc's 1.5
    const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair[2] = {words[i] << 16, words[i] & 0xffff0000u};
      memcpy(out + 2 * i, pair, sizeof pair);
    }
  } else {
    T raw[kWidth<T>];
    memcpy(raw, &word, sizeof word);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) out[i] = to_compute(raw[i]);
  }
}
template <class T>
__device__ __forceinline__ uint4 pack(const compute_t<T>* x) {
  T raw[kWidth<T>];
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) raw[i] = from_compute<T>(x[i]);
  uint4 word;
  memcpy(&word, raw, sizeof word);
  return word;
}

// N adjacent numbers; by 16-byte accesses if they are whole 16-byte blocks and `aligned`, else one by one.
template <int N, class T>
__device__ __forceinline__ void load(compute_t<T> (&out)[N], const T* p, bool aligned) {
  constexpr int width = kWidth<T>;
  if (N % width == 0 && aligned) {
#pragma unroll
    for (int i = 0; i + width <= N; i += width)
      unpack<T>(reinterpret_cast<compute_t<T>(&)[width]>(out[i]), *reinterpret_cast<const uint4*>(p + i));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_compute(p[i]);
  }
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const compute_t<T> (&x)[N], bool aligned) {
  constexpr int width = kWidth<T>;
  if (N % width == 0 && aligned) {
#pragma unroll
    for (int i = 0; i + width <= N; i += width) *reinterpret_cast<uint4*>(p + i) = pack<T>(x + i);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = from_compute<T>(x[i]);
  }
}

// Shares a row of n adjacent numbers among `lanes` threads: visit(c, x) with the numbers x[N] from c on, N = kWidth<T>
// between the first and the last 16-byte boundary, 1 before and after. A thread asks for four vectors before it visits the
// first: 1024 threads on a multiprocessor then have up to 64 KB on the way, where the memory's latency asks for some 23 KB
// (an H200: 4.3 TB/s x 0.7 us / 132), while others compute, or begin or end a row. (A queue of loads that runs on from
// one turn to the next gains nothing: nvcc moves it on by copies, and a copy waits for its load.)
template <class T, class Visit>
__device__ __forceinline__ void for_each_vector(const T* row, int n, int lane, int lanes, const Visit& visit) {
  constexpr int width = kWidth<T>, depth = 4;
  const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int head = min(n, (width - beyond) % width), vectors = (n - head) / width;
  const uint4* const words = reinterpret_cast<const uint4*>(row + head);
  auto visit_one = [&](int c) {
    compute_t<T> x[1] = {to_compute(row[c])};
    visit(c, x);
  };
  for (int c = lane; c < head; c += lanes) visit_one(c);
#pragma unroll 1
  for (int first = lane; first < vectors; first += depth * lanes) {
    uint4 loaded[depth];
#pragma unroll
    for (int k = 0; k < depth; ++k)
      if (first + k * lanes < vectors) loaded[k] = words[first + k * lanes];
#pragma unroll
    for (int k = 0; k < depth; ++k) {
      const int i = first + k * lanes;
      if (i >= vectors) break;
      compute_t<T> x[width];
      unpack<T>(x, loaded[k]);
      visit(head + i * width, x);
    }
  }
  for (int c = head + vectors * width + lane; c < n; c += lanes) visit_one(c);
}

// --- Arithmetic for numbers that come from tensors of type T
// exp(x): for 16-bit types three instructions with a relative error of 2^-22 (1 + |x| / 4), below what they can hold;
// else to the last place.
template <class T>
__device__ __forceinline__ compute_t<T> exp_of(compute_t<T> x) {
  if constexpr (sizeof(T) == 2)
    return exp2_approx(x * 1.44269504f);
  else
    return exp(x);
}

// --- Reductions over aligned groups of `lanes` (a power of two up to 32) threads; every lane gets the same bits
constexpr unsigned kFullWarp = 0xffffffffu;

template <class T, class Combine>
__device__ __forceinline__ T group_reduce(T x, int lanes, const Combine& combine) {
  for (int step = lanes / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}
template <class T>
__device__ __forceinline__ T group_sum(T x, int lanes = 32) {
  return group_reduce(x, lanes, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T group_max(T x, int lanes = 32) {
  return group_reduce(x, lanes, [](T a, T b) { return a > b ? a : b; });
}

// The sum over the block (of whole warps), in every thread. All threads call it; `shared` holds 32 numbers and may be
// used again after the next barrier.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = group_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return group_sum(lane < warps ? shared[lane] : T(0));
}

// True in every thread of the block that comes last. `counter` starts at 0 and counts blocks; what the other blocks
// wrote before they called this may then be read, with __ldcg.
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace cuda
}  // namespace pyfused
