// What scheduler.cpp and memory_check.cpp share. Neither is compiled with the checks that they implement.
#pragma once
#include <string>
#include <vector>

#include "cuda_emulation.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace cuda_emulation {

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
  Site site;
};

struct Fiber {  // one CUDA thread
  enum State { ready, at_barrier, at_meeting, done } state;
  unsigned thread, lane, warp;
  uint3 index;
  char* stack;
  void* stack_pointer;
  Site site;  // of the barrier or warp intrinsic where it waits
  // the warp intrinsic
  Meet kind;
  uint32_t mask;
  void (*act)(Lanes&);
  const void* in;
  void* out;
  int argument;
  // memory order: what this lane knows of the others of its warp, since the last barrier; and whether it has fenced
  uint32_t clock[32];
  bool fenced;
  std::vector<std::vector<AsyncCopy>> copies;  // groups of asynchronous copies under way
  std::vector<AsyncCopy> open_copies;          // not committed yet
};

constexpr size_t kStackBytes = 128 << 10;
#ifdef CUDA_EMULATION_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

// --- scheduler.cpp
extern std::vector<Fiber> fibers;
extern Fiber* self;            // null outside kernels
extern unsigned block_number;  // in the grid
extern uint32_t epoch;         // counts barriers, over all blocks
extern uint64_t launch_number;
std::string who(const Fiber& fiber);
// Notes an error, each only once; `stop` also ends the launch.
void report(const std::string& key, const std::string& text);
[[noreturn]] void stop(const std::string& text);
const std::vector<std::string>& errors();
void clear_errors();
void set_seed(uint64_t seed);
void set_last_error(cudaError_t error);

// --- memory_check.cpp
std::string where(const Site& site);
void begin_launch(const void* kernel, const void* arguments, size_t arguments_size);
void begin_block(char* dynamic_shared, size_t bytes);
// Memory that kernels may touch, until clear_memory unless `permanent`. `item`: bytes that are read and written as one.
// `written`: holds values already; else what is read must have been written first.
void register_memory(const void* p, size_t bytes, size_t item, const std::string& name, bool written,
                     bool permanent = false);
void mark_written(const void* p, size_t bytes);
void clear_memory();

}  // namespace cuda_emulation
