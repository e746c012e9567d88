// The host's side of index_errors.cuh; and labels checked by themselves, where other kernels see only some of them.
//
//   check_labels   leaves a note of a target[i] that is neither in [0, classes) nor ignore_index
//
// Tiles   a thread has every n-th label, n threads in up to kMaxBlocks blocks.
// Traffic 8 bytes a label, nothing is written: 65,536 labels, 0.5 MB, are bound by the launch, 2 us. Not measured.
#include <atomic>

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

constexpr int kThreads = 256;
#ifdef PYFUSED_CUDA_EMULATION
constexpr int kMaxBlocks = 3;  // so that its small cases reach the loop
#else
constexpr int kMaxBlocks = 1024;
#endif

__global__ void __launch_bounds__(kThreads)
    check(const int64_t* target, int64_t count, int64_t classes, int64_t ignore_index, IndexError* index_error) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t t = target[i];
    if (t != ignore_index && (t < 0 || t >= classes)) report_out_of_range(index_error, Argument::target, i, t, classes);
  }
}

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
  // Without fences an ARM host may read the rest before it has seen the 2, or after it has written the 0.
  std::atomic_thread_fence(std::memory_order_acquire);
  const Status status = out_of_range(names[static_cast<int>(e.argument)], e.position, e.value, e.limit);
  std::atomic_thread_fence(std::memory_order_release);
  state = 0;
  return status;
}

Status check_labels(View target, int64_t classes, int64_t ignore_index, Stream stream) {
  PYFUSED_REQUIRE(target.dtype == DType::i64 && target.contiguous(), "target", "must be contiguous int64");
  const int64_t count = target.numel(), blocks = ceil_div(count, kThreads);
  return launch(check, static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream,
                target.as<int64_t>(), count, classes, ignore_index, index_error());
}

}  // namespace cuda
}  // namespace pyfused
