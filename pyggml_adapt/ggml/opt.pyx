"""Training, over ggml_opt: datasets, the state of an optimiser with the graphs of its steps, and results."""

cimport cython
from libc.stdint cimport int32_t, int64_t

from pyggml_adapt.ggml cimport libopt as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.callback cimport find_callbacks
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor, check_idle, count, occupy, reach, vacate
from pyggml_adapt.ggml.graph cimport (
    CGraph, Indices, buffers_of, check_backend_idle, check_foreign, check_size, check_work, check_writable, fill_zeros,
    homes_of, nodes_of, point_views, split_norms, without_data,
)
from pyggml_adapt.ggml.sched cimport Sched

import time
import weakref
from enum import IntEnum
from operator import index

import numpy as np

from pyggml_adapt.errors import (
    AllocError, BackendError, BusyError, ClosedError, ComputeAborted, DTypeError, ParameterError, ShapeError,
)
from pyggml_adapt.ggml import ops as _ops
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.opt_params import SGD, AdamW, progress

__all__ = ["SGD", "AdamW", "OptContext", "OptDataset", "OptLossType", "OptResult", "fit", "progress"]


class OptLossType(IntEnum):
    """What training makes small: of the outputs, or of their difference from labels.  Wraps: ggml_opt_loss_type."""

    MEAN = c.GGML_OPT_LOSS_TYPE_MEAN
    SUM = c.GGML_OPT_LOSS_TYPE_SUM
    CROSS_ENTROPY = c.GGML_OPT_LOSS_TYPE_CROSS_ENTROPY
    MEAN_SQUARED_ERROR = c.GGML_OPT_LOSS_TYPE_MEAN_SQUARED_ERROR


include "opt_plan.pxi"
include "opt_data.pxi"


