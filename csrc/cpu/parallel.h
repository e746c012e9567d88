// Threads for the CPU kernels. The number comes from torch.get_num_threads() with every call.
#pragma once
#include <cstdint>
#ifndef _OPENMP
#include "cpu/threads.h"
#endif
#include "tensor_view.h"

namespace pyfused {
namespace PYFUSED_ISA {

// body(begin, end, thread) on contiguous parts of [0, count), at least `grain` items each. The partition depends on
// `count`, `grain` and `threads` only. An exception must not leave the body.
template <class Body>
PYFUSED_INLINE void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  if (count <= 0) return;
  int64_t most = (count + grain - 1) / grain;
  int parts = static_cast<int>(most < threads ? most : threads);
  if (parts <= 1) return body(int64_t{0}, count, 0);
#ifdef _OPENMP
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) body(count * part / parts, count * (part + 1) / parts, part);
#else
  auto run = [&](int part) { body(count * part / parts, count * (part + 1) / parts, part); };
  run_on_threads(parts, [](const void* f, int part) { (*static_cast<const decltype(run)*>(f))(part); }, &run);
#endif
}

}  // namespace PYFUSED_ISA
}  // namespace pyfused
