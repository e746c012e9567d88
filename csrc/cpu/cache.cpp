#include "cpu/cache.h"

#include <cstdint>
#include <cstdlib>
#include <deque>
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

struct Block {
  void* memory;
  std::uint64_t given;  // when, counted in blocks given
};
using Blocks = std::map<std::size_t, std::deque<Block>>;  // by size class; the longest unused first

struct Cache {
  std::mutex mutex;
  Blocks free_blocks;
  std::uint64_t given = 0;
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

// Takes the blocks that were unused for longest out of the cache until it holds at most `bytes`. The mutex is held.
std::vector<void*> evict(Cache& c, std::size_t bytes) {
  std::vector<void*> evicted;
  while (c.held > bytes) {
    auto oldest = c.free_blocks.begin();
    for (auto list = oldest; list != c.free_blocks.end(); ++list)
      if (list->second.front().given < oldest->second.front().given) oldest = list;
    evicted.push_back(oldest->second.front().memory);
    oldest->second.pop_front();
    c.held -= oldest->first;
    if (oldest->second.empty()) c.free_blocks.erase(oldest);
  }
  return evicted;
}

void release(const std::vector<void*>& blocks) {
  for (void* block : blocks) std::free(block);
}

}  // namespace

void* allocate_pages(std::size_t size) {
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

void* cache_take(std::size_t bytes) {
  std::size_t size = size_class(bytes);
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    auto found = cache().free_blocks.find(size);
    if (found != cache().free_blocks.end()) {
      void* block = found->second.back().memory;
      found->second.pop_back();
      if (found->second.empty()) cache().free_blocks.erase(found);
      cache().held -= size;
      return block;
    }
  }
  return allocate_pages(size);
}

void cache_give(void* block, std::size_t bytes) {
  std::size_t size = size_class(bytes);
  std::vector<void*> surplus = {block};
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    Cache& c = cache();
    if (size <= c.limit) {
      surplus = evict(c, c.limit - size);  // sizes that are no longer asked for make room for those that are
      c.free_blocks[size].push_back({block, c.given++});
      c.held += size;
    }
  }
  release(surplus);
}

std::size_t cache_held() {
  std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().held;
}

void cache_empty() {
  std::vector<void*> blocks;
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    blocks = evict(cache(), 0);
  }
  release(blocks);
}

void cache_limit(std::size_t bytes) {
  std::vector<void*> blocks;
  {
    std::lock_guard<std::mutex> lock(cache().mutex);
    cache().limit = bytes;
    blocks = evict(cache(), bytes);
  }
  release(blocks);
}

}  // namespace pyfused
