"""What we call of gguf.h, and ggml_log_get, which only gguf.pyx needs."""

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyggml_adapt.ggml.libggml cimport bool, ggml_log_callback, ggml_tensor, ggml_type

cdef extern from "ggml.h" nogil:
    void ggml_log_get(ggml_log_callback * log_callback, void ** user_data)

cdef extern from "gguf.h" nogil:
    enum: GGUF_VERSION
    enum: GGUF_DEFAULT_ALIGNMENT

    enum gguf_type:
        GGUF_TYPE_UINT8
        GGUF_TYPE_INT8
        GGUF_TYPE_UINT16
        GGUF_TYPE_INT16
        GGUF_TYPE_UINT32
        GGUF_TYPE_INT32
        GGUF_TYPE_FLOAT32
        GGUF_TYPE_BOOL
        GGUF_TYPE_STRING
        GGUF_TYPE_ARRAY
        GGUF_TYPE_UINT64
        GGUF_TYPE_INT64
        GGUF_TYPE_FLOAT64

    struct gguf_context:
        pass

    struct gguf_init_params:
        bool no_alloc
        void * ctx  # a ggml_context **, always NULL here

    ctypedef size_t (*gguf_reader_callback_t)(void * userdata, void * output, uint64_t offset, size_t n) noexcept nogil

    gguf_context * gguf_init_empty()
    gguf_context * gguf_init_from_buffer(const void * data, size_t size, gguf_init_params params)
    gguf_context * gguf_init_from_callback(gguf_reader_callback_t callback, void * userdata, size_t max_chunk_read,
                                           uint64_t max_expected_size, gguf_init_params params)
    void gguf_free(gguf_context * ctx)

    uint32_t gguf_get_version(const gguf_context * ctx)
    size_t gguf_get_alignment(const gguf_context * ctx)
    size_t gguf_get_data_offset(const gguf_context * ctx)

    int64_t gguf_get_n_kv(const gguf_context * ctx)
    const char * gguf_get_key(const gguf_context * ctx, int64_t key_id)
    gguf_type gguf_get_kv_type(const gguf_context * ctx, int64_t key_id)
    gguf_type gguf_get_arr_type(const gguf_context * ctx, int64_t key_id)
    const char * gguf_get_val_str(const gguf_context * ctx, int64_t key_id)
    const void * gguf_get_val_data(const gguf_context * ctx, int64_t key_id)
    size_t gguf_get_arr_n(const gguf_context * ctx, int64_t key_id)
    const void * gguf_get_arr_data(const gguf_context * ctx, int64_t key_id)
    const char * gguf_get_arr_str(const gguf_context * ctx, int64_t key_id, size_t i)

    int64_t gguf_get_n_tensors(const gguf_context * ctx)
    const char * gguf_get_tensor_name(const gguf_context * ctx, int64_t tensor_id)
    size_t gguf_get_tensor_offset(const gguf_context * ctx, int64_t tensor_id)
    const int64_t * gguf_get_tensor_ne(const gguf_context * ctx, int64_t tensor_id)
    ggml_type gguf_get_tensor_type(const gguf_context * ctx, int64_t tensor_id)

    int64_t gguf_remove_key(gguf_context * ctx, const char * key)
    void gguf_set_val_u8(gguf_context * ctx, const char * key, uint8_t val)
    void gguf_set_val_i8(gguf_context * ctx, const char * key, int8_t val)
    void gguf_set_val_u16(gguf_context * ctx, const char * key, uint16_t val)
    void gguf_set_val_i16(gguf_context * ctx, const char * key, int16_t val)
    void gguf_set_val_u32(gguf_context * ctx, const char * key, uint32_t val)
    void gguf_set_val_i32(gguf_context * ctx, const char * key, int32_t val)
    void gguf_set_val_f32(gguf_context * ctx, const char * key, float val)
    void gguf_set_val_u64(gguf_context * ctx, const char * key, uint64_t val)
    void gguf_set_val_i64(gguf_context * ctx, const char * key, int64_t val)
    void gguf_set_val_f64(gguf_context * ctx, const char * key, double val)
    void gguf_set_val_bool(gguf_context * ctx, const char * key, bool val)
    void gguf_set_val_str(gguf_context * ctx, const char * key, const char * val)
    void gguf_set_arr_data(gguf_context * ctx, const char * key, gguf_type type, const void * data, size_t n)
    void gguf_set_arr_str(gguf_context * ctx, const char * key, const char ** data, size_t n)

    void gguf_add_tensor(gguf_context * ctx, const ggml_tensor * tensor)
    size_t gguf_get_meta_size(const gguf_context * ctx)
    void gguf_get_meta_data(const gguf_context * ctx, void * data)
