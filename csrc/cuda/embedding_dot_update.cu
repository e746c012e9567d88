// One step of an optimizer on one of the two tables of embedding_dot (`ids` index it, `other_ids` the other one) and on
// its bias, in place of their gradients, which are never stored. g[r]: the sum that embedding_dot_runs.cuh makes.
//
//   sgd               w -= lr·g
//   adagrad           s += g²;  w -= lr·g / (√s + eps)
//   rowwise_adagrad   s += mean of the row's g²;  w -= lr·g / (√s + eps)
//   adam              m += α·(g - m);  v += β·(g² - v);  w -= lr·m / (√v + eps)
//
// Steps   The group of lanes that has the sum of a row, in registers, steps on it. The gradient of the other table must see
//         the rows as they were: for the second of two tables the caller passes copies of the first's, gathered before.
//         rowwise_adagrad on rows of several column slices sums twice: first the squares of each slice are left in
//         `workspace_squares` and `add_squares` adds them to s; then the step uses s.
// Traffic that of the sums (twice, there), and each row that occurs, and its state, read and written once. B = 65,536
//         pairs, D = 64, float32, uniform over 1e6 rows, one table: 17 MB of the other's rows, 2 of ids, keys and
//         positions, 33 for its own rows, 65 with Adagrad's state, 98 with Adam's: 12, 20 and 27 us at the 4.3 TB/s that
//         an H200 copies; the sort not counted. Not measured; the loads at the end of a run are waited for.
// Sums    and the step in float (double for double), state too; a 16-bit weight is rounded to nearest.
// Edges   rows that no id names, padding rows, and their state stay as they are.
#include "cuda/embedding_dot_runs.cuh"

namespace pyfused {
namespace cuda {
namespace {

enum Rule { kSgd, kAdagrad, kRowwiseAdagrad, kAdam };  // the order of RULES in pyfused/ops/embedding_dot_update.py

// A table under update, or a bias, which is a table of one column.
template <class T>
struct Trained {
  using C = compute_t<T>;
  T* data;  // may be null
  C *s, *t;
  int64_t stride;
  C a[4];
};

// The sum over the aligned group of `lanes` threads that took this branch together, in each of them.
template <class C>
__device__ __forceinline__ C branch_sum(C x, int lanes) {
  const unsigned group = (lanes == 32 ? kFullWarp : (1u << lanes) - 1) << threadIdx.x % 32 / lanes * lanes;
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(group, x, step);
  return x;
}
template <class Slice, class C, int N>
__device__ __forceinline__ C sum_of_squares(const Slice& slice, const C (&g)[N]) {
  C sum = 0;
  slice.each([&](int i, int) { sum += g[i] * g[i]; });
  return branch_sum(sum, slice.lanes);
}

template <class T>
struct Step {
  using C = compute_t<T>;
  static constexpr int N = kWidth<T>, kBlocks = 2;
  Trained<T> weight, bias;
  int rule;
  bool squares_added;  // to s, for rowwise_adagrad

  template <class Slice>
  __device__ __forceinline__ void operator()(int64_t key, int64_t, const Slice& slice, const C (&g)[N],
                                             C bias_sum) const {
    if (weight.data) step_row(key, slice, g);
    if (!bias.data || !slice.leads) return;
    T* const place = bias.data + key * bias.stride;
    C w = to_compute(*place), s = rule == kSgd ? C(0) : bias.s[key], t = rule == kAdam ? bias.t[key] : C(0);
    step_number(bias.a, w, bias_sum, s, t);
    *place = from_compute<T>(w);
    if (rule != kSgd) bias.s[key] = s;
    if (rule == kAdam) bias.t[key] = t;
  }

  template <class Slice>
  __device__ __forceinline__ void step_row(int64_t key, const Slice& slice, const C (&g)[N]) const {
    T* const row = weight.data + key * weight.stride;
    C w[N] = {}, s[N] = {}, t[N] = {};
    slice.read(w, row);
    if (rule == kRowwiseAdagrad) {
      const C scale = weight.a[0] / (sqrt(row_state(key, slice, g)) + weight.a[1]);
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] -= scale * g[i];
    } else {
      if (rule != kSgd) slice.read(s, weight.s + key * slice.dim);
      if (rule == kAdam) slice.read(t, weight.t + key * slice.dim);
#pragma unroll
      for (int i = 0; i < N; ++i) step_number(weight.a, w[i], g[i], s[i], t[i]);
      if (rule != kSgd) slice.write(weight.s + key * slice.dim, s);
      if (rule == kAdam) slice.write(weight.t + key * slice.dim, t);
    }
    slice.write(row, w);
  }

