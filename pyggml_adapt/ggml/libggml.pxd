"""What we call of ggml.h, ggml-alloc.h and ggml-backend.h; nothing else is declared."""

from libc.stdint cimport int32_t, int64_t, uint32_t

cdef extern from "stdbool.h" nogil:
    ctypedef bint bool

cdef extern from "ggml.h" nogil:
    enum: GGML_MAX_DIMS
    enum: GGML_MAX_NAME
    enum: GGML_MAX_SRC
    enum: GGML_MAX_N_THREADS
    enum: GGML_ROPE_TYPE_NORMAL
    enum: GGML_ROPE_TYPE_NEOX
    enum: GGML_ROPE_TYPE_MROPE
    enum: GGML_ROPE_TYPE_VISION
    enum: GGML_ROPE_TYPE_IMROPE

    enum ggml_status:
        GGML_STATUS_ALLOC_FAILED
        GGML_STATUS_FAILED
        GGML_STATUS_SUCCESS
        GGML_STATUS_ABORTED

    enum ggml_type:
        GGML_TYPE_F32
        GGML_TYPE_F16
        GGML_TYPE_BF16
        GGML_TYPE_Q8_1
        GGML_TYPE_Q8_K
        GGML_TYPE_IQ2_XXS
        GGML_TYPE_IQ2_XS
        GGML_TYPE_IQ3_XXS
        GGML_TYPE_IQ1_S
        GGML_TYPE_IQ3_S
        GGML_TYPE_IQ2_S
        GGML_TYPE_IQ1_M
        GGML_TYPE_I32
        GGML_TYPE_I64
        GGML_TYPE_COUNT

    enum ggml_op:
        GGML_OP_NONE
        GGML_OP_DUP
        GGML_OP_ADD
        GGML_OP_ADD_ID
        GGML_OP_ADD1
        GGML_OP_ACC
        GGML_OP_FILL
        GGML_OP_SUB
        GGML_OP_MUL
        GGML_OP_DIV
        GGML_OP_SQR
        GGML_OP_SQRT
        GGML_OP_LOG
        GGML_OP_SIN
        GGML_OP_COS
        GGML_OP_SUM
        GGML_OP_SUM_ROWS
        GGML_OP_MEAN
        GGML_OP_ARGMAX
        GGML_OP_REPEAT
        GGML_OP_REPEAT_BACK
        GGML_OP_RMS_NORM
        GGML_OP_MUL_MAT
        GGML_OP_MUL_MAT_ID
        GGML_OP_SCALE
        GGML_OP_SET
        GGML_OP_CPY
        GGML_OP_CONT
        GGML_OP_RESHAPE
        GGML_OP_VIEW
        GGML_OP_PERMUTE
        GGML_OP_TRANSPOSE
        GGML_OP_GET_ROWS
        GGML_OP_GET_ROWS_BACK
        GGML_OP_SET_ROWS
        GGML_OP_DIAG_MASK_INF
        GGML_OP_DIAG_MASK_ZERO
        GGML_OP_SOFT_MAX
        GGML_OP_ROPE
        GGML_OP_IM2COL
        GGML_OP_IM2COL_BACK
        GGML_OP_CONV_2D
        GGML_OP_CONV_3D
        GGML_OP_CONV_TRANSPOSE_1D
        GGML_OP_CONV_TRANSPOSE_2D
        GGML_OP_POOL_2D
        GGML_OP_ARGSORT
        GGML_OP_TOP_K
        GGML_OP_SSM_SCAN
        GGML_OP_UNARY
        GGML_OP_MAP_CUSTOM1
        GGML_OP_MAP_CUSTOM2
        GGML_OP_MAP_CUSTOM3
        GGML_OP_CUSTOM
        GGML_OP_CROSS_ENTROPY_LOSS
        GGML_OP_OPT_STEP_ADAMW
        GGML_OP_OPT_STEP_SGD
        GGML_OP_GLU
        GGML_OP_ROPE_BACK
        GGML_OP_FLASH_ATTN_EXT
        GGML_OP_GATED_DELTA_NET

    enum ggml_prec:
        GGML_PREC_UNDEFINED
        GGML_PREC_F32
        GGML_PREC_BF16
        GGML_PREC_F16
        GGML_PREC_Q8
        GGML_PREC_Q4

    enum ggml_op_hint:
        GGML_HINT_NONE
        GGML_HINT_SRC0_IS_HADAMARD

    enum ggml_tensor_flag:
        GGML_TENSOR_FLAG_INPUT
        GGML_TENSOR_FLAG_OUTPUT
        GGML_TENSOR_FLAG_PARAM
        GGML_TENSOR_FLAG_LOSS

    enum ggml_sched_priority:
        GGML_SCHED_PRIO_LOW
        GGML_SCHED_PRIO_NORMAL
        GGML_SCHED_PRIO_MEDIUM
        GGML_SCHED_PRIO_HIGH
        GGML_SCHED_PRIO_REALTIME

    enum ggml_log_level:
        GGML_LOG_LEVEL_DEBUG
        GGML_LOG_LEVEL_INFO
        GGML_LOG_LEVEL_WARN
        GGML_LOG_LEVEL_ERROR
        GGML_LOG_LEVEL_CONT

    struct ggml_context:
        pass
    struct ggml_cgraph:
        pass
    struct ggml_backend_buffer:
        pass

    struct ggml_init_params:
        size_t mem_size
        void * mem_buffer
        bool no_alloc

    struct ggml_tensor:
        ggml_type type
        ggml_backend_buffer * buffer
        int64_t ne[4]
        size_t nb[4]
        ggml_op op
        int32_t op_params[16]
        int32_t flags
        ggml_tensor * src[10]
        ggml_tensor * view_src
        size_t view_offs
        void * data
        char name[64]
        void * extra

    ctypedef void (*ggml_to_float_t)(const void * x, float * y, int64_t k)

    struct ggml_type_traits:
        const char * type_name
        int64_t blck_size
        size_t type_size
        bool is_quantized
        ggml_to_float_t to_float

    ctypedef void (*ggml_log_callback)(ggml_log_level level, const char * text, void * user_data) noexcept nogil
    ctypedef bool (*ggml_abort_callback)(void * data) noexcept nogil

    const char * ggml_version()
    const char * ggml_status_to_string(ggml_status status)
    void ggml_log_set(ggml_log_callback log_callback, void * user_data)

    const ggml_type_traits * ggml_get_type_traits(ggml_type type)
    const char * ggml_type_name(ggml_type type)
    int64_t ggml_blck_size(ggml_type type)
    size_t ggml_type_size(ggml_type type)
    size_t ggml_row_size(ggml_type type, int64_t ne)
    bool ggml_is_quantized(ggml_type type)
    bool ggml_quantize_requires_imatrix(ggml_type type)
    size_t ggml_quantize_chunk(ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows,
                               int64_t n_per_row, const float * imatrix)
    bool ggml_validate_row_data(ggml_type type, const void * data, size_t nbytes)

    ggml_context * ggml_init(ggml_init_params params)
    void ggml_free(ggml_context * ctx)
    size_t ggml_used_mem(const ggml_context * ctx)
    size_t ggml_tensor_overhead()
    size_t ggml_graph_overhead_custom(size_t size, bool grads)

    ggml_tensor * ggml_new_tensor(ggml_context * ctx, ggml_type type, int n_dims, const int64_t * ne)
    ggml_tensor * ggml_set_name(ggml_tensor * tensor, const char * name)
    void ggml_set_input(ggml_tensor * tensor)
    void ggml_set_output(ggml_tensor * tensor)

    void ggml_set_param(ggml_tensor * tensor)
    void ggml_set_loss(ggml_tensor * tensor)
    ggml_tensor * ggml_get_first_tensor(const ggml_context * ctx)
    ggml_tensor * ggml_get_next_tensor(const ggml_context * ctx, ggml_tensor * tensor)
    ggml_tensor * ggml_get_tensor(ggml_context * ctx, const char * name)

    const char * ggml_op_desc(const ggml_tensor * t)
    size_t ggml_nbytes(const ggml_tensor * tensor)
    int64_t ggml_nelements(const ggml_tensor * tensor)
    bool ggml_is_contiguous(const ggml_tensor * tensor)
    bool ggml_is_transposed(const ggml_tensor * tensor)
    bool ggml_are_same_shape(const ggml_tensor * t0, const ggml_tensor * t1)
    bool ggml_can_repeat(const ggml_tensor * t0, const ggml_tensor * t1)

    ggml_cgraph * ggml_new_graph_custom(ggml_context * ctx, size_t size, bool grads)
    void ggml_build_forward_expand(ggml_cgraph * cgraph, ggml_tensor * tensor)
    int ggml_graph_n_nodes(ggml_cgraph * cgraph)
    ggml_tensor ** ggml_graph_nodes(ggml_cgraph * cgraph)
    ggml_tensor * ggml_graph_node(ggml_cgraph * cgraph, int i)
    void ggml_graph_cpy(ggml_cgraph * src, ggml_cgraph * dst)
    void ggml_graph_reset(ggml_cgraph * cgraph)
    void ggml_graph_clear(ggml_cgraph * cgraph)
    void ggml_build_backward_expand(ggml_context * ctx, ggml_cgraph * cgraph, ggml_tensor ** grad_accs)
    ggml_tensor * ggml_graph_get_grad(const ggml_cgraph * cgraph, const ggml_tensor * node)
    ggml_tensor * ggml_graph_get_grad_acc(const ggml_cgraph * cgraph, const ggml_tensor * node)
    void ggml_graph_dump_dot(const ggml_cgraph * gb, const ggml_cgraph * cgraph, const char * filename)
    ggml_tensor * ggml_graph_get_tensor(const ggml_cgraph * cgraph, const char * name)

    struct ggml_threadpool:
        pass

    struct ggml_threadpool_params:
        bool cpumask[512]
        int n_threads
        ggml_sched_priority prio
        uint32_t poll
        bool strict_cpu
        bool paused

    ggml_threadpool_params ggml_threadpool_params_default(int n_threads)

