#pragma once
#include "cuda/kernels.h"

namespace pyfused {
namespace cuda {

// Runs two blocks of 64 threads with the bug of this number on data [64] float32, workspace [128] float64.
Status planted(View data, View workspace, int bug, Stream stream);

// d [16, 8] float32: each lane's four numbers 1, 2, 3, 4, plus a [16, K] times b [8, K] transposed; K = 16, for float32 8. how: 0
// fragments by the tables of the PTX ISA, 1 by ldmatrix, 2 by ldmatrix.trans (16 bits); 1 and 2 take a's row 3 for 0.
Status fragments(View d, View a, View b, int how, Stream stream);

}  // namespace cuda
}  // namespace pyfused
