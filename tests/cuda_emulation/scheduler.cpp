// Runs a grid: one block after another in random order, within it one thread at a time, switched at barriers and warp
// intrinsics in random order. Finds threads that wait for each other in vain, barriers that not all threads of a block
// reach, and warp intrinsics whose lanes do not match. Also the few calls of the CUDA runtime that launchers make.
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "internal.h"

namespace cuda_emulation {

std::vector<Fiber> fibers;
Fiber* self = nullptr;
unsigned block_number = 0;
uint32_t epoch = 0;
uint64_t launch_number = 0;

namespace {

// Of the 99 KB of an sm_86, 89 or 120; tests/test_cuda_resources.py adds the static arrays, which are not known here.
constexpr size_t kMostDynamicBytes = 96 << 10;

dim3 current_grid, current_block;
uint3 current_block_index;
unsigned threads, exited, waiting, predicates, barrier_result;
void (*kernel_body)(void*);
void* kernel_arguments;
void* launcher_stack;
std::vector<unsigned> ready;
std::vector<char> dynamic_memory;
char* dynamic_base;
bool stopped;
std::vector<std::string> found;
std::set<std::string> found_keys;
uint64_t random_state = 1;
cudaError_t last_error = cudaSuccess;

struct Warp {
  uint32_t live, arrived;  // lanes that have not exited; lanes that wait at an intrinsic
};
std::vector<Warp> warps;

uint64_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

// --- Fibers. A switch saves the registers that a call preserves and changes the stack.
#if !defined(__x86_64__)
#error "the emulation of CUDA switches fibers on x86-64 only"
#endif
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(.text
.globl cuda_emulation_switch
.hidden cuda_emulation_switch
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

[[noreturn]] void to_launcher() {
  self = nullptr;
  void* forget;
  cuda_emulation_switch(&forget, launcher_stack);
  __builtin_unreachable();
}

// Goes on with a random ready thread; where there is none, with the launcher, which looks who still waits.
void switch_from(void** save) {
  if (ready.empty()) {
    self = nullptr;
    cuda_emulation_switch(save, launcher_stack);
    return;
  }
  const size_t i = random_number() % ready.size();
  Fiber& next = fibers[ready[i]];
  ready[i] = ready.back();
  ready.pop_back();
  self = &next;
  if (save != &next.stack_pointer) cuda_emulation_switch(save, next.stack_pointer);
}

void wake(Fiber& fiber) {
  fiber.state = Fiber::ready;
  ready.push_back(fiber.thread);
}

// --- Barriers
void try_barrier() {
  if (waiting == 0 || waiting + exited < threads) return;
  const Fiber *first = nullptr, *gone = nullptr;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& f = fibers[t];
    if (f.state != Fiber::at_barrier)
      gone = &f;
    else if (!first)
      first = &f;
    else if (f.site.line != first->site.line)
      report("divergent" + where(f.site),
             "divergent barrier: threads of one block meet at " + where(first->site) + " and at " + where(f.site));
  }
  if (gone)
    report("partial" + where(first->site), "barrier at " + where(first->site) + " reached by " +
                                               std::to_string(waiting) + " of " + std::to_string(threads) +
                                               " threads; " + who(*gone) + " had exited");
  barrier_result = predicates;
  predicates = waiting = 0;
  ++epoch;
  for (unsigned t = 0; t < threads; ++t)
    if (fibers[t].state == Fiber::at_barrier) wake(fibers[t]);
}

// --- Warp intrinsics
void complete(unsigned warp, uint32_t mask, uint32_t needed) {
  Fiber* lanes_of_warp = &fibers[warp * 32];
  const Fiber& first = lanes_of_warp[__builtin_ctz(needed)];
  Lanes lanes{};
  lanes.active = needed;
  uint32_t clock[32] = {};
  for (int l = 0; l < 32; ++l) {
    if (!(needed >> l & 1)) continue;
    const Fiber& f = lanes_of_warp[l];
    if (f.kind != first.kind || f.mask != first.mask || f.site.line != first.site.line)
      stop("warp intrinsics do not match: " + who(first) + " at " + where(first.site) + ", " + who(f) + " at " +
           where(f.site));
    lanes.in[l] = f.in;
    lanes.out[l] = f.out;
    lanes.argument[l] = f.argument;
    for (int i = 0; i < 32; ++i) clock[i] = std::max(clock[i], f.clock[i]);
  }
  if (mask & ~needed)
    report("exited" + where(first.site), "warp intrinsic at " + where(first.site) + " names lane " +
                                             std::to_string(__builtin_ctz(mask & ~needed)) +
                                             ", which has exited; called by " + who(first));
  first.act(lanes);
  warps[warp].arrived &= ~needed;
  const bool orders_memory = first.kind == Meet::sync;
  for (int l = 0; l < 32; ++l) {
    if (!(needed >> l & 1)) continue;
    Fiber& f = lanes_of_warp[l];
    if (orders_memory) {
      memcpy(f.clock, clock, sizeof clock);
      ++f.clock[l];
    }
    wake(f);
  }
}

void try_meeting(unsigned warp, uint32_t mask) {
  const uint32_t needed = mask & warps[warp].live;
  if (needed && (warps[warp].arrived & needed) == needed) complete(warp, mask, needed);
}

[[noreturn]] void fiber_main() {
  kernel_body(kernel_arguments);
  self->state = Fiber::done;
  ++exited;
  const unsigned warp = self->warp;
  warps[warp].live &= ~(1u << self->lane);
  try_barrier();
  // The lanes that still wait may have waited for this one alone.
  for (uint32_t left = warps[warp].arrived; left;) {
    const unsigned l = __builtin_ctz(left);
    left &= ~(1u << l);
    if (warps[warp].arrived >> l & 1) try_meeting(warp, fibers[warp * 32 + l].mask);
  }
  void* forget;
  switch_from(&forget);
  __builtin_unreachable();
}

void start_fiber(unsigned t) {
  Fiber& f = fibers[t];
  f.thread = t;
  f.lane = t % 32;
  f.warp = t / 32;
  f.index = {t % current_block.x, t / current_block.x % current_block.y, t / current_block.x / current_block.y};
  f.fenced = false;
  memset(f.clock, 0, sizeof f.clock);
  f.clock[f.lane] = 1;
  f.copies.clear();
  f.open_copies.clear();
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
  *--top = nullptr;  // where a return address would be: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that the first switch restores
  f.stack_pointer = top;
  wake(f);
}

void run_block(unsigned number, size_t shared_bytes) {
  block_number = number;
  current_block_index = {number % current_grid.x, number / current_grid.x % current_grid.y,
                         number / current_grid.x / current_grid.y};
  ++epoch;
  begin_block(dynamic_base, shared_bytes);
  ready.clear();
  exited = waiting = predicates = 0;
  warps.assign((threads + 31) / 32, {~0u, 0});
  if (threads % 32) warps.back().live = (1u << threads % 32) - 1;
  for (unsigned t = 0; t < threads; ++t) start_fiber(t);
  switch_from(&launcher_stack);
  if (stopped || exited == threads) return;
  for (unsigned t = 0; t < threads; ++t)
    if (const Fiber& f = fibers[t]; f.state != Fiber::done) {
      report("deadlock", "deadlock: " + std::to_string(threads - exited) + " of " + std::to_string(threads) +
                             " threads never finish; " + who(f) + " waits at " + where(f.site));
      break;
    }
  stopped = true;
}

}  // namespace

uint3 thread_index() { return self->index; }
uint3 block_index() { return current_block_index; }
dim3 block_dim() { return current_block; }
dim3 grid_dim() { return current_grid; }
unsigned lane() { return self->lane; }
void* dynamic_shared() { return dynamic_base; }

std::string who(const Fiber& f) {
  auto triple = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  return "block " + triple(current_block_index) + " thread " + triple(f.index);
}
void report(const std::string& key, const std::string& text) {
  if (found.size() < 10 && found_keys.insert(key).second) found.push_back(text);
}
void stop(const std::string& text) {
  report(text, text);
  stopped = true;
  to_launcher();
}
const std::vector<std::string>& errors() { return found; }
void clear_errors() {
  found.clear();
  found_keys.clear();
}
void set_seed(uint64_t seed) { random_state = seed * 0x9E3779B97F4A7C15ull | 1; }
void set_last_error(cudaError_t error) { last_error = error; }

unsigned barrier(unsigned predicate, Site site) {
  Fiber& me = *self;
  me.state = Fiber::at_barrier;
  me.site = site;
  ++waiting;
  predicates += predicate;
  try_barrier();
  switch_from(&me.stack_pointer);
  return barrier_result;
}

void warp_meet(uint32_t mask, Meet kind, void (*act)(Lanes&), const void* in, void* out, int argument, Site site) {
  Fiber& me = *self;
  if (!(mask >> me.lane & 1)) stop("lane " + std::to_string(me.lane) + " is not in its own mask at " + where(site));
  me.state = Fiber::at_meeting;
  me.site = site;
  me.kind = kind;
  me.mask = mask;
  me.act = act;
  me.in = in;
  me.out = out;
  me.argument = argument;
  warps[me.warp].arrived |= 1u << me.lane;
  try_meeting(me.warp, mask);
  switch_from(&me.stack_pointer);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* arguments, size_t arguments_size,
         const void* kernel) {
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  threads = block.x * block.y * block.z;
  if (!blocks || !threads || threads > 1024 || block.z > 64 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > kMostDynamicBytes)
    return set_last_error(cudaErrorInvalidConfiguration);
  current_grid = grid;
  current_block = block;
  kernel_body = body;
  kernel_arguments = arguments;
  stopped = false;
  ++launch_number;
  begin_launch(kernel, arguments, arguments_size);
  while (fibers.size() < threads) {
    fibers.emplace_back();
    fibers.back().stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  dynamic_memory.assign(shared_bytes + 128, '\xff');
  dynamic_base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(dynamic_memory.data()) + 127) & ~uintptr_t{127});
  uint64_t step = 1;  // a random step that visits every block
  do step = 1 + random_number() % blocks;
  while (std::gcd(step, blocks) != 1);
  uint64_t number = random_number() % blocks;
  for (uint64_t i = 0; i < blocks && !stopped; ++i, number = (number + step) % blocks)
    run_block(static_cast<unsigned>(number), shared_bytes);
  self = nullptr;
  if (!found.empty()) set_last_error(cudaErrorLaunchFailure);
}

}  // namespace cuda_emulation

// --- The CUDA runtime that launchers call
extern "C" {
cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_emulation::last_error;
  cuda_emulation::last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "the emulation found errors";
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  if (cuda_emulation::kChecked) cuda_emulation::mark_written(p, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  cuda_emulation::register_memory(*p, bytes, 1, "host memory", true, true);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
}
