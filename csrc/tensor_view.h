// What a kernel receives: a View of a tensor (data, shape, strides in elements, dtype, device), read from DLPack; and
// what it returns: a Status. No torch header, no allocation, no exception crosses this line.
#pragma once
#include <cstdint>

// Everything here is compiled once per instruction set. always_inline keeps the linker from merging an AVX-512 copy of
// a function into code that must run without AVX-512.
#define PYFUSED_INLINE inline __attribute__((always_inline))

namespace pyfused {

// --- The part of the DLPack 1.3 C ABI that is used (https://dmlc.github.io/dlpack/latest/c_api.html).
struct DLDevice {
  int32_t type;  // 1 = CPU, 2 = CUDA
  int32_t id;
};
struct DLDataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {  // "versioned" in the specification
  struct {
    uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(DLManagedTensor* self);
  uint64_t flags;
  DLTensor tensor;
};
struct DLPackExchangeAPI {  // found at torch.Tensor.__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api"
  struct {
    uint32_t major, minor;
  } version;
  DLPackExchangeAPI* previous;
  void* allocate;
  void* managed_from_object;
  int (*object_from_managed)(DLManagedTensor* tensor, void** out);
  int (*view_from_object)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

enum class DType : uint8_t { f32, f64, bf16, f16, i32, i64, u8, boolean, other };

// `ndim < 0` is an absent optional tensor (None).
struct View {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;
  int32_t ndim = -1;
  DType dtype = DType::other;
  DLDevice device = {0, 0};

  PYFUSED_INLINE explicit operator bool() const { return ndim >= 0; }
  template <class T>
  PYFUSED_INLINE T* as() const {
    return static_cast<T*>(data);
  }
  PYFUSED_INLINE int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // Row-major without gaps; dimensions of size 1 may have any stride.
  PYFUSED_INLINE bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; expected *= shape[i--])
      if (shape[i] != 1 && strides[i] != expected) return false;
    return true;
  }
  PYFUSED_INLINE bool floating() const { return dtype <= DType::f16; }
  PYFUSED_INLINE bool index() const { return dtype == DType::i32 || dtype == DType::i64; }
};

PYFUSED_INLINE bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

// What a kernel returns. `argument` and `problem` are string literals.
struct Status {
  enum Code { ok, invalid, out_of_range, failed } code = ok;
  const char* argument = nullptr;
  const char* problem = nullptr;  // invalid: what the kernel needs; failed: what the CUDA runtime says
  int64_t position = 0, value = 0,
          limit = 0;  // out_of_range: argument.flatten()[position] = value is not in [0, limit)
};
PYFUSED_INLINE Status invalid(const char* argument, const char* problem) {
  return {Status::invalid, argument, problem, 0, 0, 0};
}
PYFUSED_INLINE Status out_of_range(const char* argument, int64_t position, int64_t value, int64_t limit) {
  return {Status::out_of_range, argument, nullptr, position, value, limit};
}
// The kernels' own check of what they are given: the Python side prepares it, this side does not trust it.
#define PYFUSED_REQUIRE(condition, argument, problem)    \
  do {                                                   \
    if (!(condition)) return invalid(argument, problem); \
  } while (0)

}  // namespace pyfused