@cython.final
cdef class OptContext:
    """Own the state of an optimiser, and the graphs that train the parameters that `outputs` are computed from.

    sched: which it has for itself until close().  inputs: an allocated leaf [ne_datapoint, ndata_batch]; outputs:
    F32 [..., ndata_batch], computed from them and from parameters, see Tensor.set_param.  Without both the graphs are
    dynamic: one for each step, see prepare_alloc.  optimizer: AdamW or SGD, or a function that returns the one for an
    epoch, counted from 1.  opt_period: over how many batches gradients are added up for one step.
    Raises: ShapeError, DTypeError if ggml has no gradient for a node, or the loss does not fit the outputs; AllocError
    if a step needs more than 2048 nodes and leaves, or more than the scheduler's graph_size; ClosedError if a leaf has
    no data; BackendError if the scheduler serves a graph or a backend cannot compute a node; ParameterError.
    Wraps: ggml_opt_init, ggml_opt_free, ggml_opt_default_params, ggml_opt_get_default_optimizer_params,
    ggml_opt_get_constant_optimizer_params, ggml_opt_static_graphs, ggml_opt_inputs, ggml_opt_outputs.
    """

    cdef OptState _state
    cdef Context _ctx  # of what ggml makes for each graph: our own, or with dynamic graphs that of the graph
    cdef readonly Sched sched
    cdef readonly Tensor inputs, outputs
    cdef readonly object loss_type
    cdef readonly int opt_period, n_epochs
    cdef readonly bint static_graphs
    cdef object _optimizer, _kind, _signature
    cdef Plan _plan
    cdef CGraph _graph  # that was prepared
    cdef Context _step  # of the dynamic graph that was allocated last
    cdef list _waiting, _nodes
    cdef size_t _used_mem
    cdef int _opt_i, _n_backward
    cdef bint _prepared, _built, _ready
    cdef bint _steps  # of the parameters: is what the allocated graph ends with

    def __cinit__(self, Sched sched not None, inputs=None, outputs=None, *, loss_type=OptLossType.CROSS_ENTROPY,
                  optimizer=None, opt_period=1):
        cdef c.ggml_opt_params params
        self.sched, self.loss_type = sched, OptLossType(loss_type)
        if (inputs is None) != (outputs is None):
            raise ParameterError("OptContext: inputs and outputs are given both, or none of them for dynamic graphs")
        if not 1 <= index(opt_period) <= 1 << 20:
            raise ParameterError(f"OptContext: opt_period must be 1 to {1 << 20}, not {opt_period}")
        self.opt_period, self.static_graphs = opt_period, inputs is not None
        self._optimizer = AdamW() if optimizer is None else optimizer
        self._state = OptState.__new__(OptState)
        self._state.sched = sched
        self._state.pars = c.ggml_opt_get_default_optimizer_params(NULL)
        self._set_optimizer(1)
        sched.check()
        check_idle(sched)
        if sched._served:
            raise BackendError("OptContext: this scheduler serves a graph already, see Sched.reset()")
        split = None if sched._split is None else sched._split()
        if split is not None and not split.closed:
            raise BackendError("OptContext: close the Context of the graph that the scheduler had before")
        self._state.depend_on(sched)
        sched.forget_layout()
        params = c.ggml_opt_default_params(sched._ptr, <c.ggml_opt_loss_type> <int> self.loss_type)
        params.opt_period = self.opt_period
        params.get_opt_pars = c.ggml_opt_get_constant_optimizer_params
        params.get_opt_pars_ud = &self._state.pars
        params.optimizer = (c.GGML_OPT_OPTIMIZER_TYPE_ADAMW if self._kind is AdamW
                            else c.GGML_OPT_OPTIMIZER_TYPE_SGD)
        if self.static_graphs:
            self._init_static(&params, <Tensor?> inputs, <Tensor?> outputs)
        else:
            self._state._ptr = c.ggml_opt_init(params)
        sched._served, sched._split, sched._members, sched._n_nodes = True, weakref.ref(self._state), set(), -1
        sched._assigned.clear()  # ggml forgets at the first step where tensors were to be
        sched._kept.clear()

    cdef int _init_static(self, c.ggml_opt_params * params, Tensor inputs, Tensor outputs) except -1:
        """Check everything that ggml asserts while it builds the graphs, and let it build them."""
        self.inputs, self.outputs = inputs, outputs
        owners = reach([inputs.ctx, outputs.ctx])
        check_tensors(inputs, outputs)
        inputs.with_data()
        for owner in (inputs.ctx, outputs.ctx):
            check_idle(owner)
            self._state.depend_on(owner)
        if any([(<Owner> owner).owns_readonly(inputs.buffer()) for owner in owners]):
            raise DTypeError("OptContext: inputs are in a read-only mapping")
        self._plan = plan_of(outputs, self.loss_type, self.opt_period > 1)
        check_plan(self._plan, self.sched, STATIC_SIZE)
        check_leaves(self._plan, owners, None)
        self._ctx = Context(3 * c.ggml_graph_overhead_custom(STATIC_SIZE, True)
                            + self._plan.n_tensors * c.ggml_tensor_overhead())
        params.ctx_compute, params.inputs, params.outputs = self._ctx._ptr, inputs._ptr, outputs._ptr
        self._state._ptr = c.ggml_opt_init(params[0])
        self._ctx.depend_on(self._state)
        fill_all_zeros(self._ctx, set())
        self._ctx.n_foreign += self._plan.n_nodes + self._plan.n_leaves
        if c.ggml_opt_loss(self._state._ptr).data == NULL:
            raise AllocError("OptContext: no memory for the optimiser's tensors")
        self._state._buffers = buffers_of(self._state.tensors())
        self._built = True
        return 0

    cdef int _set_optimizer(self, int epoch) except -1:
        """Let ggml have the parameters of the optimiser for an epoch."""
        found = self._optimizer
        if not isinstance(found, (AdamW, SGD)) and callable(found):
            found = found(epoch)
        self._kind = read_optimizer(&self._state.pars, found, self._kind)
        return 0

    cdef Tensor _tensor(self, c.ggml_tensor * t):
        self._state.ptr()
        return None if t == NULL or not self._built else self._ctx.wrap(t)

    @property
    def labels(self):
        """Return the leaf for the outputs that are wanted, None if the loss has none.  Wraps: ggml_opt_labels."""
        return self._tensor(c.ggml_opt_labels(self._state.ptr()))

    @property
    def loss(self):
        """Return the loss of the last batch, divided by opt_period unless it is SUM.  Wraps: ggml_opt_loss."""
        return self._tensor(c.ggml_opt_loss(self._state.ptr()))

    @property
    def pred(self):
        """Return the indices of the largest outputs, None if the loss is not CROSS_ENTROPY.  Wraps: ggml_opt_pred."""
        return self._tensor(c.ggml_opt_pred(self._state.ptr()))

    @property
    def ncorrect(self):
        """Return how many of pred are as the labels say, None as pred.  Wraps: ggml_opt_ncorrect."""
        return self._tensor(c.ggml_opt_ncorrect(self._state.ptr()))

    def grad_acc(self, Tensor param not None):
        """Return what a parameter's gradients are added up in, None if opt_period is 1.  Wraps: ggml_opt_grad_acc.

        Raises: BackendError with dynamic graphs, but between alloc and eval of a step's last batch.
        """
        cdef c.ggml_tensor * t
        self._state.ptr()
        if not self.static_graphs and not self._steps:
            raise BackendError("grad_acc: there is no graph of a step; see prepare_alloc and alloc")
        self._ctx.ptr()
        if (<size_t> param.ptr(), True) not in self._plan.leaves:
            return None
        t = c.ggml_opt_grad_acc(self._state.ptr(), param.ptr())
        if t == NULL:
            return None
        self._state._buffers = (self._state._buffers or set()) | {<size_t> t.buffer}
        return self._ctx.wrap(t)

    def reset(self, *, bint optimizer=False):
        """Forget the gradients that were added up or, with `optimizer`, also AdamW's moments and how often it stepped.

        Raises: BackendError with dynamic graphs; ClosedError if an owner of what is trained was closed.
        Wraps: ggml_opt_reset.
        """
        self._state.ptr()
        if not self.static_graphs:
            raise BackendError("reset: only static graphs can be reset")
        check_idle(self._state)
        reach([self._state])
        c.ggml_opt_reset(self._state.ptr(), optimizer)

    def prepare_alloc(self, CGraph graph not None, Tensor inputs not None, Tensor outputs not None):
        """Let the next step be the one of `graph`, in whose Context ggml builds the rest, see size_for.

        graph: of the same nodes as at the first step.  The Context of the step before must be closed.
        Raises: as OptContext; ShapeError if the nodes differ from the first step's, BackendError with static graphs.
        Wraps: ggml_opt_prepare_alloc.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef size_t need
        self._state.ptr()
        if self.static_graphs or self._ready:
            raise BackendError("prepare_alloc: the graphs are static" if self.static_graphs else
                               "prepare_alloc: the step before was allocated, but not evaluated")
        if self._step is not None and not self._step.closed:
            raise BackendError("prepare_alloc: close the Context of the step before first")
        check_idle(graph.ctx)
        check_idle(self._state)
        owners = reach([graph.ctx, self._state, inputs.ctx, outputs.ctx])
        check_tensors(inputs, outputs)
        seen = set()
        count([<size_t> outputs.ptr()], seen)
        if outputs.ctx is not graph.ctx or <size_t> outputs._ptr not in nodes_of(graph) or not seen.issuperset(
                nodes_of(graph)):
            raise ShapeError(f"prepare_alloc: outputs {outputs.name!r} and what they need are not the graph's nodes")
        plan = plan_of(outputs, self.loss_type, True)
        for address, param in plan.leaves:
            if param and address not in nodes_of(graph):
                raise ShapeError(f"prepare_alloc: parameter {graph._wrap(<c.ggml_tensor *> <size_t> address).name!r} "
                                 f"was marked after CGraph.expand()")
        check_plan(plan, self.sched, graph.size - graph.n_nodes)
        check_leaves(plan, owners, graph.ctx)
        check_foreign(graph)
        self.sched._check_supported(graph)
        if self._signature not in (None, signature_of(nodes_of(graph))):
            raise ShapeError("prepare_alloc: the graph has other nodes than that of the first step")
        need = 2 * c.ggml_graph_overhead_custom(graph.size, True) + plan.n_tensors * c.ggml_tensor_overhead()
        if c.ggml_used_mem(graph.ctx._ptr) + need > graph.ctx.mem_size:
            raise AllocError(f"Context of {graph.ctx.mem_size} bytes has no room for a training step of {need}")
        self._plan, self._ctx = plan, graph.ctx
        self.inputs, self.outputs = inputs, outputs
        self._waiting = without_data(graph)
        graph.ctx.depend_on(self._state)
        graph.ctx.n_foreign += plan.n_nodes + plan.n_leaves
        graph._changed()
        graph._sched = None
        self._graph, self._nodes, self._used_mem = graph, nodes_of(graph), c.ggml_used_mem(graph.ctx._ptr)
        c.ggml_opt_prepare_alloc(self._state._ptr, graph.ctx._ptr, g, inputs._ptr, outputs._ptr)
        self._prepared, self._built = True, False

    @staticmethod
    def size_for(n_tensors, graph_size):
        """Return the bytes of a Context for a step of dynamic graphs: the graph's own n_tensors, and what ggml adds.

        graph_size: the graph's size, of at least 9 times the nodes and leaves that the outputs are computed from.
        Raises: ShapeError for numbers that no graph has.
        """
        check_size(index(graph_size))
        if not 0 <= index(n_tensors) <= MAX_TENSORS:
            raise ShapeError(f"size_for: {n_tensors} tensors, not 0 to {MAX_TENSORS}")
        return ((10 * n_tensors + 4 * SPARE) * c.ggml_tensor_overhead()
                + 3 * c.ggml_graph_overhead_custom(graph_size, True))

    cdef list _begin(self):
        """Return the owners of all that a step uses, occupied."""
        cdef Backend backend
        self._state.ptr()
        if self._ctx is None:
            raise BackendError("alloc: there is no graph; see prepare_alloc")
        for owner in (self._ctx, self._state, self.sched):
            check_idle(owner)
        for backend in self.sched.backends:
            check_backend_idle(backend)
        for owner in self._plan.homes:
            if (<Owner> owner)._computing:
                raise BusyError(f"{type(owner).__name__} is in use by a computation that has not ended")
        if self.sched._eval is not None:
            raise BackendError("training calls no eval_callback; set it to None")
        owners = occupy([self._ctx, self._state])
        try:
            check_marks(self._plan)
            if self.static_graphs:
                check_places(self._plan)
            point_views(self._plan.graph)
            check_leaves(self._plan, owners, None if self.static_graphs else self._ctx)
            self._plan.graph.check_alone(owners)
        except BaseException:
            vacate(owners)
            raise
        return owners

    def alloc(self, *, bint backward):
        """Get ready to evaluate a batch, and with `backward` to train with it; then fill inputs and labels.

        Raises: BackendError if the one before was not evaluated, or is one of opt_period that is not complete.
        Wraps: ggml_opt_alloc.
        """
        self._check_alloc(backward)
        owners = self._begin()
        try:
            self._alloc(backward)
        finally:
            vacate(owners)

    cdef int _check_alloc(self, bint backward) except -1:
        self._state.ptr()
        if self._ready:
            raise BackendError("alloc: the batch before was not evaluated")
        if not self.static_graphs and not self._prepared:
            raise BackendError("alloc: there is no graph; see prepare_alloc")
        if not self.static_graphs:
            reach([self._graph.ctx])
            if nodes_of(self._graph) != self._nodes or c.ggml_used_mem(self._ctx.ptr()) != self._used_mem:
                raise BackendError("alloc: the graph or its Context has grown since prepare_alloc")
        if not backward and self._n_backward:
            raise BackendError(f"alloc: {self._n_backward} of opt_period = {self.opt_period} batches were trained with")
        if backward and self._opt_i != self._n_backward:  # ggml counts both
            raise BackendError(f"alloc: the number of batches evaluated without backward must be a multiple of "
                               f"opt_period = {self.opt_period}")
        if self.sched._n_exports:
            raise BusyError(f"alloc: {self.sched._n_exports} array(s) still show the scheduler's memory")
        return 0

    cdef int _alloc(self, bint backward) except -1:
        cdef c.ggml_opt_context_t ptr = self._state._ptr
        cdef bint first = backward and self._opt_i == 0
        if first and self.static_graphs and self.opt_period > 1:
            c.ggml_opt_reset(ptr, False)  # ggml forgets to after batches without backward
        if not self.static_graphs and self._signature is None:
            self._signature = signature_of(self._nodes)
        if self.static_graphs:  # which ggml copies: with the GIL, so that nobody sees what leaves show meanwhile
            self._plan.indices.show_copies()
        else:
            self.sched.forget_layout()
        c.ggml_opt_alloc(ptr, backward)
        if self.static_graphs:
            self._plan.indices.show_leaves()
        if not self.static_graphs:
            fill_all_zeros(self._ctx, set(self._nodes))
            if first:
                c.ggml_opt_reset(ptr, False)  # and with dynamic graphs
            self._step = self._ctx
            self.sched._buffers = buffers_of(self._waiting + self._state.tensors())
        if c.ggml_opt_loss(ptr).data == NULL:
            raise AllocError("alloc: no memory for a training step")
        self._ready, self._built, self._prepared = True, True, False
        self._n_backward = (self._n_backward + backward) % self.opt_period
        self._steps = backward and self._n_backward == 0
        return 0

    def eval(self, OptResult result=None):
        """Evaluate the batch that inputs and labels hold, and add it to `result`.  Releases the GIL.

        Raises: BackendError before alloc(); ShapeError if `result` has other losses, periods or batches;
        ComputeAborted, and then `result` is reset, as ggml has added what was not computed; else as CGraph.compute.
        Wraps: ggml_opt_eval.
        """
        if not self._ready:
            raise BackendError("eval: alloc() comes first")
        owners = self._begin()
        try:
            self._eval(result)
        finally:
            vacate(owners)

    cdef int _eval(self, OptResult result) except -1:
        cdef c.ggml_opt_context_t ptr = self._state._ptr
        cdef c.ggml_opt_result_t into = NULL
        cdef Backend backend
        if result is not None:
            self._check_result(result)
            into = result._ptr
        self._plan.indices.read(self._plan.graph)
        for backend in self.sched.backends:
            check_work(self._plan.graph, backend)
        before = []
        try:
            for backend in self.sched.backends:
                backend._flags[2] = 0
                if backend.threadpool is not None:
                    before.append((backend, backend.threadpool.enter()))
            if result is not None:
                result._in_use = True
            with nogil:
                c.ggml_opt_eval(ptr, into)
            self._ready = self._steps = False
            self._opt_i = (self._opt_i + 1) % self.opt_period
            if result is not None:
                result._made_by = self._kind_of_result()
                result._ndata += self.inputs._ptr.ne[1]
                result._n_pred += self.outputs._ptr.ne[1] if c.ggml_opt_pred(ptr) != NULL else 0
        finally:
            if result is not None:
                result._in_use = False
            for backend, each in reversed(before):
                backend.threadpool.leave(each)
        for backend in self.sched.backends:  # ggml_opt does not look at the status
            if backend._flags[2]:
                if result is not None:
                    result.reset()
                raise ComputeAborted("training: stopped by an abort flag")
        return 0

    cdef tuple _kind_of_result(self):
        return (self.loss_type, self.opt_period, self.outputs._ptr.ne[1])

    cdef int _check_result(self, OptResult result) except -1:
        """Check that a batch can be evaluated into a result."""
        made_by = self._kind_of_result()
        if result._made_by not in (None, made_by):
            raise ShapeError(f"eval: a result of (loss, opt_period, batch) {result._made_by} for {made_by}")
        return result.check_idle()

    cdef int _batch(self, OptDataset dataset, int64_t ibatch, bint backward, OptResult result) except -1:
        """Train with a batch, or evaluate it only."""
        cdef c.ggml_tensor * inputs = self.inputs.ptr()
        cdef c.ggml_opt_context_t ptr
        self._check_alloc(backward)
        self.inputs.check_writable(reach([self.inputs.ctx]))
        owners = self._begin()
        dataset._in_use += 1
        try:
            dataset.check()
            self._check_result(result)
            ptr = self._state._ptr
            with nogil:
                c.ggml_opt_dataset_get_batch(dataset._ptr, inputs, c.ggml_opt_labels(ptr), ibatch)
            self._plan.indices.read(self._plan.graph)  # so that nothing is left half done
            self._alloc(backward)
            self._eval(result)
        finally:
            dataset._in_use -= 1
            vacate(owners)
        return 0

    def epoch(self, OptDataset dataset not None, OptResult result_train=None, OptResult result_eval=None,
              idata_split=-1, callback_train=None, callback_eval=None):
        """Train with the first idata_split datapoints, all if -1, and evaluate the others.  Releases the GIL.

        callback_train, callback_eval: called after each batch as f(train, opt, dataset, result, ibatch, ibatch_max,
        seconds), see progress(); what they raise ends the epoch and comes out.
        Raises: ShapeError if the dataset does not fit inputs and labels, or the numbers of datapoints are no multiples
        of a batch times opt_period; BackendError with dynamic graphs; as eval().
        Wraps: ggml_opt_dataset_get_batch.
        """
        cdef int64_t n_batch, i, split = dataset.ndata if idata_split < 0 else index(idata_split)
        check_dataset(self, dataset, split)
        check_idle(self._state)
        n_batch = self.inputs._ptr.ne[1]
        self._set_optimizer(self.n_epochs + 1)
        self.n_epochs += 1
        result_train = OptResult() if result_train is None else result_train
        result_eval = OptResult() if result_eval is None else result_eval
        for train, result, first, last, callback in (
                (True, result_train, 0, split // n_batch, callback_train),
                (False, result_eval, split // n_batch, dataset.ndata // n_batch, callback_eval)):
            start = time.monotonic()
            for i in range(first, last):
                self._batch(dataset, i, train, result)
                if callback is not None:
                    callback(train, self, dataset, result, i + 1 - first, last - first, time.monotonic() - start)

    @property
    def closed(self):
        """Return whether close() was called."""
        return self._state.closed

    def close(self):
        """Free the optimiser's state, and let the scheduler go; closing twice is allowed.

        Raises: BusyError while another thread trains, or an array shows its memory.
        """
        check_idle(self._state)
        if self._state._n_exports:
            raise BusyError(f"OptContext cannot be closed: {self._state._n_exports} array(s) still show its memory")
        if self.static_graphs and self._ctx is not None:
            self._ctx.close()
        if self._step is not None and not self.closed:
            self.sched._split = weakref.ref(self._step)
        self._state.close()

    def __enter__(self):
        self._state.ptr()
        return self

    def __exit__(self, *exc):
        self.close()


include "opt_fit.pxi"
