# What an OptContext is trained with, and what comes out; opt.pyx includes this.

_DTYPES = {np.dtype(code): type for code, type in (
    ("f4", Type.F32), ("f2", Type.F16), ("f8", Type.F64), ("i1", Type.I8), ("i2", Type.I16), ("i4", Type.I32),
    ("i8", Type.I64))}


cdef rows_of(array, str what):
    """Return a 2-D array in C order, one row for each datapoint, and its type."""
    array = np.asarray(array)
    if array.dtype not in _DTYPES:
        raise DTypeError(f"OptDataset: ggml has no type for {what} of {array.dtype}")
    if array.ndim < 1 or not array.size:
        raise ShapeError(f"OptDataset: {what} of shape {array.shape} have no datapoints")
    return np.ascontiguousarray(array).reshape(len(array), -1), _DTYPES[array.dtype]


@cython.final
cdef class OptDataset(Owner):
    """Own a copy of the datapoints to train with, and of their labels.

    data: an array of any shape whose first axis is the datapoints; its dtype is that of the inputs to come.  labels:
    the outputs that are wanted, as many, F32; None for the losses MEAN and SUM.  ndata_shard: how many datapoints stay
    together when shuffled.
    Raises: ShapeError if the numbers of datapoints differ or are no multiple of ndata_shard, DTypeError for dtypes that
    ggml does not have, AllocError.
    Wraps: ggml_opt_dataset_init, ggml_opt_dataset_free, ggml_opt_dataset_data, ggml_opt_dataset_labels.
    """

    cdef c.ggml_opt_dataset_t _ptr
    cdef readonly int64_t ndata_shard, ne_datapoint, ne_label
    cdef object _type_data, _type_label

    def __cinit__(self, data, labels=None, *, ndata_shard=1):
        data, self._type_data = rows_of(data, "data")
        self._type_label = Type.F32
        if labels is not None:
            labels, self._type_label = rows_of(labels, "labels")
            if len(labels) != len(data):
                raise ShapeError(f"OptDataset: {len(labels)} labels for {len(data)} datapoints")
        ndata_shard = index(ndata_shard)
        if ndata_shard < 1 or len(data) % ndata_shard:
            raise ShapeError(f"OptDataset: {len(data)} datapoints are not a multiple of ndata_shard = {ndata_shard}")
        if max(data.nbytes, 0 if labels is None else labels.nbytes) >= (1 << 62) // ndata_shard:
            raise ShapeError(f"OptDataset: ndata_shard = {ndata_shard} is too large")
        self.ndata_shard = ndata_shard
        self.ne_datapoint, self.ne_label = data.shape[1], 0 if labels is None else labels.shape[1]
        self._ptr = c.ggml_opt_dataset_init(<c.ggml_type> <int> self._type_data, <c.ggml_type> <int> self._type_label,
                                            self.ne_datapoint, self.ne_label, len(data), self.ndata_shard)
        if c.ggml_opt_dataset_data(self._ptr).data == NULL:
            raise AllocError(f"OptDataset: no memory for {len(data)} datapoints")
        fill(c.ggml_opt_dataset_data(self._ptr), data.reshape(-1).view(np.uint8))
        if labels is not None:
            fill(c.ggml_opt_dataset_labels(self._ptr), labels.reshape(-1).view(np.uint8))

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_opt_dataset_free(self._ptr)
            self._ptr = NULL

    @property
    def ndata(self):
        """Return the number of datapoints.  Wraps: ggml_opt_dataset_ndata."""
        self.check()
        return c.ggml_opt_dataset_ndata(self._ptr)

    def shuffle(self, OptContext opt not None, idata=-1):
        """Bring the shards in another order, by the random numbers of opt: the first idata datapoints, or all if -1.

        Raises: ShapeError if idata is more than ndata or no multiple of ndata_shard.
        Wraps: ggml_opt_dataset_shuffle.
        """
        cdef int64_t n = index(idata)
        self.check()
        check_idle(self)
        if n > self.ndata or n > 0 and n % self.ndata_shard:
            raise ShapeError(f"shuffle: {n} of {self.ndata} datapoints in shards of {self.ndata_shard}")
        c.ggml_opt_dataset_shuffle(opt._state.ptr(), self._ptr, n)

    def get_batch(self, ibatch, ndata_batch):
        """Return copies of batch ibatch: the data [ndata_batch, ne_datapoint], and the labels, None if there are none.

        Raises: ShapeError if ndata_batch is no multiple of ndata_shard; IndexError if there is no such batch.
        Wraps: ggml_opt_dataset_get_batch_host.
        """
        cdef unsigned char[::1] into, labels_into
        cdef void * at = NULL
        ibatch, ndata_batch = index(ibatch), index(ndata_batch)
        self.check()
        if ndata_batch < 1 or ndata_batch % self.ndata_shard:
            raise ShapeError(f"get_batch: batches of {ndata_batch} datapoints for shards of {self.ndata_shard}")
        if not 0 <= ibatch < self.ndata // ndata_batch:
            raise IndexError(f"batch {ibatch} of {self.ndata // ndata_batch}")
        data = np.empty((ndata_batch, self.ne_datapoint), _dtype(self._type_data))
        labels = np.empty((ndata_batch, self.ne_label), _dtype(self._type_label)) if self.ne_label else None
        into = data.reshape(-1).view(np.uint8)
        if self.ne_label:
            labels_into = labels.reshape(-1).view(np.uint8)
            at = &labels_into[0]
        c.ggml_opt_dataset_get_batch_host(self._ptr, &into[0], into.shape[0], at, ibatch)
        return data, labels

    def __repr__(self):
        if self.closed:
            return "<OptDataset, closed>"
        return f"<OptDataset of {self.ndata} datapoints of {self.ne_datapoint} elements, {self.ne_label} labels each>"


