"""What we call of ggml.h to make the nodes of a graph, and the enumerations that only these take."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from pyggml_adapt.ggml.libggml cimport *

cdef extern from "ggml.h" nogil:
    enum ggml_unary_op:
        GGML_UNARY_OP_ABS
        GGML_UNARY_OP_SGN
        GGML_UNARY_OP_NEG
        GGML_UNARY_OP_STEP
        GGML_UNARY_OP_TANH
        GGML_UNARY_OP_ELU
        GGML_UNARY_OP_RELU
        GGML_UNARY_OP_SIGMOID
        GGML_UNARY_OP_GELU
        GGML_UNARY_OP_GELU_QUICK
        GGML_UNARY_OP_SILU
        GGML_UNARY_OP_HARDSWISH
        GGML_UNARY_OP_HARDSIGMOID
        GGML_UNARY_OP_EXP
        GGML_UNARY_OP_EXPM1
        GGML_UNARY_OP_SOFTPLUS
        GGML_UNARY_OP_GELU_ERF
        GGML_UNARY_OP_XIELU
        GGML_UNARY_OP_FLOOR
        GGML_UNARY_OP_CEIL
        GGML_UNARY_OP_ROUND
        GGML_UNARY_OP_TRUNC

    enum ggml_glu_op:
        GGML_GLU_OP_REGLU
        GGML_GLU_OP_GEGLU
        GGML_GLU_OP_SWIGLU
        GGML_GLU_OP_SWIGLU_OAI
        GGML_GLU_OP_GEGLU_ERF
        GGML_GLU_OP_GEGLU_QUICK
        GGML_GLU_OP_SWIGLU_CLAMP

    enum ggml_op_pool:
        GGML_OP_POOL_MAX
        GGML_OP_POOL_AVG

    enum ggml_scale_mode:
        GGML_SCALE_MODE_NEAREST
        GGML_SCALE_MODE_BILINEAR
        GGML_SCALE_MODE_BICUBIC

    enum ggml_scale_flag:
        GGML_SCALE_FLAG_ALIGN_CORNERS
        GGML_SCALE_FLAG_ANTIALIAS

    enum ggml_tri_type:
        GGML_TRI_TYPE_UPPER_DIAG
        GGML_TRI_TYPE_UPPER
        GGML_TRI_TYPE_LOWER_DIAG
        GGML_TRI_TYPE_LOWER

    enum ggml_sort_order:
        GGML_SORT_ORDER_ASC
        GGML_SORT_ORDER_DESC

    enum: GGML_N_TASKS_MAX
    ctypedef void (*ggml_custom1_op_t)(ggml_tensor * dst, const ggml_tensor * a, int ith, int nth,
                                       void * userdata) noexcept nogil
    ctypedef void (*ggml_custom2_op_t)(ggml_tensor * dst, const ggml_tensor * a, const ggml_tensor * b, int ith,
                                       int nth, void * userdata) noexcept nogil
    ctypedef void (*ggml_custom3_op_t)(ggml_tensor * dst, const ggml_tensor * a, const ggml_tensor * b,
                                       const ggml_tensor * c, int ith, int nth, void * userdata) noexcept nogil
    ctypedef void (*ggml_custom_op_t)(ggml_tensor * dst, int ith, int nth, void * userdata) noexcept nogil

    ggml_tensor * ggml_view_tensor(ggml_context * ctx, ggml_tensor * src)
    ggml_tensor * ggml_dup(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_dup_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_add(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_add_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_add_cast(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_type type)
    ggml_tensor * ggml_add_id(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * ids)
    ggml_tensor * ggml_acc(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t nb1, size_t nb2, size_t nb3,
                           size_t offset)
    ggml_tensor * ggml_acc_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t nb1, size_t nb2,
                                   size_t nb3, size_t offset)
    ggml_tensor * ggml_sub(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_sub_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_mul(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_mul_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_div(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_div_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_sqr(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sqr_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sqrt(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sqrt_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_log(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_log_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_expm1(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_expm1_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_softplus(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_softplus_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sin(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sin_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_cos(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_cos_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sum(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sum_rows(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_cumsum(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_mean(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_argmax(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_count_equal(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_repeat(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_repeat_4d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2,
                                 int64_t ne3)
    ggml_tensor * ggml_repeat_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_concat(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int dim)
    ggml_tensor * ggml_abs(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_abs_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sgn(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sgn_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_neg(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_neg_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_step(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_step_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_tanh(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_tanh_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_elu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_elu_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_relu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_leaky_relu(ggml_context * ctx, ggml_tensor * a, float negative_slope, bool inplace)
    ggml_tensor * ggml_relu_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sigmoid(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_sigmoid_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_gelu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_gelu_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_gelu_erf(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_gelu_erf_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_gelu_quick(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_gelu_quick_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_silu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_silu_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_silu_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_hardswish(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_hardsigmoid(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_exp(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_exp_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_floor(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_floor_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_ceil(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_ceil_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_round(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_round_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_trunc(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_trunc_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_xielu(ggml_context * ctx, ggml_tensor * a, float alpha_n, float alpha_p, float beta, float eps)
    ggml_tensor * ggml_glu(ggml_context * ctx, ggml_tensor * a, ggml_glu_op op, bool swapped)
    ggml_tensor * ggml_reglu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_reglu_swapped(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_geglu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_geglu_swapped(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_swiglu(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_swiglu_swapped(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_geglu_erf(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_geglu_erf_swapped(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_geglu_quick(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_geglu_quick_swapped(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_glu_split(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_glu_op op)
    ggml_tensor * ggml_reglu_split(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_geglu_split(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_swiglu_split(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_geglu_erf_split(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_geglu_quick_split(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_swiglu_oai(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, float alpha, float limit)
    ggml_tensor * ggml_swiglu_clamp(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, float limit)
    ggml_tensor * ggml_norm(ggml_context * ctx, ggml_tensor * a, float eps)
    ggml_tensor * ggml_norm_inplace(ggml_context * ctx, ggml_tensor * a, float eps)
    ggml_tensor * ggml_rms_norm(ggml_context * ctx, ggml_tensor * a, float eps)
    ggml_tensor * ggml_rms_norm_inplace(ggml_context * ctx, ggml_tensor * a, float eps)
    ggml_tensor * ggml_group_norm(ggml_context * ctx, ggml_tensor * a, int n_groups, float eps)
    ggml_tensor * ggml_group_norm_inplace(ggml_context * ctx, ggml_tensor * a, int n_groups, float eps)
    ggml_tensor * ggml_l2_norm(ggml_context * ctx, ggml_tensor * a, float eps)
    ggml_tensor * ggml_l2_norm_inplace(ggml_context * ctx, ggml_tensor * a, float eps)
    ggml_tensor * ggml_rms_norm_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, float eps)
    bool ggml_prec_set_acc(ggml_tensor * a, ggml_prec prec)
    bool ggml_prec_set_src(ggml_tensor * a, ggml_prec prec, int idx)
    ggml_tensor * ggml_mul_mat(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    void ggml_mul_mat_set_hint(ggml_tensor * a, ggml_op_hint hint)
    ggml_tensor * ggml_mul_mat_id(ggml_context * ctx, ggml_tensor * as_, ggml_tensor * b, ggml_tensor * ids)
    ggml_tensor * ggml_out_prod(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_scale(ggml_context * ctx, ggml_tensor * a, float s)
    ggml_tensor * ggml_scale_inplace(ggml_context * ctx, ggml_tensor * a, float s)
    ggml_tensor * ggml_scale_bias(ggml_context * ctx, ggml_tensor * a, float s, float b)
    ggml_tensor * ggml_scale_bias_inplace(ggml_context * ctx, ggml_tensor * a, float s, float b)
    ggml_tensor * ggml_set(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t nb1, size_t nb2, size_t nb3,
                           size_t offset)
    ggml_tensor * ggml_set_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t nb1, size_t nb2,
                                   size_t nb3, size_t offset)
    ggml_tensor * ggml_set_1d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t offset)
    ggml_tensor * ggml_set_1d_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t offset)
    ggml_tensor * ggml_set_2d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t nb1, size_t offset)
    ggml_tensor * ggml_set_2d_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, size_t nb1, size_t offset)
    ggml_tensor * ggml_cpy(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_cast(ggml_context * ctx, ggml_tensor * a, ggml_type type)
    ggml_tensor * ggml_cont(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_cont_4d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2,
                               int64_t ne3)
    ggml_tensor * ggml_reshape_4d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2,
                                  int64_t ne3)
    ggml_tensor * ggml_view_4d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2,
                               int64_t ne3, size_t nb1, size_t nb2, size_t nb3, size_t offset)
    ggml_tensor * ggml_permute(ggml_context * ctx, ggml_tensor * a, int axis0, int axis1, int axis2, int axis3)
    ggml_tensor * ggml_transpose(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_get_rows(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_get_rows_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c)
    ggml_tensor * ggml_set_rows(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c)
    ggml_tensor * ggml_diag(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_diag_mask_inf(ggml_context * ctx, ggml_tensor * a, int n_past)
    ggml_tensor * ggml_diag_mask_inf_inplace(ggml_context * ctx, ggml_tensor * a, int n_past)
    ggml_tensor * ggml_diag_mask_zero(ggml_context * ctx, ggml_tensor * a, int n_past)
    ggml_tensor * ggml_diag_mask_zero_inplace(ggml_context * ctx, ggml_tensor * a, int n_past)
    ggml_tensor * ggml_clamp(ggml_context * ctx, ggml_tensor * a, float min, float max)
    ggml_tensor * ggml_clamp_inplace(ggml_context * ctx, ggml_tensor * a, float min, float max)
    ggml_tensor * ggml_soft_max(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_soft_max_inplace(ggml_context * ctx, ggml_tensor * a)
    ggml_tensor * ggml_soft_max_ext(ggml_context * ctx, ggml_tensor * a, ggml_tensor * mask, float scale,
                                    float max_bias)
    ggml_tensor * ggml_soft_max_ext_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * mask, float scale,
                                            float max_bias)
    void ggml_soft_max_add_sinks(ggml_tensor * a, ggml_tensor * sinks)
    ggml_tensor * ggml_soft_max_ext_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, float scale,
                                         float max_bias)
    ggml_tensor * ggml_soft_max_ext_back_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, float scale,
                                                 float max_bias)
    ggml_tensor * ggml_rope(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int n_dims, int mode)
    ggml_tensor * ggml_rope_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int n_dims, int mode)
    ggml_tensor * ggml_rope_ext(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims,
                                int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor,
                                float attn_factor, float beta_fast, float beta_slow)
    ggml_tensor * ggml_rope_multi(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims,
                                  int sections[4], int mode, int n_ctx_orig, float freq_base, float freq_scale,
                                  float ext_factor, float attn_factor, float beta_fast, float beta_slow)
    ggml_tensor * ggml_rope_ext_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
                                        int n_dims, int mode, int n_ctx_orig, float freq_base, float freq_scale,
                                        float ext_factor, float attn_factor, float beta_fast, float beta_slow)
    ggml_tensor * ggml_rope_multi_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
                                          int n_dims, int sections[4], int mode, int n_ctx_orig, float freq_base,
                                          float freq_scale, float ext_factor, float attn_factor, float beta_fast,
                                          float beta_slow)
    ggml_tensor * ggml_rope_ext_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
                                     int n_dims, int mode, int n_ctx_orig, float freq_base, float freq_scale,
                                     float ext_factor, float attn_factor, float beta_fast, float beta_slow)
    ggml_tensor * ggml_rope_multi_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
                                       int n_dims, int sections[4], int mode, int n_ctx_orig, float freq_base,
                                       float freq_scale, float ext_factor, float attn_factor, float beta_fast,
                                       float beta_slow)
    ggml_tensor * ggml_rope_set_offset(ggml_tensor * a, int n_offs)
    ggml_tensor * ggml_im2col(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int s1, int p0, int p1,
                              int d0, int d1, bool is_2D, ggml_type dst_type)
    ggml_tensor * ggml_im2col_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int64_t * ne, int s0, int s1,
                                   int p0, int p1, int d0, int d1, bool is_2D)
    ggml_tensor * ggml_col2im_1d(ggml_context * ctx, ggml_tensor * a, int s0, int oc, int p0)
    ggml_tensor * ggml_conv_1d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int p0, int d0)
    ggml_tensor * ggml_conv_1d_ph(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s, int d)
    ggml_tensor * ggml_conv_1d_dw(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int p0, int d0)
    ggml_tensor * ggml_conv_1d_dw_ph(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int d0)
    ggml_tensor * ggml_conv_transpose_1d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int p0, int d0)
    ggml_tensor * ggml_conv_2d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int s1, int p0, int p1,
                               int d0, int d1)
    ggml_tensor * ggml_im2col_3d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int64_t IC, int s0, int s1,
                                 int s2, int p0, int p1, int p2, int d0, int d1, int d2, ggml_type dst_type)
    ggml_tensor * ggml_conv_3d(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int64_t IC, int s0, int s1,
                               int s2, int p0, int p1, int p2, int d0, int d1, int d2)
    ggml_tensor * ggml_conv_2d_sk_p0(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_conv_2d_s1_ph(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_conv_2d_dw(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int s1, int p0,
                                  int p1, int d0, int d1)
    ggml_tensor * ggml_conv_2d_dw_direct(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int stride0,
                                         int stride1, int pad0, int pad1, int dilation0, int dilation1)
    ggml_tensor * ggml_conv_transpose_2d_p0(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int stride)
    ggml_tensor * ggml_conv_2d_direct(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int s1, int p0,
                                      int p1, int d0, int d1)
    ggml_tensor * ggml_conv_3d_direct(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int s0, int s1, int s2,
                                      int p0, int p1, int p2, int d0, int d1, int d2, int n_channels, int n_batch,
                                      int n_channels_out)
    ggml_tensor * ggml_pool_1d(ggml_context * ctx, ggml_tensor * a, ggml_op_pool op, int k0, int s0, int p0)
    ggml_tensor * ggml_pool_2d(ggml_context * ctx, ggml_tensor * a, ggml_op_pool op, int k0, int k1, int s0, int s1,
                               float p0, float p1)
    ggml_tensor * ggml_pool_2d_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * af, ggml_op_pool op, int k0,
                                    int k1, int s0, int s1, float p0, float p1)
    ggml_tensor * ggml_upscale(ggml_context * ctx, ggml_tensor * a, int scale_factor, ggml_scale_mode mode)
    ggml_tensor * ggml_interpolate(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2,
                                   int64_t ne3, uint32_t mode)
    ggml_tensor * ggml_pad(ggml_context * ctx, ggml_tensor * a, int p0, int p1, int p2, int p3)
    ggml_tensor * ggml_pad_circular(ggml_context * ctx, ggml_tensor * a, int p0, int p1, int p2, int p3)
    ggml_tensor * ggml_pad_ext(ggml_context * ctx, ggml_tensor * a, int lp0, int rp0, int lp1, int rp1, int lp2,
                               int rp2, int lp3, int rp3)
    ggml_tensor * ggml_pad_ext_circular(ggml_context * ctx, ggml_tensor * a, int lp0, int rp0, int lp1, int rp1,
                                        int lp2, int rp2, int lp3, int rp3)
    ggml_tensor * ggml_pad_reflect_1d(ggml_context * ctx, ggml_tensor * a, int p0, int p1)
    ggml_tensor * ggml_roll(ggml_context * ctx, ggml_tensor * a, int shift0, int shift1, int shift2, int shift3)
    ggml_tensor * ggml_tri(ggml_context * ctx, ggml_tensor * a, ggml_tri_type type)
    ggml_tensor * ggml_fill(ggml_context * ctx, ggml_tensor * a, float c)
    ggml_tensor * ggml_fill_inplace(ggml_context * ctx, ggml_tensor * a, float c)
    ggml_tensor * ggml_timestep_embedding(ggml_context * ctx, ggml_tensor * timesteps, int dim, int max_period)
    ggml_tensor * ggml_argsort(ggml_context * ctx, ggml_tensor * a, ggml_sort_order order)
    ggml_tensor * ggml_argsort_top_k(ggml_context * ctx, ggml_tensor * a, int k)
    ggml_tensor * ggml_top_k(ggml_context * ctx, ggml_tensor * a, int k)
    ggml_tensor * ggml_arange(ggml_context * ctx, float start, float stop, float step)
    ggml_tensor * ggml_flash_attn_ext(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                      ggml_tensor * mask, float scale, float max_bias, float logit_softcap)
    ggml_prec ggml_flash_attn_ext_get_prec(const ggml_tensor * a)
    void ggml_flash_attn_ext_set_n_kv_max(ggml_tensor * a, int32_t n_kv_max)
    void ggml_flash_attn_ext_add_sinks(ggml_tensor * a, ggml_tensor * sinks)
    ggml_tensor * ggml_ssm_conv(ggml_context * ctx, ggml_tensor * sx, ggml_tensor * c)
    ggml_tensor * ggml_ssm_scan(ggml_context * ctx, ggml_tensor * s, ggml_tensor * x, ggml_tensor * dt,
                                ggml_tensor * A, ggml_tensor * B, ggml_tensor * C, ggml_tensor * ids, int64_t K)
    ggml_tensor * ggml_win_part(ggml_context * ctx, ggml_tensor * a, int w)
    ggml_tensor * ggml_win_unpart(ggml_context * ctx, ggml_tensor * a, int w0, int h0, int w)
    ggml_tensor * ggml_unary(ggml_context * ctx, ggml_tensor * a, ggml_unary_op op)
    ggml_tensor * ggml_unary_inplace(ggml_context * ctx, ggml_tensor * a, ggml_unary_op op)
    ggml_tensor * ggml_get_rel_pos(ggml_context * ctx, ggml_tensor * a, int qh, int kh)
    ggml_tensor * ggml_add_rel_pos(ggml_context * ctx, ggml_tensor * a, ggml_tensor * pw, ggml_tensor * ph)
    ggml_tensor * ggml_add_rel_pos_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * pw, ggml_tensor * ph)
    ggml_tensor * ggml_rwkv_wkv6(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * r,
                                 ggml_tensor * tf, ggml_tensor * td, ggml_tensor * state)
    ggml_tensor * ggml_gated_linear_attn(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * q,
                                         ggml_tensor * g, ggml_tensor * state, float scale)
    ggml_tensor * ggml_rwkv_wkv7(ggml_context * ctx, ggml_tensor * r, ggml_tensor * w, ggml_tensor * k,
                                 ggml_tensor * v, ggml_tensor * a, ggml_tensor * b, ggml_tensor * state)
    ggml_tensor * ggml_solve_tri(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, bool left, bool lower,
                                 bool uni)
    ggml_tensor * ggml_gated_delta_net(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                       ggml_tensor * g, ggml_tensor * beta, ggml_tensor * state, int64_t K)
    ggml_tensor * ggml_lightning_indexer(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * weights,
                                         ggml_tensor * mask)
    ggml_tensor * ggml_dsv4_hc_comb(ggml_context * ctx, ggml_tensor * mixes, ggml_tensor * scale, ggml_tensor * base,
                                    float eps, int32_t n_iter)
    ggml_tensor * ggml_dsv4_hc_pre(ggml_context * ctx, ggml_tensor * x, ggml_tensor * weights)
    ggml_tensor * ggml_dsv4_hc_pre_gated(ggml_context * ctx, ggml_tensor * x, ggml_tensor * gate, float scale)
    ggml_tensor * ggml_dsv4_hc_post(ggml_context * ctx, ggml_tensor * x, ggml_tensor * residual, ggml_tensor * post,
                                    ggml_tensor * comb)
    ggml_tensor * ggml_map_custom1(ggml_context * ctx, ggml_tensor * a, ggml_custom1_op_t fun, int n_tasks,
                                   void * userdata)
    ggml_tensor * ggml_map_custom1_inplace(ggml_context * ctx, ggml_tensor * a, ggml_custom1_op_t fun, int n_tasks,
                                           void * userdata)
    ggml_tensor * ggml_map_custom2(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_custom2_op_t fun,
                                   int n_tasks, void * userdata)
    ggml_tensor * ggml_map_custom2_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b,
                                           ggml_custom2_op_t fun, int n_tasks, void * userdata)
    ggml_tensor * ggml_map_custom3(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
                                   ggml_custom3_op_t fun, int n_tasks, void * userdata)
    ggml_tensor * ggml_map_custom3_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
                                           ggml_custom3_op_t fun, int n_tasks, void * userdata)
    ggml_tensor * ggml_custom_4d(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2,
                                 int64_t ne3, ggml_tensor ** args, int n_args, ggml_custom_op_t fun, int n_tasks,
                                 void * userdata)
    ggml_tensor * ggml_custom_inplace(ggml_context * ctx, ggml_tensor * a, ggml_tensor ** args, int n_args,
                                      ggml_custom_op_t fun, int n_tasks, void * userdata)
    ggml_tensor * ggml_cross_entropy_loss(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b)
    ggml_tensor * ggml_cross_entropy_loss_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c)
    ggml_tensor * ggml_opt_step_adamw(ggml_context * ctx, ggml_tensor * a, ggml_tensor * grad, ggml_tensor * m,
                                      ggml_tensor * v, ggml_tensor * adamw_params)
    ggml_tensor * ggml_opt_step_sgd(ggml_context * ctx, ggml_tensor * a, ggml_tensor * grad, ggml_tensor * sgd_params)
