// What the bindings need to know about CUDA without its headers.
#pragma once
#include "tensor_view.h"

namespace pyfused {
namespace cuda {

// Why no kernel of this binary can run on CUDA device `device`; nullptr if one can.
const char* why_not(int device);

// Makes a device current for the calling thread, and the one before again at the end of the block.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

// The first label or id out of range that a kernel met since this was last asked (out_of_range), or ok. Does not wait:
// it tells of kernels that have finished. See index_errors.h.
Status take_index_error();

}  // namespace cuda
}  // namespace pyfused
