// Can this binary's kernels run on a device? Asked of the CUDA runtime itself: it knows whether there is a driver,
// whether it is new enough, and whether this binary holds code for the device's architecture.
#include <cuda_runtime.h>

#include "cuda/device.h"

namespace pyfused {
namespace cuda {
namespace {
__global__ void probe() {}
}  // namespace

const char* why_not(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (device >= count) return "there is no such device";
  const DeviceGuard guard(device);
  error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, probe);  // fails without code for the architecture
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

DeviceGuard::DeviceGuard(int device) {
  int current = device;
  cudaGetDevice(&current);
  // Also where it is current already, as far as this copy of the runtime knows: PyTorch sets it through its own.
  if (cudaSetDevice(device) == cudaSuccess && current != device) before_ = current;
}
DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace cuda
}  // namespace pyfused