def _dtype(type):
    return next(dtype for dtype, each in _DTYPES.items() if each == type)


cdef int fill(c.ggml_tensor * t, const unsigned char[::1] data) except -1:
    with nogil:
        c.ggml_backend_tensor_set(t, &data[0], 0, data.shape[0])
    return 0


cdef int check_dataset(OptContext opt, OptDataset dataset, int64_t split) except -1:
    """Check that batches of the dataset fit the inputs and labels, and that `split` is between two steps."""
    cdef c.ggml_tensor * labels = c.ggml_opt_labels(opt._state.ptr())
    cdef int64_t n_batch, n_step
    if not opt.static_graphs:
        raise BackendError("epoch: only static graphs can be trained by epochs")
    n_batch = opt.inputs.ptr().ne[1]
    n_step = n_batch * opt.opt_period
    dataset.check()
    if dataset._type_data != opt.inputs.type or dataset.ne_datapoint != opt.inputs._ptr.ne[0]:
        raise ShapeError(f"epoch: datapoints of {dataset.ne_datapoint} elements of {dataset._type_data.name} for "
                         f"inputs {opt.inputs!r}")
    if (labels == NULL) != (dataset.ne_label == 0):
        raise ShapeError(f"epoch: the loss {opt.loss_type.name} {'has no' if labels == NULL else 'needs'} labels")
    if labels != NULL and (dataset._type_label != Type.F32
                           or c.ggml_nelements(labels) != dataset.ne_label * n_batch):
        raise ShapeError(f"epoch: {dataset.ne_label} labels of {dataset._type_label.name} for each datapoint, for "
                         f"batches of {n_batch} and outputs {opt.outputs!r}")
    if n_batch % dataset.ndata_shard:
        raise ShapeError(f"epoch: batches of {n_batch} datapoints for shards of {dataset.ndata_shard}")
    if dataset.ndata % n_step or split % n_step or not 0 <= split <= dataset.ndata:
        raise ShapeError(f"epoch: {split} datapoints to train with and {dataset.ndata - split} others are not "
                         f"multiples of {n_step}: {opt.opt_period} batches of {n_batch}")
    return 0


@cython.final
cdef class OptResult:
    """Own the losses and predictions of the batches that were evaluated into it.

    While a batch is being evaluated into it, other threads get BusyError.

    Wraps: ggml_opt_result_init, ggml_opt_result_free.
    """

    cdef c.ggml_opt_result_t _ptr
    cdef object _made_by  # what all evaluations into it must have in common
    cdef int64_t _n_pred, _ndata
    cdef bint _in_use

    def __cinit__(self):
        self._ptr = c.ggml_opt_result_init()

    def __dealloc__(self):
        c.ggml_opt_result_free(self._ptr)

    cdef int check_idle(self) except -1:
        if self._in_use:
            raise BusyError("OptResult is in use: a batch is being evaluated into it")
        return 0

    def reset(self):
        """Forget all evaluations.  Wraps: ggml_opt_result_reset."""
        self.check_idle()
        c.ggml_opt_result_reset(self._ptr)
        self._made_by, self._n_pred, self._ndata = None, 0, 0

    @property
    def ndata(self):
        """Return the number of datapoints that were evaluated."""
        self.check_idle()
        return self._ndata

    @property
    def loss(self):
        """Return the loss, of SUM the sum and else the mean, and its uncertainty, NaN for less than two batches.

        Wraps: ggml_opt_result_loss.
        """
        cdef double loss, unc
        self.check_idle()
        c.ggml_opt_result_loss(self._ptr, &loss, &unc)
        return loss, unc

    @property
    def accuracy(self):
        """Return which share was predicted right, and its uncertainty; NaN if the loss is not CROSS_ENTROPY.

        Wraps: ggml_opt_result_accuracy.
        """
        cdef double accuracy, unc
        self.check_idle()
        if not self._n_pred:
            return float("nan"), float("nan")
        c.ggml_opt_result_accuracy(self._ptr, &accuracy, &unc)
        return accuracy, unc

    @property
    def pred(self):
        """Return the index of the largest output for each datapoint, I32; none if the loss is not CROSS_ENTROPY.

        Wraps: ggml_opt_result_pred.
        """
        self.check_idle()
        out = np.empty(self._n_pred, np.int32)
        cdef int32_t[::1] into = out
        if self._n_pred:
            c.ggml_opt_result_pred(self._ptr, &into[0])
        return out

    def __repr__(self):
        return f"<OptResult of {self.ndata} datapoints, loss {self.loss[0]:g}>"


@cython.final
@cython.no_gc_clear
cdef class OptState(Owner):
    """Own a ggml_opt_context; the Contexts in which ggml builds its graphs depend on it."""

    cdef c.ggml_opt_context_t _ptr
    cdef c.ggml_opt_optimizer_params pars
    cdef Sched sched
    cdef set _buffers

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr == NULL:
            return
        if self.sched._ptr != NULL:
            c.ggml_backend_sched_reset(self.sched._ptr)
        c.ggml_opt_free(self._ptr)
        self._ptr = NULL
        self.sched._served = False

    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept:
        return self._buffers is not None and <size_t> buffer in self._buffers

    cdef c.ggml_opt_context_t ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("OptContext is closed")
        return self._ptr

    cdef list tensors(self):
        """Return the addresses of the loss and what is counted, and of the labels."""
        cdef size_t each[4]
        each[0], each[1] = <size_t> c.ggml_opt_loss(self._ptr), <size_t> c.ggml_opt_labels(self._ptr)
        each[2], each[3] = <size_t> c.ggml_opt_pred(self._ptr), <size_t> c.ggml_opt_ncorrect(self._ptr)
        return [address for address in each if address]
