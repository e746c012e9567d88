// CUDA's execution model on the CPU, for tests: what csrc/cuda/common.cuh includes instead of leaving things to nvcc.
// Types come from the real CUDA headers; every CUDA thread is a fiber (scheduler.cpp); memory accesses are checked in
// the build whose compiler reports them (memory_check.cpp). Not modelled: weak memory order within a fence, clusters,
// TMA, wgmma, textures, the hardware's rounding of ex2.approx and of mma's sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

// What stands for the hardware is not itself checked.
#define EMULATED __attribute__((no_sanitize("thread"), noinline)) inline
#define EMULATED_TEMPLATE __attribute__((no_sanitize("thread"), noinline))
// A warp intrinsic or a barrier is known by its line; a return address would not do, as compilers duplicate code.
#define EMULATED_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define EMULATED_HERE (::cuda_emulation::Site{file_, line_, nullptr})

#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __forceinline__ inline

namespace cuda_emulation {

struct Site {
  const char* file;
  int line;
  const void* pc;  // where file is null: an ordinary memory access
};

// --- scheduler.cpp
uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
unsigned lane();
void* dynamic_shared();
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* arguments, size_t arguments_size,
         const void* kernel);
unsigned barrier(unsigned predicate, Site site);  // the number of threads whose predicate is not 0

// The lanes of `mask` meet; `act` runs once, when the last has come, on all lanes' inputs and outputs.
enum class Meet { shuffle, vote, matrix, sync };
struct Lanes {
  uint32_t active;
  const void* in[32];
  void* out[32];
  int argument[32];
};
void warp_meet(uint32_t mask, Meet kind, void (*act)(Lanes&), const void* in, void* out, int argument, Site site);

// --- memory_check.cpp
void check_access(const void* p, size_t bytes, bool write, Site site);  // for memory that an intrinsic touches
void check_atomic(void* p, size_t bytes, Site site);
void fence();
void copy_async(void* shared, const void* global, size_t bytes, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int pending);

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, std::decay_t<P>... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, {arguments...}};
  auto body = [](void* p) __attribute__((no_sanitize("thread"))) {
    auto& call = *static_cast<Call*>(p);
    std::apply(call.kernel, call.arguments);
  };
  run(grid, block, shared_bytes, body, &call, sizeof call, reinterpret_cast<const void*>(kernel));
}

enum Shuffle { index, up, down, exclusive_or };

// The lane that lane `l` of a group of `width` reads.
EMULATED int shuffle_source(Shuffle how, int l, int by, int width) {
  const int first = l & ~(width - 1), last = first + width - 1;
  if (how == index) return first + (by & (width - 1));
  const int source = how == up ? l - by : how == down ? l + by : l ^ by;
  return source < first || source > last ? l : source;
}

template <Shuffle HOW, class T>
EMULATED_TEMPLATE T shuffle(uint32_t mask, T value, int by, int width, Site site) {
  static_assert(sizeof(T) <= 16);
  T result;
  auto act = [](Lanes& lanes) __attribute__((no_sanitize("thread"))) {
    for (int l = 0; l < 32; ++l) {
      if (!(lanes.active >> l & 1)) continue;
      const int source = shuffle_source(HOW, l, lanes.argument[l] >> 8, lanes.argument[l] & 255);
      if (lanes.active >> source & 1)
        memcpy(lanes.out[l], lanes.in[source], sizeof(T));
      else
        memset(lanes.out[l], 0xff, sizeof(T));  // undefined on a GPU: NaN here
    }
  };
  warp_meet(mask, Meet::shuffle, act, &value, &result, by << 8 | width, site);
  return result;
}

EMULATED uint32_t ballot(uint32_t mask, int predicate, Site site) {
  uint32_t result, given = predicate != 0;
  auto act = [](Lanes& lanes) __attribute__((no_sanitize("thread"))) {
    uint32_t all = 0;
    for (int l = 0; l < 32; ++l)
      if (lanes.active >> l & 1 && *static_cast<const uint32_t*>(lanes.in[l])) all |= 1u << l;
    for (int l = 0; l < 32; ++l)
      if (lanes.active >> l & 1) *static_cast<uint32_t*>(lanes.out[l]) = all;
  };
  warp_meet(mask, Meet::vote, act, &given, &result, 0, site);
  return result;
}

