// Checks every memory access of a kernel: inside what it was given, aligned, written before it is read, and not in a race.
//
// g++ -fsanitize=thread puts a call before every access; this file supplies those functions, and has nothing else to do
// with ThreadSanitizer. -fsanitize=bounds and others call the __ubsan_handle functions at the end. Without these options
// the file is linked all the same and asynchronous copies still work.
//
// Races: two accesses to one granule, one of them a write, are ordered if the same thread makes both, a block barrier
// lies between them, a __syncwarp chain within the warp, or, between blocks, a fence followed by an atomic that the later
// one has seen. Shuffles order nothing, as on the hardware. Two atomics never race.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <unordered_map>

#include "internal.h"

namespace cuda_emulation {
namespace {

enum Kind { read, write, atomic_update };

struct Access {
  uint32_t thread = ~0u, epoch = 0, clock = 0, block = 0, site = 0;
  explicit operator bool() const { return thread != ~0u; }
};
struct Granule {
  uint64_t stamp = 0;  // of the launch, for shared memory of the block, that the accesses belong to
  Access last_write, last_read, other_read;  // other_read: by another thread than last_read
  bool write_was_atomic = false, written = false;
};
struct Memory {
  char *begin = nullptr, *end = nullptr;
  size_t item = 1;
  std::string name;
  bool shared = false, written = false, permanent = false;
  std::vector<std::vector<Granule>> pages;  // made at the first access

  static constexpr size_t kPage = 1024;
  Granule& granule(size_t i) {
    if (pages.empty()) pages.resize((end - begin) / item / kPage + 1);
    std::vector<Granule>& page = pages[i / kPage];
    if (page.empty()) page.resize(kPage);
    return page[i % kPage];
  }
  bool contains(const char* p) const { return p >= begin && p < end; }
};

std::map<char*, Memory> memories;  // by their first byte; they do not overlap
Memory *last_found = nullptr, static_shared, dynamic_shared_memory;
char *constants_begin, *constants_end, *arguments_begin, *arguments_end;
uint64_t block_runs = 0;
std::map<const void*, std::set<unsigned>> released;  // per atomic: the blocks whose writes before a fence it publishes
std::set<unsigned> acquired;                         // blocks whose writes this one may see
std::vector<Site> sites = {Site{}};
std::unordered_map<size_t, uint32_t> site_numbers;

uint32_t number_of(const Site& site) {
  const size_t key =
      site.pc ? reinterpret_cast<size_t>(site.pc) : reinterpret_cast<size_t>(site.file) * 131 + site.line;
  auto [entry, fresh] = site_numbers.try_emplace(key, static_cast<uint32_t>(sites.size()));
  if (fresh) sites.push_back(site);
  return entry->second;
}

Memory* find(char* p) {
  if (last_found && last_found->contains(p)) return last_found;
  if (dynamic_shared_memory.contains(p)) return last_found = &dynamic_shared_memory;
  auto after = memories.upper_bound(p);
  if (after != memories.begin() && std::prev(after)->second.contains(p)) return last_found = &std::prev(after)->second;
  if (static_shared.contains(p)) return last_found = &static_shared;
  return nullptr;
}

bool ordered(const Access& a, bool shared) {
  if (!a) return true;
  if (!shared && a.block != block_number) return acquired.count(a.block) != 0;
  if (a.thread == self->thread || a.epoch < epoch) return true;
  return a.thread / 32 == self->warp && self->clock[a.thread % 32] >= a.clock;
}

std::string describe(size_t bytes, Kind kind, const Site& site) {
  static const char* const names[] = {"read", "write", "atomic"};
  return std::to_string(bytes) + "-byte " + names[kind] + " at " + where(site) + " by " + who(*self);
}

void check_granule(Memory& memory, size_t i, size_t bytes, Kind kind, Site site, bool completes) {
  Granule& g = memory.granule(i);
  const uint64_t stamp = memory.shared ? block_runs : launch_number;
  if (g.stamp != stamp) {
    const bool keep = g.written && !memory.shared;
    g = Granule{};
    g.written = keep;
    g.stamp = stamp;
  }
  if (kind != write && !g.written && !memory.written)
    report("unwritten" + where(site), "uninitialised " + memory.name + ": " + describe(bytes, kind, site));
  auto require = [&](const Access& other, const char* what) {
    if (ordered(other, memory.shared)) return;
    const std::string place = where(sites[other.site]);
    report("race" + where(site) + place, "race on " + memory.name + " + " + std::to_string(i * memory.item) + ": " +
                                             describe(bytes, kind, site) + " and " + what + " at " + place +
                                             " by block " + std::to_string(other.block) + " thread " +
                                             std::to_string(other.thread));
  };
  if (!(kind == atomic_update && g.write_was_atomic)) require(g.last_write, "write");
  const Access mine = {self->thread, epoch, self->clock[self->lane], block_number, number_of(site)};
  if (kind == read) {
    if (g.last_read && (g.last_read.thread != mine.thread || g.last_read.block != mine.block))
      g.other_read = g.last_read;
    g.last_read = mine;
    return;
  }
  require(g.last_read, "read");
  require(g.other_read, "read");
  g.last_write = mine;
  g.write_was_atomic = kind == atomic_update;
  g.written = completes;
}

void check(const void* address, size_t bytes, Kind kind, Site site, bool completes = true) {
  char* p = static_cast<char*>(const_cast<void*>(address));
  if (p >= self->stack && p < self->stack + kStackBytes) return;
  if (kind == read && ((p >= arguments_begin && p < arguments_end) || (p >= constants_begin && p < constants_end)))
    return;
  Memory* memory = find(p);
  if (!memory || p + bytes > memory->end) {
    auto after = memories.upper_bound(p);
    std::string near = reinterpret_cast<size_t>(p) < 4096 ? ", a null pointer" : "";
    if (near.empty() && after != memories.begin()) {
      const Memory& m = std::prev(after)->second;
      near = ", " + std::to_string(p + bytes - m.end) + " bytes past the end of " + m.name;
    }
    stop("out of bounds: " + describe(bytes, kind, site) + near);
  }
  if (bytes <= 16 && !(bytes & (bytes - 1)) && reinterpret_cast<size_t>(p) % bytes)
    stop("misaligned " + describe(bytes, kind, site));
  const size_t first = (p - memory->begin) / memory->item, last = (p - memory->begin + bytes - 1) / memory->item;
  for (size_t i = first; i <= last; ++i) check_granule(*memory, i, bytes, kind, site, completes);
}

// The module's writable data are the static shared memory, its read-only data the kernels' constants.
int find_segments(dl_phdr_info* info, size_t, void* kernel) {
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  char *begin = nullptr, *end = nullptr;
  bool here = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    char* from = reinterpret_cast<char*>(info->dlpi_addr + segment.p_vaddr);
    char* to = from + segment.p_memsz;
    here |= address >= reinterpret_cast<uintptr_t>(from) && address < reinterpret_cast<uintptr_t>(to);
    if (segment.p_flags & PF_W) {
      static_shared.begin = from;
      static_shared.end = to;
    } else {
      begin = begin ? begin : from;
      end = to;
    }
  }
  if (!here) return 0;
  constants_begin = begin;
  constants_end = end;
  return 1;
}

}  // namespace

