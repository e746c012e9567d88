// What both directions of cross_entropy stand on: the problem's options and labels, and logits as rows x classes.
#pragma once
#include <type_traits>
#include <utility>

#include "cpu/simd_math.h"
#include "cross_entropy_arguments.h"

namespace pyfused {
namespace PYFUSED_ISA {
namespace {

enum Target { hard, smooth, soft };  // hard: labels, no smoothing; smooth: labels and ε > 0; soft: probabilities
// From this many adjacent classes on, tails and sums over lanes cost less than gathering. The forward, which has two such
// sums a row, also gathers longer rows: up to 800 bytes, or up to 6 vectors where the probabilities are gathered as well.
constexpr int64_t kByRow = 40;
template <class C>
constexpr int64_t kByRowForward = 800 / sizeof(C);
template <class C>
constexpr int64_t kByRowForwardSoft = max<int64_t>(kByRow, 6 * lanes<C>);

template <class C>
struct Options {  // what both directions share; C is float or double
  int64_t rows, classes, ignore_index;
  const int64_t* labels;  // null for soft targets
  const C* weight;        // may be null
  C keep, spread;         // 1 - ε and ε / C
  C weight_sum, z_loss, softcap;
  int reduction;
  bool by_row;
  C* stats;  // [3, rows]

  Options(const View& input, const View& target, const View& w, const View& saved, int reduce, int64_t ignored,
          double smoothing, double z_factor, double cap)
      : rows(saved.shape[1]),
        classes(input.shape[1]),
        ignore_index(ignored),
        labels(target.dtype == DType::i64 ? target.as<int64_t>() : nullptr),
        weight(w.as<C>()),
        keep(1 - smoothing),
        spread(smoothing / input.shape[1]),
        z_loss(z_factor),
        softcap(cap),
        reduction(reduce),
        by_row(classes >= kByRow && input.strides[1] == 1 && (labels || target.strides[1] == 1)),
        stats(saved.as<C>()) {
    double total = weight ? 0 : classes;
    for (int64_t c = 0; weight && c < classes; ++c) total += weight[c];
    weight_sum = total;
  }
  PYFUSED_INLINE C weight_of(int64_t c) const { return weight ? weight[c] : C(1); }
  PYFUSED_INLINE int64_t counted() const {  // rows that are not ignored
    int64_t count = rows;
    for (int64_t r = 0; labels && r < rows; ++r) count -= labels[r] == ignore_index;
    return count;
  }
  PYFUSED_INLINE bool ignored(int64_t r) const { return labels && labels[r] == ignore_index; }
  // Rows in a group, and in a chunk: about 16K elements, 10 us of work. They depend on the shape alone.
  PYFUSED_INLINE int64_t group() const {
    return by_row ? min<int64_t>(max<int64_t>(16384 / classes, 1), lanes<C>) : lanes<C>;
  }
  PYFUSED_INLINE int64_t chunk() const {
    return max<int64_t>(16384 / (group() * max<int64_t>(classes, 1)), 1) * group();
  }

  // Per lane the label of row r + lane; -1 where there is none: soft target, ignored row, lane past the last row.
  PYFUSED_INLINE Mask<C> labels_of(int64_t r, int64_t n) const {
    Mask<C> label = Mask<C>{} - 1;
    if (!labels) return label;
    std::decay_t<decltype(label[0])> buffer[lanes<C>];
    auto read = [&](int64_t count) {
      for (int64_t l = 0; l < count; ++l) buffer[l] = labels[r + l] == ignore_index ? -1 : labels[r + l];
    };
    if (n == lanes<C>) {
      read(lanes<C>);  // a constant: vectors instead of a loop
    } else {
      for (auto& l : buffer) l = -1;
      read(n);
    }
    std::memcpy(&label, buffer, sizeof label);
    return label;
  }
  // Per lane what the row counts: its label's weight, 1 for a soft target, 0 for an ignored or absent row.
  PYFUSED_INLINE Vec<C> weights_of(Mask<C> label, int64_t n) const {
    if (!labels) return lane_numbers<C>() < static_cast<int>(n) ? splat(C(1)) : Vec<C>{};
    if (!weight) return label >= 0 ? splat(C(1)) : Vec<C>{};
    Vec<C> w{};
    for (int l = 0; l < lanes<C>; ++l)
      if (label[l] >= 0) w[l] = weight[label[l]];
    return w;
  }
  Status check_labels() const {
    auto wrong = [&](int64_t label) {
      return (static_cast<uint64_t>(label) >= static_cast<uint64_t>(classes)) & (label != ignore_index);
    };
    int64_t count = 0;  // of all, which takes vectors and less time than to stop at the first
    for (int64_t r = 0; labels && r < rows; ++r) count += wrong(labels[r]);
    for (int64_t r = 0; count && r < rows; ++r)
      if (wrong(labels[r])) return out_of_range("target", r, labels[r], classes);
    return {};
  }
};

template <class T>
struct Matrix {  // rows x classes in memory; row r = (r / inner, r % inner)
  using C = compute_t<T>;
  static constexpr int64_t width = lanes<C>;
  T* data;
  int64_t classes, class_stride, outer_stride, inner_stride, inner;

