// A cache of memory blocks for the large outputs of CPU kernels, in size classes.
//
// Why: glibc maps every block over 32 MiB anew and gives smaller ones back to the system whenever enough are free, and
// the first write to fresh memory costs a page fault per 4 KiB: 1.6 GB/s, a tenth of what writing warm memory runs at.
// A training step frees and allocates the same sizes over and over, so a freed block is kept for the next tensor of its
// class.
#pragma once
#include <cstddef>

namespace pyfused {

constexpr std::size_t kCacheSmallest = 64 << 10;  // smaller tensors stay with malloc, which serves them without faults

// Fresh memory, 4096-byte aligned, in huge pages where they fit; std::free gives it back. Throws std::bad_alloc.
void* allocate_pages(std::size_t size);

void* cache_take(std::size_t bytes);              // 4096-byte aligned; throws std::bad_alloc
void cache_give(void* block, std::size_t bytes);  // with the bytes that were asked for
std::size_t cache_held();                         // bytes in free blocks
void cache_empty();                               // give free blocks back to the system
void cache_limit(std::size_t bytes);              // hold at most this much; 0 switches the cache off

}  // namespace pyfused