template <class T, class F>
EMULATED_TEMPLATE T atomic(T* p, F change, Site site) {
  check_atomic(p, sizeof(T), site);
  const T before = *p;
  *p = change(before);
  return before;
}

}  // namespace cuda_emulation

// --- What CUDA C++ gives a kernel
#define threadIdx (::cuda_emulation::thread_index())
#define blockIdx (::cuda_emulation::block_index())
#define blockDim (::cuda_emulation::block_dim())
#define gridDim (::cuda_emulation::grid_dim())

EMULATED void __syncthreads(EMULATED_SITE) { cuda_emulation::barrier(0, EMULATED_HERE); }
EMULATED int __syncthreads_count(int p, EMULATED_SITE) { return cuda_emulation::barrier(p != 0, EMULATED_HERE); }
EMULATED int __syncthreads_or(int p, EMULATED_SITE) { return cuda_emulation::barrier(p != 0, EMULATED_HERE) != 0; }
EMULATED int __syncthreads_and(int p, EMULATED_SITE) { return cuda_emulation::barrier(p == 0, EMULATED_HERE) == 0; }
EMULATED void __syncwarp(uint32_t mask = ~0u, EMULATED_SITE) {
  cuda_emulation::warp_meet(
      mask, cuda_emulation::Meet::sync, [](cuda_emulation::Lanes&) {}, nullptr, nullptr, 0, EMULATED_HERE);
}

#define EMULATED_SHUFFLE(name, how)                                                             \
  template <class T>                                                                            \
  T name(uint32_t mask, T value, int by, int width = 32, EMULATED_SITE) {                       \
    return cuda_emulation::shuffle<cuda_emulation::how>(mask, value, by, width, EMULATED_HERE); \
  }
EMULATED_SHUFFLE(__shfl_sync, index)
EMULATED_SHUFFLE(__shfl_up_sync, up)
EMULATED_SHUFFLE(__shfl_down_sync, down)
EMULATED_SHUFFLE(__shfl_xor_sync, exclusive_or)

inline uint32_t __ballot_sync(uint32_t mask, int p, EMULATED_SITE) {
  return cuda_emulation::ballot(mask, p, EMULATED_HERE);
}
inline int __any_sync(uint32_t mask, int p, EMULATED_SITE) {
  return cuda_emulation::ballot(mask, p, EMULATED_HERE) != 0;
}
inline int __all_sync(uint32_t mask, int p, EMULATED_SITE) {
  return cuda_emulation::ballot(mask, !p, EMULATED_HERE) == 0;
}

inline void __threadfence() { cuda_emulation::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { cuda_emulation::fence(); }

#define EMULATED_ATOMIC(name, expression)                                                               \
  template <class T>                                                                                    \
  EMULATED_TEMPLATE T name(T* p, std::common_type_t<T> v, EMULATED_SITE) {                              \
    return cuda_emulation::atomic(p, [=](T old) { return static_cast<T>(expression); }, EMULATED_HERE); \
  }
EMULATED_ATOMIC(atomicAdd, old + v)
EMULATED_ATOMIC(atomicMax, old < v ? v : old)
EMULATED_ATOMIC(atomicMin, v < old ? v : old)
EMULATED_ATOMIC(atomicOr, old | v)
EMULATED_ATOMIC(atomicExch, v)
EMULATED_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T>
EMULATED_TEMPLATE T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v, EMULATED_SITE) {
  return cuda_emulation::atomic(p, [=](T old) { return old == expected ? v : old; }, EMULATED_HERE);
}