cdef extern from "ggml-alloc.h" nogil:
    struct ggml_gallocr:
        pass
    struct ggml_backend_buffer_type:
        pass
    ctypedef ggml_gallocr * ggml_gallocr_t
    ctypedef ggml_backend_buffer_type * ggml_backend_buffer_type_t
    ggml_gallocr_t ggml_gallocr_new(ggml_backend_buffer_type_t buft)
    void ggml_gallocr_free(ggml_gallocr_t galloc)
    bool ggml_gallocr_reserve(ggml_gallocr_t galloc, ggml_cgraph * graph)
    ggml_backend_buffer * ggml_backend_alloc_ctx_tensors_from_buft(ggml_context * ctx, ggml_backend_buffer_type_t buft)
    size_t ggml_backend_alloc_ctx_tensors_from_buft_size(ggml_context * ctx, ggml_backend_buffer_type_t buft)
    bool ggml_gallocr_alloc_graph(ggml_gallocr_t galloc, ggml_cgraph * graph)
    size_t ggml_gallocr_get_buffer_size(ggml_gallocr_t galloc, int buffer_id)

cdef extern from "ggml-backend.h" nogil:
    struct ggml_backend:
        pass
    struct ggml_backend_device:
        pass
    struct ggml_backend_reg:
        pass
    struct ggml_backend_sched:
        pass
    struct ggml_backend_event:
        pass
    ctypedef ggml_backend_buffer * ggml_backend_buffer_t
    ctypedef ggml_backend * ggml_backend_t
    ctypedef ggml_backend_device * ggml_backend_dev_t
    ctypedef ggml_backend_reg * ggml_backend_reg_t
    ctypedef ggml_backend_sched * ggml_backend_sched_t
    ctypedef ggml_backend_event * ggml_backend_event_t
    ctypedef void * ggml_backend_graph_plan_t

    enum ggml_backend_buffer_usage:
        GGML_BACKEND_BUFFER_USAGE_ANY
        GGML_BACKEND_BUFFER_USAGE_WEIGHTS
        GGML_BACKEND_BUFFER_USAGE_COMPUTE

    enum ggml_backend_dev_type:
        GGML_BACKEND_DEVICE_TYPE_CPU
        GGML_BACKEND_DEVICE_TYPE_GPU
        GGML_BACKEND_DEVICE_TYPE_IGPU
        GGML_BACKEND_DEVICE_TYPE_ACCEL
        GGML_BACKEND_DEVICE_TYPE_META

    struct ggml_backend_dev_caps:
        bool async_ "async"
        bool host_buffer
        bool buffer_from_host_ptr
        bool events
        bool mmap_support

    struct ggml_backend_dev_props:
        const char * name
        const char * description
        size_t memory_free
        size_t memory_total
        const char * device_id
        ggml_backend_dev_caps caps

    const char * ggml_backend_buft_name(ggml_backend_buffer_type_t buft)
    ggml_backend_buffer_t ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size)
    size_t ggml_backend_buft_get_alignment(ggml_backend_buffer_type_t buft)
    size_t ggml_backend_buft_get_max_size(ggml_backend_buffer_type_t buft)
    size_t ggml_backend_buft_get_alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * tensor)
    ggml_backend_dev_t ggml_backend_buft_get_device(ggml_backend_buffer_type_t buft)
    bool ggml_backend_buft_is_host(ggml_backend_buffer_type_t buft)

    void ggml_backend_buffer_free(ggml_backend_buffer_t buffer)
    void * ggml_backend_buffer_get_base(ggml_backend_buffer_t buffer)
    size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t buffer)
    size_t ggml_backend_buffer_get_alloc_size(ggml_backend_buffer_t buffer, const ggml_tensor * tensor)
    bool ggml_backend_buffer_is_host(ggml_backend_buffer_t buffer)
    void ggml_backend_buffer_clear(ggml_backend_buffer_t buffer, unsigned char value)
    void ggml_backend_buffer_set_usage(ggml_backend_buffer_t buffer, ggml_backend_buffer_usage usage)
    ggml_backend_buffer_usage ggml_backend_buffer_get_usage(ggml_backend_buffer_t buffer)
    ggml_backend_buffer_type_t ggml_backend_buffer_get_type(ggml_backend_buffer_t buffer)
    const char * ggml_backend_buffer_name(ggml_backend_buffer_t buffer)
    ggml_status ggml_backend_tensor_alloc(ggml_backend_buffer_t buffer, ggml_tensor * tensor, void * addr)
    void ggml_backend_tensor_set(ggml_tensor * tensor, const void * data, size_t offset, size_t size)
    void ggml_backend_tensor_get(const ggml_tensor * tensor, void * data, size_t offset, size_t size)

    void ggml_backend_tensor_set_2d(ggml_tensor * tensor, const void * data, size_t offset, size_t size,
                                    size_t n_copies, size_t stride_tensor, size_t stride_data)
    void ggml_backend_tensor_get_2d(const ggml_tensor * tensor, void * data, size_t offset, size_t size,
                                    size_t n_copies, size_t stride_tensor, size_t stride_data)
    void ggml_backend_tensor_memset(ggml_tensor * tensor, unsigned char value, size_t offset, size_t size)
    void ggml_backend_tensor_copy(const ggml_tensor * src, ggml_tensor * dst)
    void ggml_backend_tensor_set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset,
                                       size_t size)
    void ggml_backend_tensor_get_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset,
                                       size_t size)
    void ggml_backend_tensor_copy_async(ggml_backend_t backend_src, ggml_backend_t backend_dst, const ggml_tensor * src,
                                        ggml_tensor * dst)
    void ggml_backend_synchronize(ggml_backend_t backend)
    ggml_backend_graph_plan_t ggml_backend_graph_plan_create(ggml_backend_t backend, ggml_cgraph * cgraph)
    void ggml_backend_graph_plan_free(ggml_backend_t backend, ggml_backend_graph_plan_t plan)
    ggml_status ggml_backend_graph_plan_compute(ggml_backend_t backend, ggml_backend_graph_plan_t plan)
    ggml_status ggml_backend_graph_compute_async(ggml_backend_t backend, ggml_cgraph * cgraph)
    bool ggml_backend_supports_buft(ggml_backend_t backend, ggml_backend_buffer_type_t buft)
    ggml_backend_event_t ggml_backend_event_new(ggml_backend_dev_t device)
    void ggml_backend_event_free(ggml_backend_event_t event)
    void ggml_backend_event_record(ggml_backend_event_t event, ggml_backend_t backend)
    void ggml_backend_event_synchronize(ggml_backend_event_t event)
    void ggml_backend_event_wait(ggml_backend_t backend, ggml_backend_event_t event)

    const char * ggml_backend_name(ggml_backend_t backend)
    void ggml_backend_free(ggml_backend_t backend)
    ggml_status ggml_backend_graph_compute(ggml_backend_t backend, ggml_cgraph * cgraph)
    bool ggml_backend_supports_op(ggml_backend_t backend, const ggml_tensor * op)

    const char * ggml_backend_dev_name(ggml_backend_dev_t device)
    const char * ggml_backend_dev_description(ggml_backend_dev_t device)
    void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)
    ggml_backend_dev_type ggml_backend_dev_get_type "ggml_backend_dev_type" (ggml_backend_dev_t device)
    void ggml_backend_dev_get_props(ggml_backend_dev_t device, ggml_backend_dev_props * props)
    ggml_backend_buffer_type_t ggml_backend_dev_host_buffer_type(ggml_backend_dev_t device)
    bool ggml_backend_dev_supports_op(ggml_backend_dev_t device, const ggml_tensor * op)
    bool ggml_backend_dev_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft)
    bool ggml_backend_dev_offload_op(ggml_backend_dev_t device, const ggml_tensor * op)
    ggml_backend_dev_t ggml_backend_dev_by_name(const char * name)
    ggml_backend_reg_t ggml_backend_load(const char * path)
    void ggml_backend_load_all_from_path(const char * dir_path)
    ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t device)
    ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t device, const char * params)
    ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device)
    const char * ggml_backend_reg_name(ggml_backend_reg_t reg)
    void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t reg, const char * name)
    size_t ggml_backend_reg_count()
    ggml_backend_reg_t ggml_backend_reg_get(size_t index)
    size_t ggml_backend_dev_count()
    ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    ggml_backend_buffer_t ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size)

    ctypedef void (*ggml_backend_set_n_threads_t)(ggml_backend_t backend, int n_threads)
    ctypedef void (*ggml_backend_set_abort_callback_t)(ggml_backend_t backend, ggml_abort_callback callback,
                                                       void * data)

    struct ggml_backend_feature:
        const char * name
        const char * value
    ctypedef ggml_backend_feature * (*ggml_backend_get_features_t)(ggml_backend_reg_t reg)

    ggml_backend_sched_t ggml_backend_sched_new(ggml_backend_t * backends, ggml_backend_buffer_type_t * bufts,
                                                int n_backends, size_t graph_size, bool parallel, bool op_offload)
    void ggml_backend_sched_free(ggml_backend_sched_t sched)
    bool ggml_backend_sched_alloc_graph(ggml_backend_sched_t sched, ggml_cgraph * graph)
    ggml_status ggml_backend_sched_graph_compute(ggml_backend_sched_t sched, ggml_cgraph * graph)
    int ggml_backend_sched_get_n_splits(ggml_backend_sched_t sched)
    int ggml_backend_sched_get_n_copies(ggml_backend_sched_t sched)
    bool ggml_backend_sched_reserve(ggml_backend_sched_t sched, ggml_cgraph * measure_graph)
    void ggml_backend_sched_reset(ggml_backend_sched_t sched)
    void ggml_backend_sched_synchronize(ggml_backend_sched_t sched)
    size_t ggml_backend_sched_get_buffer_size(ggml_backend_sched_t sched, ggml_backend_t backend)
    void ggml_backend_sched_set_tensor_backend(ggml_backend_sched_t sched, ggml_tensor * node, ggml_backend_t backend)
    ggml_backend_t ggml_backend_sched_get_tensor_backend(ggml_backend_sched_t sched, ggml_tensor * node)
    ggml_status ggml_backend_sched_graph_compute_async(ggml_backend_sched_t sched, ggml_cgraph * graph)

    ctypedef bool (*ggml_backend_sched_eval_callback)(ggml_tensor * t, bool ask, void * user_data) noexcept nogil
    void ggml_backend_sched_set_eval_callback(ggml_backend_sched_t sched, ggml_backend_sched_eval_callback callback,
                                              void * user_data)
