"""What we call of ggml-opt.h; the types are libggml's."""

from libc.stdint cimport int32_t, int64_t

from pyggml_adapt.ggml.libggml cimport *

cdef extern from "ggml-opt.h" nogil:
    struct ggml_opt_dataset:
        pass
    struct ggml_opt_context:
        pass
    struct ggml_opt_result:
        pass
    ctypedef ggml_opt_dataset * ggml_opt_dataset_t
    ctypedef ggml_opt_context * ggml_opt_context_t
    ctypedef ggml_opt_result * ggml_opt_result_t

    enum ggml_opt_loss_type:
        GGML_OPT_LOSS_TYPE_MEAN
        GGML_OPT_LOSS_TYPE_SUM
        GGML_OPT_LOSS_TYPE_CROSS_ENTROPY
        GGML_OPT_LOSS_TYPE_MEAN_SQUARED_ERROR

    enum ggml_opt_build_type:
        GGML_OPT_BUILD_TYPE_FORWARD
        GGML_OPT_BUILD_TYPE_GRAD
        GGML_OPT_BUILD_TYPE_OPT

    enum ggml_opt_optimizer_type:
        GGML_OPT_OPTIMIZER_TYPE_ADAMW
        GGML_OPT_OPTIMIZER_TYPE_SGD

    struct ggml_opt_adamw_params "__typeof__(((struct ggml_opt_optimizer_params *) 0)->adamw)":
        float alpha
        float beta1
        float beta2
        float eps
        float wd

    struct ggml_opt_sgd_params "__typeof__(((struct ggml_opt_optimizer_params *) 0)->sgd)":
        float alpha
        float wd

    struct ggml_opt_optimizer_params:
        ggml_opt_adamw_params adamw
        ggml_opt_sgd_params sgd

    ctypedef ggml_opt_optimizer_params (*ggml_opt_get_optimizer_params)(void * userdata) noexcept nogil

    struct ggml_opt_params:
        ggml_backend_sched_t backend_sched
        ggml_context * ctx_compute
        ggml_tensor * inputs
        ggml_tensor * outputs
        ggml_opt_loss_type loss_type
        ggml_opt_build_type build_type
        int32_t opt_period
        ggml_opt_get_optimizer_params get_opt_pars
        void * get_opt_pars_ud
        ggml_opt_optimizer_type optimizer

    ggml_opt_dataset_t ggml_opt_dataset_init(ggml_type type_data, ggml_type type_label, int64_t ne_datapoint,
                                             int64_t ne_label, int64_t ndata, int64_t ndata_shard)
    void ggml_opt_dataset_free(ggml_opt_dataset_t dataset)
    int64_t ggml_opt_dataset_ndata(ggml_opt_dataset_t dataset)
    ggml_tensor * ggml_opt_dataset_data(ggml_opt_dataset_t dataset)
    ggml_tensor * ggml_opt_dataset_labels(ggml_opt_dataset_t dataset)
    void ggml_opt_dataset_shuffle(ggml_opt_context_t opt_ctx, ggml_opt_dataset_t dataset, int64_t idata)
    void ggml_opt_dataset_get_batch(ggml_opt_dataset_t dataset, ggml_tensor * data_batch, ggml_tensor * labels_batch,
                                    int64_t ibatch)
    void ggml_opt_dataset_get_batch_host(ggml_opt_dataset_t dataset, void * data_batch, size_t nb_data_batch,
                                         void * labels_batch, int64_t ibatch)

    ggml_opt_optimizer_params ggml_opt_get_default_optimizer_params(void * userdata) noexcept
    ggml_opt_optimizer_params ggml_opt_get_constant_optimizer_params(void * userdata) noexcept
    ggml_opt_params ggml_opt_default_params(ggml_backend_sched_t backend_sched, ggml_opt_loss_type loss_type)
    ggml_opt_context_t ggml_opt_init(ggml_opt_params params)
    void ggml_opt_free(ggml_opt_context_t opt_ctx)
    void ggml_opt_reset(ggml_opt_context_t opt_ctx, bool optimizer)
    ggml_tensor * ggml_opt_labels(ggml_opt_context_t opt_ctx)
    ggml_tensor * ggml_opt_loss(ggml_opt_context_t opt_ctx)
    ggml_tensor * ggml_opt_pred(ggml_opt_context_t opt_ctx)
    ggml_tensor * ggml_opt_ncorrect(ggml_opt_context_t opt_ctx)
    ggml_tensor * ggml_opt_grad_acc(ggml_opt_context_t opt_ctx, ggml_tensor * node)

    ggml_opt_result_t ggml_opt_result_init()
    void ggml_opt_result_free(ggml_opt_result_t result)
    void ggml_opt_result_reset(ggml_opt_result_t result)
    void ggml_opt_result_loss(ggml_opt_result_t result, double * loss, double * unc)
    void ggml_opt_result_pred(ggml_opt_result_t result, int32_t * pred)
    void ggml_opt_result_accuracy(ggml_opt_result_t result, double * accuracy, double * unc)

    void ggml_opt_prepare_alloc(ggml_opt_context_t opt_ctx, ggml_context * ctx_compute, ggml_cgraph * gf,
                                ggml_tensor * inputs, ggml_tensor * outputs)
    void ggml_opt_alloc(ggml_opt_context_t opt_ctx, bool backward)
    void ggml_opt_eval(ggml_opt_context_t opt_ctx, ggml_opt_result_t result)