  // rowwise_adagrad's s of a row after this step.
  template <class Slice>
  __device__ __forceinline__ C row_state(int64_t key, const Slice& slice, const C (&g)[N]) const {
    if (squares_added) return weight.s[key];
    const C squares = sum_of_squares(slice, g);
    C s = slice.leads ? weight.s[key] + squares / static_cast<C>(slice.dim) : C(0);  // one slice: a group has a leader
    if (slice.leads) weight.s[key] = s;
    return branch_sum(s, slice.lanes);
  }

  __device__ __forceinline__ void step_number(const C (&a)[4], C& w, C g, C& s, C& t) const {
    if (rule == kSgd) {
      w -= a[0] * g;
    } else if (rule == kAdam) {
      s += a[1] * (g - s);
      t += a[2] * (g * g - t);
      w -= a[0] * s / (sqrt(t) + a[3]);
    } else {
      s += g * g;
      w -= a[0] * g / (sqrt(s) + a[1]);
    }
  }
};

// squares[run][column slice] = ∑ g²
template <class T>
struct Squares {
  using C = compute_t<T>;
  static constexpr int kBlocks = 3;
  C* squares;
  const int64_t* ranks;  // of the run, from 1
  template <class Slice>
  __device__ __forceinline__ void operator()(int64_t, int64_t entry, const Slice& slice, const C (&g)[kWidth<T>],
                                             C) const {
    const C sum = sum_of_squares(slice, g);
    if (threadIdx.x % slice.lanes == 0) squares[(ranks[entry] - 1) * gridDim.y + blockIdx.y] = sum;
  }
};

// s[r] += the mean of the row's squares, for every run.
template <class C>
__global__ void __launch_bounds__(kBlock) add_squares(C* s, const C* squares, Ids keys, const int64_t* ranks,
                                                      int64_t entries, int64_t rows, int slices, int dim) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= entries) return;
  const int64_t key = keys[i];
  if (key >= rows || (i > 0 && keys[i - 1] == key)) return;
  C sum = 0;
  for (int j = 0; j < slices; ++j) sum += squares[(ranks[i] - 1) * slices + j];
  s[key] += sum / static_cast<C>(dim);
}

template <class T>
Trained<T> trained(const View& table, const View& s, const View& t, const double* settings) {
  using C = compute_t<T>;
  Trained<T> made = {table ? table.as<T>() : nullptr, s ? s.as<C>() : nullptr, t ? t.as<C>() : nullptr,
                     table ? table.strides[0] : 0};
  for (int i = 0; i < 4; ++i) made.a[i] = static_cast<C>(settings[i]);
  return made;
}

bool is_state(const View& state, const View& table, int64_t width) {
  const DType dtype = table.dtype == DType::f64 ? DType::f64 : DType::f32;
  return state && state.dtype == dtype && is_packed(state) && state.numel() == table.shape[0] * width;
}
Status check_state(const char* name, const View& table, const View& s, const View& t, int64_t dim, int rule) {
  const int64_t width = rule == kRowwiseAdagrad ? 1 : dim;
  PYFUSED_REQUIRE(!table || rule == kSgd || is_state(s, table, width), name,
                  "needs a contiguous float32 (float64: float64) state");
  PYFUSED_REQUIRE(!table || rule != kAdam || is_state(t, table, width), name, "needs a second contiguous state");
  return {};
}

