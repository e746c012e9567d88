// What the forward and the backward of embedding_dot share: ids of two widths, rows of a table, the check of the ids.
#pragma once
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

constexpr int64_t kAhead = 16;        // terms between the prefetch of a row and its use
constexpr int64_t kAheadBytes = 512;  // prefetched of a row; the hardware sees the pattern in what follows

// Into the second-level cache: it tracks more misses at once than the first (here 48 against 16), which is worth a quarter
// of the time where rows come from memory. Into the first, `locality` 3, where they come from the third: that is worth a
// fifth (65536 scores of 64 dims from 30,000 rows, one thread).
template <int locality = 2, class T>
PYFUSED_INLINE void prefetch_row(const T* row, int64_t dim) {
  int64_t bytes = min<int64_t>(dim * sizeof(T), kAheadBytes);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + i, 0, locality);
}

// int32 or int64 ids. The branch in [] always goes the same way; it costs less than two more template parameters.
struct Ids {
  const void* data;
  bool wide;
  int64_t count;
  explicit Ids(View v) : data(v.data), wide(v.dtype == DType::i64), count(v.numel()) {}
  PYFUSED_INLINE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  // The ids first, ..., first + n - 1 and, if need be, the last one again until they are a multiple of four: where they
  // lie if they are int64 and that many, else in `copy`.
  PYFUSED_INLINE const int64_t* four_by_four(int64_t first, int64_t n, int64_t* copy) const {
    if (wide && n % 4 == 0) return static_cast<const int64_t*>(data) + first;
    for (int64_t i = 0; i < n; ++i) copy[i] = (*this)[first + i];
    for (int64_t i = n; i % 4; ++i) copy[i] = copy[n - 1];
    return copy;
  }
};

template <class T>
struct Table {
  const T* data;
  int64_t rows, stride, dim;
  bool far, farther;  // too large for the second-level cache, so worth a prefetch; or even for the third
  explicit Table(View v)
      : data(v.as<T>()),
        rows(v.shape[0]),
        stride(v.strides[0]),
        dim(v.shape[1]),
        far(v.shape[0] * stride > (2 << 20) / int64_t{sizeof(T)}),
        farther(v.shape[0] * stride > (16 << 20) / int64_t{sizeof(T)}) {}
  PYFUSED_INLINE const T* row(int64_t id) const {
    int64_t offset = id * stride;
    asm("" : "+r"(offset));  // else GCC takes four rows' offsets from one vector multiplication, which is slower
    return data + offset;
  }
  PYFUSED_INLINE void prefetch(const T* row) const {
    if (far) farther ? prefetch_row(row, dim) : prefetch_row<3>(row, dim);
  }
};

PYFUSED_INLINE bool is_packed(View v) { return v.contiguous() || v.numel() == 0; }
PYFUSED_INLINE bool is_table(View v) { return v.ndim == 2 && (v.strides[1] == 1 || v.shape[1] <= 1); }

// Whether one of the ids begin, ..., end - 1 is not in [0, rows); ids: Ids, or an array.
template <class I>
PYFUSED_INLINE bool any_outside(const I& ids, int64_t begin, int64_t end, int64_t rows) {
  uint64_t outside = 0;
  for (int64_t i = begin; i < end; ++i) outside |= static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(rows);
  return outside;
}

// The position of the first id that is not in [0, rows); ids.count if there is none.
PYFUSED_INLINE int64_t first_outside(Ids ids, int64_t rows, int threads) {
  int64_t first = ids.count;
  parallel_for(ids.count, 1 << 14, threads, [&](int64_t begin, int64_t end, int) {
    if (!any_outside(ids, begin, end, rows)) return;
    while (static_cast<uint64_t>(ids[begin]) < static_cast<uint64_t>(rows)) ++begin;
#ifdef _OPENMP
#pragma omp critical(pyfused_first_outside)
#endif
    first = min(first, begin);
  });
  return first;
}

PYFUSED_INLINE Status check_ids(const char* argument, Ids ids, int64_t rows, int threads) {
  int64_t at = first_outside(ids, rows, threads);
  return at == ids.count ? Status{} : out_of_range(argument, at, ids[at], rows);
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
