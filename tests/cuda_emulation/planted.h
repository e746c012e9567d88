#pragma once
#include "cuda/kernels.h"

namespace pyfused {
namespace cuda {

// Runs two blocks of 64 threads with the bug of this number on data [64] float32, workspace [128] float64.
Status planted(View data, View workspace, int bug, Stream stream);

}  // namespace cuda
}  // namespace pyfused
