#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#ifdef PYFUSED_HAS_AVX2
#include <cpuid.h>
#endif

#include "cpu/cache.h"
#include "cpu/scratch.h"

namespace pyfused {
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

#ifdef PYFUSED_HAS_AVX2
bool has_f16c() {  // which __builtin_cpu_supports does not know in Clang 14
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<Isa> find_isas() {
  std::vector<Isa> found = {{"baseline", &baseline::kernels}};
#ifdef PYFUSED_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    found.push_back({"avx2", &avx2::kernels});
#endif
#ifdef PYFUSED_HAS_AVX512
  if (found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", &avx512::kernels});
#endif
  return found;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{&isas().back()};
  return isa;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

const char* current_isa() { return chosen().load()->name; }

const Kernels& current_kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

void choose_isa(const std::string& name) {
  std::string usable;
  for (const Isa& isa : isas()) {
    if (name == isa.name) {
      chosen() = &isa;
      return;
    }
    usable += std::string(usable.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot be used here; usable: " + usable);
}

void* scratch(int slot, std::size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.data = nullptr, buffer.size = 0;  // allocate_pages may throw
    buffer.data = allocate_pages(bytes + bytes / 2);
    buffer.size = bytes + bytes / 2;
  }
  return buffer.data;
}

}  // namespace pyfused
