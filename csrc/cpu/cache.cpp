#include "cpu/cache.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyfused {
namespace {

constexpr std::size_t kHugePage = 2 << 20;

struct Cache {
  std::mutex mutex;
  std::map<std::size_t, std::vector<void*>> free_blocks;  // by size class
  std::size_t held = 0;
  std::size_t limit = std::size_t{1} << 30;
};

// Never destroyed: tensors may outlive static destruction.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

// The next of 1, 1.25, 1.5, 1.75 times a power of two: at most a quarter of a block is waste.
std::size_t size_class(std::size_t bytes) {
  std::size_t power = kCacheSmallest;
  while (power * 2 < bytes) power *= 2;
  std::size_t quarter = power / 4;
  return (bytes + quarter - 1) / quarter * quarter;
}

void* allocate(std::size_t size) {
  std::size_t alignment = size >= kHugePage ? kHugePage : 4096;
  void* block = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!block) {
    cache_empty();
    block = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    if (!block) throw std::bad_alloc();
  }
#if defined(__linux__)
  if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);  // one fault per 2 MiB; a hint, may fail
#endif
  return block;
}

void release_all(std::map<std::size_t, std::vector<void*>>& blocks) {
  for (auto& [size, list] : blocks)
    for (void* block : list) std::free(block);
}

}  // namespace

void* cache_take(std::size_t bytes) {
  std::size_t size = size_class(bytes);
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    auto found = cache().free_blocks.find(size);
    if (found != cache().free_blocks.end() && !found->second.empty()) {
      void* block = found->second.back();
      found->second.pop_back();
      cache().held -= size;
      return block;
    }
  }
  return allocate(size);
}

void cache_give(void* block, std::size_t bytes) {
  std::size_t size = size_class(bytes);
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    if (cache().held + size <= cache().limit) {
      cache().free_blocks[size].push_back(block);
      cache().held += size;
      return;
    }
  }
  std::free(block);
}

std::size_t cache_held() {
  std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().held;
}

void cache_empty() {
  std::map<std::size_t, std::vector<void*>> blocks;
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    blocks.swap(cache().free_blocks);
    cache().held = 0;
  }
  release_all(blocks);
}

void cache_limit(std::size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    cache().limit = bytes;
    if (cache().held <= bytes) return;
  }
  cache_empty();
}

}  // namespace pyfused
