// Working memory of the kernels: per thread, grows, stays until the thread ends. A fresh allocation of the same size
// would cost a page fault per 4 KiB on every call, which is 10 times the cost of writing it.
#pragma once
#include <cstddef>

namespace pyfused {

constexpr int kScratchSlots = 4;
// At least `bytes` bytes, 4096-byte aligned, valid until this thread asks for the same slot again. Contents undefined.
void* scratch(int slot, std::size_t bytes);

}  // namespace pyfused
