// Labels and ids out of range, on the GPU: the kernel reads nothing through them, makes the row's loss NaN, and leaves a
// note in host memory that the device can write to. No device assert, which would kill the process; no wait. The host
// looks at the note whenever it calls a kernel, and in pyfused.check_errors().
#pragma once
#include "cuda/common.cuh"

namespace pyfused {
namespace cuda {

enum class Argument : int64_t { target, user, item };

struct IndexError {
  unsigned long long state;  // 0: none, 1: being written, 2: complete
  Argument argument;
  int64_t position, value, limit;
};

// The note, for a kernel's argument; null, and errors go unnoticed, where the driver has no such memory.
IndexError* index_error();

// argument.flatten()[position] = value is not in [0, limit). The first to come writes.
__device__ inline void report_out_of_range(IndexError* e, Argument argument, int64_t position, int64_t value,
                                           int64_t limit) {
  if (!e || atomicCAS(&e->state, 0ull, 1ull) != 0) return;
  e->argument = argument;
  e->position = position;
  e->value = value;
  e->limit = limit;
  __threadfence_system();
  atomicExch(&e->state, 2ull);
}

}  // namespace cuda
}  // namespace pyfused
