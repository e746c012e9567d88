// Every CUDA kernel, named once: K(name, arguments). The list declares the launchers, is what bindings.cpp exports as
// cuda_<name>, and what tests/cuda_emulation runs on the CPU. Outputs first, then workspaces, inputs and options; the
// stream of the call is appended. Contracts stand with the kernels, in <op>.cu. No CUDA header is needed here.
//
// A launcher runs on the tensors' device, which the caller has made current, checks what it is given, launches on
// `stream` and returns; it never waits for the device, allocates nothing, and can be captured in a CUDA graph.
#pragma once
#include <array>
#include <cstdint>

#include "tensor_view.h"

struct CUstream_st;

namespace pyfused {

using Stream = CUstream_st*;             // cudaStream_t
using Settings = std::array<double, 8>;  // of an optimizer: four numbers for a weight, four for its bias

#define PYFUSED_CUDA_KERNELS(K)                                                                                        \
  K(conv2d_bias_relu, (View x, View bias, Stream stream))                                                              \
  K(conv2d_relu_grad, (View g, View d_bias, View workspace, View grad, View output, Stream stream))                    \
  K(conv2d_implicit_gemm,                                                                                              \
    (View out, View code, View input, View weight, View bias, int stride_h, int stride_w, int padding_h,               \
     int padding_w, int dilation_h, int dilation_w, bool exact, bool large, Stream stream))                            \
  K(conv2d_implicit_gemm_backward_weight,                                                                              \
    (View d_weight, View d_bias, View workspace, View grad, View saved, View input, int stride_h, int stride_w,        \
     int padding_h, int padding_w, int dilation_h, int dilation_w, bool exact, bool large, Stream stream))             \
  K(conv2d_implicit_gemm_backward_input,                                                                               \
    (View d_input, View grad, View saved, View weight, int stride_h, int stride_w, int padding_h, int padding_w,       \
     int dilation_h, int dilation_w, bool exact, bool large, Stream stream))                                           \
  K(conv2d_direct, (View out, View code, View input, View weight, View bias, int64_t stride_h, int64_t stride_w,       \
                    int64_t pad_h, int64_t pad_w, Stream stream))                                                      \
  K(conv2d_direct_backward_weight, (View d_weight, View d_bias, View workspace, View grad, View saved, View input,     \
                                    int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, Stream stream))  \
  K(relu_max_pool2d,                                                                                                   \
    (View out, View code, View activation, int64_t kh, int64_t kw, int64_t sh, int64_t sw, Stream stream))             \
  K(relu_max_unpool2d, (View g, View grad, View code, int64_t kh, int64_t kw, int64_t sh, int64_t sw, Stream stream))  \
  K(cross_entropy,                                                                                                     \
    (View loss, View lse, View stats, View total, View workspace, View input, View target, View weight, int reduction, \
     int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Stream stream))                      \
  K(cross_entropy_backward, (View grad_input, View grad_loss, View grad_lse, View input, View target, View weight,     \
                             View weight_sum, View stats, View total, int reduction, int64_t ignore_index,             \
                             double label_smoothing, double z_loss, double softcap, Stream stream))                    \
  K(check_labels, (View target, int64_t classes, int64_t ignore_index, Stream stream))                                 \
  K(embedding_dot, (View out, View user, View item, View user_weight, View item_weight, View user_bias,                \
                    View item_bias, Stream stream))                                                                    \
  K(embedding_dot_keys, (View keys, View ids, int64_t rows, int64_t padding, Stream stream))                           \
  K(embedding_dot_backward, (View weight_grad, View bias_grad, View occurring, View workspace, View grad, View keys,   \
                             View order, View ranks, View other_ids, View other_weight, int64_t rows, Stream stream))  \
  K(embedding_dot_update,                                                                                              \
    (View weight, View bias, View weight_s, View weight_t, View bias_s, View bias_t, View workspace,                   \
     View workspace_squares, View grad, View keys, View order, View ranks, View other_ids, View other_weight,          \
     View other_rows, Settings settings, int rule, int64_t rows, Stream stream))                                       \
  K(gather_rows, (View out, View ids, View table, double factor, Stream stream))                                       \
  K(in_batch_cross_entropy, (View loss, View stats, View workspace, View rows, View items, View offset, View item,     \
                             double scale, bool masked, Stream stream))                                                \
  K(in_batch_cross_entropy_backward,                                                                                   \
    (View d_rows, View d_offset, View rows, View items, View offset, View item, View stats, View grad, View most,      \
     double scale, bool masked, bool by_item, Stream stream))                                                          \
  K(in_batch_ids, (View bad, View user, View item, int64_t users, int64_t items, bool report, Stream stream))          \
  K(mask_accidental_hits, (View scores, View item, int64_t first, Stream stream))

namespace cuda {
#define PYFUSED_DECLARE(name, arguments) Status name arguments;
PYFUSED_CUDA_KERNELS(PYFUSED_DECLARE)
#undef PYFUSED_DECLARE
}  // namespace cuda

}  // namespace pyfused
