// Kernels with one bug each, and one without: what the emulation must and must not report (tests/test_cuda_emulation.py).
#include "cuda/common.cuh"
#include "planted.h"

namespace pyfused {
namespace cuda {
namespace {

enum Bug {
  no_bug,
  past_the_end,
  misaligned,
  unwritten_shared,
  missing_barrier,
  divergent_barrier,
  early_exit,
  two_barriers,
  race_between_blocks,
  lane_not_in_mask,
  shared_index,
  missing_syncwarp,
  copy_not_waited_for,
  unwritten_workspace,
  missing_fence,
  overflow,
};

__global__ void planted_kernel(Bug bug, float* data, int n, double* workspace) {
  __shared__ float tile[64];
  __shared__ float copied[64];
  const int t = threadIdx.x;
  if (bug == early_exit && t == 40) return;
  if (bug != unwritten_shared || t != 5) tile[t] = data[t];
  if (bug == divergent_barrier) {
    if (t < 32) __syncthreads();
  } else if (bug == two_barriers && t < 32) {
    __syncthreads();
  } else if (bug != missing_barrier) {
    __syncthreads();
  }
  float x = tile[(t + 1) % 64];
  if (bug == shared_index) x += tile[64 - t];
  if (bug == past_the_end && t == 63) x += data[n];
  if (bug == misaligned && t == 0) {
    float four[4];
    load(four, data + 1, true);
    x += four[0] + four[1] + four[2] + four[3];
  }
  if (bug == lane_not_in_mask) x += __shfl_xor_sync(0xffffu, x, 1);
  if (bug == overflow && t == 0) x += static_cast<float>(INT32_MAX - 1 + n);
  x += group_sum(x);

  __syncthreads();
  tile[t] = x;
  if (bug != missing_syncwarp) __syncwarp();
  x += tile[t ^ 1];

  copy_async<4>(copied + t, data + t, true);
  copy_async_commit();
  if (bug != copy_not_waited_for) copy_async_wait<0>();
  x += copied[t];

  if (bug == race_between_blocks) data[t] = x;
  if (bug == unwritten_workspace && blockIdx.x == 1) x += static_cast<float>(workspace[100]);
  if (t == 0) workspace[1 + blockIdx.x] = x;
  unsigned* counter = reinterpret_cast<unsigned*>(workspace);
  bool last;
  if (bug == missing_fence) {
    __shared__ unsigned ticket;
    if (t == 0) ticket = atomicAdd(counter, 1u);
    __syncthreads();
    last = ticket == gridDim.x - 1;
  } else {
    last = is_last_block(counter);
  }
  if (last && t < gridDim.x) data[t] = static_cast<float>(__ldcg(workspace + 1 + t));
}

}  // namespace

Status planted(View data, View workspace, int bug, Stream stream) {
  PYFUSED_TRY(status_of(cudaMemsetAsync(workspace.data, 0, sizeof(double), stream)));
  return launch(planted_kernel, 2, 64, 0, stream, static_cast<Bug>(bug), data.as<float>(),
                static_cast<int>(data.numel()), workspace.as<double>());
}

}  // namespace cuda
}  // namespace pyfused