std::string where(const Site& site) {
  if (site.file)
    return std::string(site.file).substr(std::string(site.file).rfind('/') + 1) + ":" + std::to_string(site.line);
  static std::map<const void*, std::string> known;
  std::string& text = known[site.pc];
  Dl_info info;
  if (!text.empty() || !dladdr(site.pc, &info) || !info.dli_fname) return text.empty() ? "?" : text;
  char command[600], line[400] = "?";
  snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           reinterpret_cast<size_t>(site.pc) - 1 - reinterpret_cast<size_t>(info.dli_fbase));
  if (FILE* pipe = popen(command, "r")) {
    if (!fgets(line, sizeof line, pipe)) strcpy(line, "?");
    pclose(pipe);
  }
  text = line;
  text = text.substr(text.rfind('/') + 1);
  return text = text.substr(0, text.find_first_of(" \n"));
}

void begin_launch(const void* kernel, const void* arguments, size_t arguments_size) {
  if (!constants_begin) {
    dl_iterate_phdr(find_segments, const_cast<void*>(kernel));
    static_shared.shared = true;
    static_shared.name = "shared memory";
  }
  arguments_begin = static_cast<char*>(const_cast<void*>(arguments));
  arguments_end = arguments_begin + arguments_size;
  released.clear();
}

void begin_block(char* dynamic, size_t bytes) {
  ++block_runs;
  acquired.clear();
  dynamic_shared_memory.begin = dynamic;
  dynamic_shared_memory.end = dynamic + bytes;
  dynamic_shared_memory.shared = true;
  dynamic_shared_memory.name = "dynamic shared memory";
  dynamic_shared_memory.pages.clear();
  if (bytes) memset(dynamic, 0xff, bytes);  // NaN
  last_found = nullptr;
}

void register_memory(const void* p, size_t bytes, size_t item, const std::string& name, bool written, bool permanent) {
  if (!bytes) return;
  Memory fresh;
  fresh.begin = static_cast<char*>(const_cast<void*>(p));
  fresh.end = fresh.begin + bytes;
  fresh.item = item;
  fresh.name = name;
  fresh.written = written;
  fresh.permanent = permanent;
  // Arguments that share memory (an output that is also an input) are one.
  for (auto it = memories.begin(); it != memories.end();) {
    Memory& other = it->second;
    if (other.begin >= fresh.end || other.end <= fresh.begin) {
      ++it;
      continue;
    }
    fresh.begin = std::min(fresh.begin, other.begin);
    fresh.end = std::max(fresh.end, other.end);
    fresh.item = std::min(fresh.item, other.item);
    fresh.name = other.name + " = " + fresh.name;
    fresh.written |= other.written;
    it = memories.erase(it);
  }
  memories[fresh.begin] = std::move(fresh);
  last_found = nullptr;
}

