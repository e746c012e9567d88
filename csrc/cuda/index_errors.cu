// The host's side of index_errors.cuh.
#include "cuda/device.h"
#include "cuda/index_errors.cuh"

namespace pyfused {
namespace cuda {
namespace {

IndexError* allocate() {
  void* memory = nullptr;
  // Relaxed: the first call may be under the capture of a CUDA graph, of which this allocation is no part.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (cudaHostAlloc(&memory, sizeof(IndexError), cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) {
    cudaGetLastError();  // forget it
    memory = nullptr;
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (memory) memset(memory, 0, sizeof(IndexError));
  return static_cast<IndexError*>(memory);
}

bool allocated = false;  // so that looking does not allocate

}  // namespace

IndexError* index_error() {
  static IndexError* const memory = allocate();
  allocated = true;
  return memory;
}

Status take_index_error() {
  static constexpr const char* names[] = {"target", "user", "item"};
  if (!allocated || !index_error()) return {};
  IndexError& e = *index_error();
  volatile unsigned long long& state = e.state;
  if (state != 2) return {};
  const Status status = out_of_range(names[static_cast<int>(e.argument)], e.position, e.value, e.limit);
  state = 0;
  return status;
}

}  // namespace cuda
}  // namespace pyfused