#define __ldg(p) (*(p))
#define __ldcg(p) (*(p))
#define __ldcs(p) (*(p))
#define __stcs(p, v) (*(p) = (v))
#define __stcg(p, v) (*(p) = (v))
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __int_as_float(int x) {
  float f;
  memcpy(&f, &x, sizeof f);
  return f;
}
inline int __float_as_int(float f) {
  int x;
  memcpy(&x, &f, sizeof x);
  return x;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::exp;
using std::fmax;
using std::log;
using std::log1p;
using std::sqrt;
using std::tanh;

// --- The twins of csrc/cuda/ptx.cuh. Fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8"
namespace cuda_emulation {

struct Fragments {
  const uint32_t *a, *b;
  float* d;
};

// The element of a 32-bit register that holds 2 numbers of 16 bits, or one tf32.
template <class T>
EMULATED_TEMPLATE float element(uint32_t word, int i) {
  if constexpr (sizeof(T) == 4) {
    word &= 0xffffe000u;  // the hardware does not look at the low bits
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
  } else {
    const uint16_t bits = word >> 16 * i;
    T x;
    memcpy(&x, &bits, sizeof x);
    return static_cast<float>(x);
  }
}

template <class T>
EMULATED_TEMPLATE void multiply(Lanes& lanes) {
  constexpr int per = 4 / sizeof(T), K = 8 * per;  // numbers in a register; the inner dimension
  static float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes.in[l]);
    const int group = l / 4, in_group = l % 4;
    for (int i = 0; i < per; ++i) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][in_group * per + i + r / 2 * (K / 2)] = element<T>(f.a[r], i);
      for (int r = 0; r < 2; ++r) b[in_group * per + i + r * (K / 2)][group] = element<T>(f.b[r], i);
    }
  }
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes.in[l]);
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      f.d[i] += sum;
    }
  }
}

template <bool TRANSPOSED>
EMULATED_TEMPLATE void load_matrices(Lanes& lanes) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) {
      auto at = [&](int row, int column) { return static_cast<const uint16_t*>(lanes.in[m * 8 + row])[column]; };
      const int major = l / 4, minor = l % 4 * 2;
      const uint32_t low = TRANSPOSED ? at(minor, major) : at(major, minor);
      const uint32_t high = TRANSPOSED ? at(minor + 1, major) : at(major, minor + 1);
      static_cast<uint32_t*>(lanes.out[l])[m] = low | high << 16;
    }
}

}  // namespace cuda_emulation

namespace pyfused {
namespace cuda {

inline float exp2_approx(float x) { return x < -126 ? 0.0f : std::exp2(x); }

template <class T>
EMULATED_TEMPLATE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, EMULATED_SITE) {
  const cuda_emulation::Fragments f{a, b, d};
  cuda_emulation::warp_meet(~0u, cuda_emulation::Meet::matrix, cuda_emulation::multiply<T>, &f, nullptr, 0,
                            EMULATED_HERE);
}
EMULATED uint32_t to_tf32(float x) {  // to nearest, ties away from zero; inf and NaN stay
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (std::isfinite(x) ? bits + 0x1000u : bits) & 0xffffe000u;
}
EMULATED void load_matrices(uint32_t (&r)[4], const void* row, EMULATED_SITE) {
  cuda_emulation::check_access(row, 16, false, EMULATED_HERE);
  cuda_emulation::warp_meet(~0u, cuda_emulation::Meet::matrix, cuda_emulation::load_matrices<false>, row, r, 0,
                            EMULATED_HERE);
}
EMULATED void load_matrices_transposed(uint32_t (&r)[4], const void* row, EMULATED_SITE) {
  cuda_emulation::check_access(row, 16, false, EMULATED_HERE);
  cuda_emulation::warp_meet(~0u, cuda_emulation::Meet::matrix, cuda_emulation::load_matrices<true>, row, r, 0,
                            EMULATED_HERE);
}
template <int BYTES>
EMULATED_TEMPLATE void copy_async(void* shared, const void* global, bool valid, EMULATED_SITE) {
  cuda_emulation::copy_async(shared, global, BYTES, valid, EMULATED_HERE);
}
inline void copy_async_commit() { cuda_emulation::copy_async_commit(); }
template <int PENDING>
void copy_async_wait() {
  cuda_emulation::copy_async_wait(PENDING);
}

}  // namespace cuda
}  // namespace pyfused