void mark_written(const void* p, size_t bytes) {
  char* begin = static_cast<char*>(const_cast<void*>(p));
  Memory* memory = find(begin);
  if (!memory || begin + bytes > memory->end) return report("cleared", "a memory call outside the arguments");
  for (size_t i = (begin - memory->begin) / memory->item; i <= (begin - memory->begin + bytes - 1) / memory->item; ++i)
    memory->granule(i).written = true;
}

void clear_memory() {
  for (auto it = memories.begin(); it != memories.end();)
    it = it->second.permanent ? std::next(it) : memories.erase(it);
  last_found = nullptr;
}

void check_access(const void* p, size_t bytes, bool is_write, Site site) {
  if (self && kChecked) check(p, bytes, is_write ? write : read, site);
}

void check_atomic(void* p, size_t bytes, Site site) {
  if (!self) return;
  if (kChecked) check(p, bytes, atomic_update, site);
  std::set<unsigned>& published = released[p];
  acquired.insert(published.begin(), published.end());
  if (!self->fenced) return;
  published.insert(block_number);
  published.insert(acquired.begin(), acquired.end());
}

void fence() {
  if (self) self->fenced = true;
}

// The bytes arrive when they are waited for, and not earlier; until then they count as unwritten.
void copy_async(void* shared, const void* global, size_t bytes, bool valid, Site site) {
  if (kChecked) {
    if (valid) check(global, bytes, read, site);
    check(shared, bytes, write, site, false);
  }
  memset(shared, 0xff, bytes);
  self->open_copies.push_back({shared, global, bytes, valid, site});
}
void copy_async_commit() {
  self->copies.push_back(std::move(self->open_copies));
  self->open_copies.clear();
}
void copy_async_wait(int pending) {
  auto& copies = self->copies;
  while (copies.size() > static_cast<size_t>(pending)) {
    for (const AsyncCopy& c : copies.front()) {
      if (kChecked) check(c.to, c.bytes, write, c.site);
      if (c.valid)
        memcpy(c.to, c.from, c.bytes);
      else
        memset(c.to, 0, c.bytes);
    }
    copies.erase(copies.begin());
  }
}

}  // namespace cuda_emulation

// --- What the compiler calls
#ifdef CUDA_EMULATION_CHECKED
using namespace cuda_emulation;

static void access(const void* p, size_t bytes, Kind kind, const void* pc) {
  if (self) check(p, bytes, kind, Site{nullptr, 0, pc});
}
#define RETURN_ADDRESS __builtin_return_address(0)
extern "C" {
#define ACCESS_CALLS(N)                                                            \
  void __tsan_read##N(void* p) { access(p, N, read, RETURN_ADDRESS); }             \
  void __tsan_write##N(void* p) { access(p, N, write, RETURN_ADDRESS); }           \
  void __tsan_unaligned_read##N(void* p) { access(p, N, read, RETURN_ADDRESS); }   \
  void __tsan_unaligned_write##N(void* p) { access(p, N, write, RETURN_ADDRESS); } \
  void __tsan_volatile_read##N(void* p) { access(p, N, read, RETURN_ADDRESS); }    \
  void __tsan_volatile_write##N(void* p) { access(p, N, write, RETURN_ADDRESS); }
ACCESS_CALLS(1)
ACCESS_CALLS(2)
ACCESS_CALLS(4)
ACCESS_CALLS(8)
ACCESS_CALLS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, read, RETURN_ADDRESS); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, write, RETURN_ADDRESS); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {}  // the host's, which is one thread

struct UndefinedBehaviour {  // the head of what every handler is given
  const char* file;
  unsigned line, column;
};
static void undefined(const char* what, void* data) {
  const auto& u = *static_cast<UndefinedBehaviour*>(data);
  const Site site = {u.file, static_cast<int>(u.line), nullptr};
  report(what + where(site),
         std::string(what) + " at " + where(site) + (self ? " by " + who(*self) : " in a launcher"));
}
#define UNDEFINED_CALLS(name, what)                                               \
  void __ubsan_handle_##name(void* data, void*, void*) { undefined(what, data); } \
  void __ubsan_handle_##name##_abort(void* data, void*, void*) { undefined(what, data); }
UNDEFINED_CALLS(out_of_bounds, "array index out of bounds")
UNDEFINED_CALLS(add_overflow, "signed overflow in +")
UNDEFINED_CALLS(sub_overflow, "signed overflow in -")
UNDEFINED_CALLS(mul_overflow, "signed overflow in *")
UNDEFINED_CALLS(negate_overflow, "signed overflow in -x")
UNDEFINED_CALLS(shift_out_of_bounds, "shift out of range")
UNDEFINED_CALLS(divrem_overflow, "division by zero or overflow")
UNDEFINED_CALLS(load_invalid_value, "a bool that is neither 0 nor 1")
}
#endif
