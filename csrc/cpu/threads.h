// Threads for builds without OpenMP, which Apple's Clang lacks.
#pragma once

namespace pyfused {

// run(body, part) for every part in [0, parts), each on a thread of its own, the first on the caller's; waits for all.
// Whoever calls while the threads are at work (from another thread, or from a body) runs all parts by itself.
void run_on_threads(int parts, void (*run)(const void* body, int part), const void* body);

}  // namespace pyfused
