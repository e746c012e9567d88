// Every CPU kernel, named once: K(name, arguments). The list declares the kernels in each instruction set's namespace,
// makes the table that isa.cpp chooses from, and is what bindings.cpp exports. Outputs first, then inputs, then
// options, then the number of threads. Contracts stand with the kernels, in kernels/<op>.cpp.
#pragma once
#include <cstdint>

#include "tensor_view.h"

#define PYFUSED_CPU_KERNELS(K)                                                                                         \
  K(cross_entropy, (View loss, View lse, View stats, View total, View grad_input, View input, View target,             \
                    View weight, int reduction, int64_t ignore_index, double label_smoothing, double z_loss,           \
                    double softcap, double grad_loss, int threads))                                                    \
  K(cross_entropy_backward,                                                                                            \
    (View grad_input, View grad_loss, View grad_lse, View input, View target, View weight, View stats, View total,     \
     int reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap, int threads))         \
  K(linear_cross_entropy, (View loss, View stats, View d_input, View d_weight, View d_bias, View logits, View input,   \
                           View weight, View bias, View target, View row_ids, View class_ids, View upstream,           \
                           double smoothing, double z_loss, int64_t rows, int threads))                                \
  K(conv2d_direct, (View out, View code, View input, View weight, View bias, int64_t stride_h, int64_t stride_w,       \
                    int64_t pad_h, int64_t pad_w, int threads))                                                        \
  K(conv2d_direct_backward_weight, (View d_weight, View d_bias, View grad, View saved, View input, int64_t stride_h,   \
                                    int64_t stride_w, int64_t pad_h, int64_t pad_w, int threads))                      \
  K(conv2d_implicit_gemm_pack, (View packed, View weight, int threads))                                                \
  K(conv2d_implicit_gemm,                                                                                              \
    (View out, View input, View weight, View bias, View residual, int64_t stride_h, int64_t stride_w, int64_t pad_h,   \
     int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int activation, double slope, int threads))                \
  K(conv2d_depthwise,                                                                                                  \
    (View out, View input, View weight, View bias, int64_t stride, int64_t pad_h, int64_t pad_w, int threads))         \
  K(conv2d_depthwise_backward, (View d_input, View d_weight, View d_bias, View grad, View saved, View input,           \
                                View weight, int64_t stride, int64_t pad_h, int64_t pad_w, int threads))               \
  K(conv2d_relu_grad, (View g, View d_bias, View grad, View saved, int threads))                                       \
  K(conv_act, (View out, View z, View residual, int activation, double slope, int threads))                            \
  K(conv_act_grad, (View g, View d_bias, View grad, View saved, int activation, double slope, int threads))            \
  K(relu_max_pool2d,                                                                                                   \
    (View out, View code, View activation, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int threads))               \
  K(relu_max_unpool2d, (View g, View grad, View code, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int threads))    \
  K(fingerprint, (View out, View input, int threads))                                                                  \
  K(convert_layout, (View out, View input, int threads))                                                               \
  K(conv2d_winograd_transform_weight, (View transformed, View weight, int tile, int threads))                          \
  K(conv2d_winograd,                                                                                                   \
    (View out, View input, View weight, View bias, int pad_h, int pad_w, bool relu, int tile, int threads))            \
  K(conv2d_winograd_act, (View out, View input, View weight, View bias, View residual, int pad_h, int pad_w,           \
                          int activation, double slope, int tile, int threads))                                        \
  K(conv2d_winograd_pool,                                                                                              \
    (View out, View code, View input, View weight, View bias, int pad_h, int pad_w, int threads))                      \
  K(conv2d_winograd_backward_input,                                                                                    \
    (View grad_input, View grad, View saved, View weight, int pad_h, int pad_w, int tile, int threads))                \
  K(conv2d_winograd_backward_weight, (View grad_weight, View grad_bias, View grad, View saved, View input, int pad_h,  \
                                      int pad_w, int tile, int threads))                                               \
  K(mask_accidental_hits, (View scores, View item, int64_t first, int threads))                                        \
  K(embedding_dot,                                                                                                     \
    (View out, View user, View item, View user_weight, View item_weight, View user_bias, View item_bias, int threads)) \
  K(embedding_dot_backward, (View weight_grad, View bias_grad, View occurring, View count, View grad, View ids,        \
                             View other_ids, View other_weight, int64_t rows, int64_t padding, int threads))           \
  K(embedding_dot_update, (View weight, View bias, View weight_s, View weight_t, View bias_s, View bias_t,             \
                           View before, View slots, View grad, View ids, View other_ids, View other_weight,            \
                           View settings, int rule, int64_t rows, int64_t padding, int threads))

namespace pyfused {

struct Kernels {
#define PYFUSED_MEMBER(name, arguments) Status(*name) arguments;
  PYFUSED_CPU_KERNELS(PYFUSED_MEMBER)
#undef PYFUSED_MEMBER
};

#ifdef PYFUSED_ISA
namespace PYFUSED_ISA {
#define PYFUSED_DECLARE(name, arguments) Status name arguments;
PYFUSED_CPU_KERNELS(PYFUSED_DECLARE)
#undef PYFUSED_DECLARE
}  // namespace PYFUSED_ISA
#endif

}  // namespace pyfused