  explicit Matrix(const View& v)
      : data(v.as<T>()),
        classes(v.shape[1]),
        class_stride(v.strides[1]),
        outer_stride(v.ndim == 3 ? v.strides[0] : 0),
        inner_stride(v.ndim == 3 ? v.strides[2] : v.strides[0]),
        inner(max<int64_t>(v.shape[v.ndim == 3 ? 2 : 0], 1)) {}
  PYFUSED_INLINE T* row(int64_t r) const {
    if (!outer_stride) return data + r * inner_stride;  // a division takes as long as 10 classes
    return data + r / inner * outer_stride + r % inner * inner_stride;
  }
  // Whether the rows r, ..., r + n - 1 are a vector's worth, each `inner_stride` behind the one before it.
  PYFUSED_INLINE bool even(int64_t r, int64_t n) const {
    return n == width && (!outer_stride || r % inner + n <= inner);
  }
  PYFUSED_INLINE bool lanes_adjacent(int64_t r, int64_t n) const { return inner_stride == 1 && even(r, n); }
  // Rows shorter than a vector must lie one behind the other: a vector then reaches into rows of the same group only.
  PYFUSED_INLINE bool transposable(int64_t r, int64_t n) const {
    const bool fits = classes >= width || (inner_stride == classes && classes >= width / 4);
    return class_stride == 1 && fits && even(r, n);
  }
  // n rows to and from tile[class][lane]; lanes past n repeat the last row.
  PYFUSED_INLINE void gather(int64_t r, int64_t n, C* tile) const {
    const T* p = row(r);
    if (lanes_adjacent(r, n)) {
      for (int64_t c = 0; c < classes; ++c, p += class_stride) {
        __builtin_prefetch(p + width);  // the next group: as many streams as classes are too many for the hardware's
        store(tile + c * width, load(p));
      }
      return;
    }
    if (transposable(r, n)) {
      for_blocks([&](int64_t c, int64_t count) {
        Vec<C> v[width];
        for (int64_t l = 0; l < width; ++l) v[l] = load_first(p + l * inner_stride + c, reach(l));
        transpose<C>(v);
        for (int64_t k = 0; k < count; ++k) store(tile + (c + k) * width, v[k]);
      });
      for (int64_t c = classes - few(); c < classes; ++c) {
        T column[width];
        for (int64_t l = 0; l < width; ++l) column[l] = p[l * inner_stride + c];
        store(tile + c * width, load(column));
      }
      return;
    }
    for (int64_t l = 0; l < width; ++l) {
      p = row(r + min(l, n - 1));
      for (int64_t c = 0; c < classes; ++c) tile[c * width + l] = to_compute(p[c * class_stride]);
    }
  }
  PYFUSED_INLINE void scatter(int64_t r, int64_t n, const C* tile) const {
    if (transposable(r, n)) {
      T* p = row(r);
      for_blocks([&](int64_t c, int64_t count) {
        Vec<C> v[width]{};
        for (int64_t k = 0; k < count; ++k) v[k] = load(tile + (c + k) * width);
        transpose<C>(v);
        // In this order: what a row writes behind its end, the next ones overwrite.
        for (int64_t l = 0; l < width; ++l) store_first(p + l * inner_stride + c, v[l], reach(l));
      });
      for (int64_t c = classes - few(); c < classes; ++c) {
        T column[width];
        store(column, load(tile + c * width));
        for (int64_t l = 0; l < width; ++l) p[l * inner_stride + c] = column[l];
      }
      return;
    }
    for (int64_t l = 0; l < n; ++l) {
      T* p = row(r + l);
      for (int64_t c = 0; c < classes; ++c) p[c * class_stride] = from_compute<T>(tile[c * width + l]);
    }
  }

 private:
  // Blocks of `width` classes, but for the `few` last; the last block overlaps the one before it, or is all there are.
  template <class Body>
  PYFUSED_INLINE void for_blocks(const Body& body) const {
    if (classes < width) return body(int64_t{0}, classes);
    for (int64_t c = 0; c < classes - few(); c += width) body(min(c, classes - width), width);
  }
  // Classes behind the last whole block that are too few for one: 16 numbers moved singly cost a fourth of its shuffles.
  PYFUSED_INLINE int64_t few() const {
    const int64_t left = classes % width;
    return classes > width && left < width / 4 ? left : 0;
  }
  // How much of a vector from the start of row l of a group on lies in the group.
  PYFUSED_INLINE int64_t reach(int64_t l) const { return classes >= width ? width : min(width, (width - l) * classes); }
};

template <bool Capped, class T, class C = compute_t<T>>
PYFUSED_INLINE Vec<C> logits(const T* p, C softcap) {
  if constexpr (Capped) return softcap * tanh<C>(load(p) / softcap);
  return load(p);
}

// --- What both directions do with a problem

// The part of the target that is not the label, on the classes of one vector: u_c = w_c (smooth; times ε / C) or
// w_c ((1-ε) y_c + ε/C) (soft).
template <Target K, class U, class C>
PYFUSED_INLINE Vec<C> spread_target(const Options<C>& o, const U* y, Vec<C> w) {
  if constexpr (K == soft) w *= load(y) * o.keep + o.spread;
  return w;
}

// Calls run(Target constant, softcap constant, T{}, U{}) for this problem's types: U holds probabilities, in the
// logits' type or in the type of the arithmetic.
template <class T, class Run>
Status specialize(const View& target, double label_smoothing, double softcap, const Run& run) {
  auto with_target = [&](auto capped) {
    using C = compute_t<T>;
    if (target.dtype == DType::i64)
      return label_smoothing > 0 ? run(std::integral_constant<Target, smooth>(), capped, T{}, T{})
                                 : run(std::integral_constant<Target, hard>(), capped, T{}, T{});
    if (target.dtype == DType::f32 && !std::is_same_v<T, C>)
      return run(std::integral_constant<Target, soft>(), capped, T{}, C{});
    return run(std::integral_constant<Target, soft>(), capped, T{}, T{});
  };
  return softcap > 0 ? with_target(std::true_type()) : with_target(std::false_type());
}

}  // namespace
}  // namespace PYFUSED_ISA
}  // namespace pyfused