// Step 1 of rowwise_adagrad on rows of several slices.
template <class T>
Status sum_squares(const Runs<T>& p, const Trained<T>& weight, const View& workspace, const View& workspace_squares,
                   const View& ranks, Stream stream) {
  using C = compute_t<T>;
  const int64_t entries = p.terms / p.per_key, slices = slices_of(p), runs = entries < p.rows ? entries : p.rows;
  PYFUSED_REQUIRE(workspace_squares.dtype == (sizeof(C) == 8 ? DType::f64 : DType::f32) &&
                      workspace_squares.contiguous() && workspace_squares.numel() >= runs * slices,
                  "workspace_squares", "must hold a number per run of keys and slice of 32 16-byte blocks");
  PYFUSED_REQUIRE(ranks && ranks.dtype == DType::i64 && is_packed(ranks) && ranks.numel() == entries, "ranks",
                  "must be int64, one per key");
  const Squares<T> sink = {workspace_squares.as<C>(), ranks.as<int64_t>()};
  PYFUSED_TRY(sum_runs(p, sink, true, workspace, stream));
  const int64_t blocks = ceil_div(entries, kBlock);
  PYFUSED_REQUIRE(blocks <= INT32_MAX, "keys", "are too many");
  return launch(add_squares<C>, static_cast<unsigned>(blocks), kBlock, 0, stream, weight.s, sink.squares, p.keys,
                sink.ranks, entries, p.rows, static_cast<int>(slices), p.dim);
}

}  // namespace

// keys, order: as embedding_dot_backward takes them. other_rows: copies of other_weight's rows, one per id of other_ids,
// to be read instead. settings: the rule's numbers for the weight, then for the bias. ranks, workspace_squares: for
// rowwise_adagrad on rows of more than 512 bytes.
Status embedding_dot_update(View weight, View bias, View weight_s, View weight_t, View bias_s, View bias_t,
                            View workspace, View workspace_squares, View grad, View keys, View order, View ranks,
                            View other_ids, View other_weight, View other_rows, Settings settings, int rule,
                            int64_t rows, Stream stream) {
  PYFUSED_TRY(check_runs(grad, keys, order, other_ids, other_weight));
  const int64_t dim = other_weight.shape[1];
  PYFUSED_REQUIRE(!weight || (is_table(weight) && weight.dtype == grad.dtype && weight.shape[0] == rows &&
                              weight.shape[1] == dim && weight.data != other_weight.data),
                  "weight", "must be [rows, D] with rows without gaps, of grad's dtype, and not the other table");
  PYFUSED_REQUIRE(!bias || (bias.dtype == grad.dtype && bias.ndim == 1 && bias.shape[0] == rows), "bias",
                  "must be [rows], of grad's dtype");
  PYFUSED_REQUIRE(!other_rows || (is_packed(other_rows) && other_rows.ndim == 2 && other_rows.dtype == grad.dtype &&
                                  other_rows.shape[0] == other_ids.numel() && other_rows.shape[1] == dim),
                  "other_rows", "must be contiguous [other_ids, D], of grad's dtype");
  PYFUSED_REQUIRE(rule >= kSgd && rule <= kAdam, "rule", "must be one of the four");
  PYFUSED_TRY(check_state("weight", weight, weight_s, weight_t, dim, rule));
  PYFUSED_TRY(check_state("bias", bias, bias_s, bias_t, 1, rule));
  if (grad.numel() == 0) return {};
  return for_dtype(grad.dtype, [&](auto type) {
    using T = decltype(type);
    Step<T> sink = {trained<T>(weight, weight_s, weight_t, settings.data()),
                    trained<T>(bias, bias_s, bias_t, settings.data() + 4), rule, false};
    Table<T> other(other_weight);
    if (other_rows) other.data = other_rows.as<T>(), other.stride = dim;
    Runs<T> p = runs_of<T>(grad, keys, order, other_ids, other, rows, weight ? dim : 0);
    p.gathered = bool(other_rows);
    sink.squares_added = rule == kRowwiseAdagrad && slices_of(p) > 1;
    if (sink.squares_added) PYFUSED_TRY(sum_squares(p, sink.weight, workspace, workspace_squares, ranks, stream));
    const bool states = rule == kRowwiseAdagrad || (is_aligned(sink.weight.s) && is_aligned(sink.weight.t));
    return sum_runs(p, sink, !weight || (Table<T>(weight).whole_vectors() && states), workspace, stream);
  });
}

}  // namespace cuda
}  // namespace pyfused
