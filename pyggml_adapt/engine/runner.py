"""Engine: builds graphs, keeps them, and runs batches through them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np

from pyggml_adapt.engine.batch import Step, UBatch
from pyggml_adapt.engine.kv_cache import KVCache
from pyggml_adapt.errors import ClosedError
from pyggml_adapt.ggml import Backend, BufferType, CGraph, Context, GAllocr, Slots
from pyggml_adapt.graph.builder import GraphBuilder
from pyggml_adapt.graph.inputs import Inputs, hadamard_sizes
from pyggml_adapt.graph.weights import Weights
from pyggml_adapt.models import Model
from pyggml_adapt.weights.adaptor import Adaptor
from pyggml_adapt.weights.task import TaskWeights

MAX_GRAPHS = 16  # kept for reuse
MAX_IDLE_NBYTES = 24 * 1024**2  # of compute memory in graphs that are kept but not the last one used


class Program:
    """One graph, built and allocated, whose weights and cache can be exchanged."""

    def __init__(
        self,
        model: Model,
        weights: TaskWeights,
        cache: KVCache,
        buffer_type: BufferType,
        *,
        n_tokens: int,
        n_outputs: int,
        n_kv: tuple[int, ...],
        flash_attn: bool,
        first_layer: int = 0,
        boundaries: Collection[int] = (),
        with_head: bool = True,
    ):
        """first_layer, with_head: as in Model.build().  boundaries: layers above it whose inputs are wanted."""
        hp = model.hp
        n_pairs = sum(map(len, weights.pairs.values()))
        # nodes and leaves, with room to spare
        graph_size = 256 + hp.n_layer * (96 + 6 * hp.n_expert_used) + 6 * n_pairs
        ctx = Context(Context.size_for(graph_size, graph_size))
        self.graph = CGraph(ctx, graph_size)
        self._weight_slots, self._cache_slots = Slots(self.graph), Slots(self.graph)
        k_rot, v_rot = hadamard_sizes(cache.type_k, cache.type_v, hp.n_embd_head_k, hp.n_embd_head_v)
        self.inputs = Inputs(
            ctx,
            hp,
            n_tokens=n_tokens,
            n_outputs=n_outputs,
            n_kv=n_kv,
            n_cells=[part.n_cells for part in cache.parts],
            flash_attn=flash_attn,
            k_rot=k_rot,
            v_rot=v_rot,
            n_embd=hp.n_embd if first_layer else 0,
        )
        k_l = {il: self._cache_slots.add(k) for il, k in cache.k_l.items()}
        v_l = {il: self._cache_slots.add(v) for il, v in cache.v_l.items()}
        w = Weights(self._weight_slots, weights)
        builder = GraphBuilder(ctx, self.graph, hp, self.inputs, w, n_ctx=cache.n_cells, k_l=k_l, v_l=v_l)
        self.result = model.build(builder, w, first_layer, with_head=with_head)
        if self.result is not None:
            self.graph.expand(self.result.set_output())
        self._states = {il: self.graph.expand(builder.layer_inp[il].set_output()) for il in boundaries}
        self._allocr = GAllocr(buffer_type)
        self._allocr.alloc_graph(self.graph)
        self.inputs.prepare()
        self._names, self._scaled = w.names, w.scaled
        self._weights: TaskWeights | None = None  # that bind_weights() was last given
        self._weight_slots.seal()
        self._cache_slots.seal()
        self.nbytes = self._allocr.nbytes + ctx.mem_size

    def bind(self, weights: TaskWeights, cache: KVCache) -> None:
        """Point the graph at a task's weights and a session's cache."""
        self.bind_weights(weights)
        self._cache_slots.bind(cache.table)

    def bind_weights(self, weights: TaskWeights) -> None:
        """Point the graph at a task's weights."""
        if weights is not self._weights:
            self._weight_slots.bind(weights.table(self._names, self._scaled))
            self._weights = weights

    def forget(self, adaptor: Adaptor) -> None:
        """Take the graph's weights for unknown if they are partly this adaptor's: they are bound anew before a run."""
        if self._weights is not None and adaptor in self._weights.adaptors:
            self._weights = None

    def run(self, backend: Backend, batch: UBatch | Step, out: np.ndarray | None) -> None:
        """Compute `batch` and write what it wants into out, see Engine.eval().  Releases the GIL."""
        batch.fill(self.inputs)
        if self.result is None:
            self.graph.compute(backend)
        else:
            self.graph.compute(backend, self.result, out)
        for il, state in self._states.items():
            state.get_data(batch.states[il])


class Engine:
    """Runs one batch at a time, on all its threads; calls from several threads take turns."""

    def __init__(self, *, n_threads: int | None = None, flash_attn: bool = True):
        self.backend = Backend(n_threads=n_threads)
        self.flash_attn = flash_attn
        self._buffer_type = self.backend.device.buffer_type
        self._programs: OrderedDict[tuple, Program] = OrderedDict()
        self._last: tuple[tuple, Program] | None = None  # of them the key and program used last
        self._lock = threading.Lock()

    @property
    def compute_nbytes(self) -> int:
        """Return the bytes of all graphs and their compute buffers."""
        with self._lock:
            return sum(program.nbytes for program in self._programs.values())

    def eval(
        self, model: Model, weights: TaskWeights, cache: KVCache, batch: UBatch | Step, out: np.ndarray | None
    ) -> None:
        """Evaluate `batch`: its K and V go into the cache, its logits into out, F32 [n_outputs, n_vocab].

        Of a batch without head these are its normed hidden states, F32 [n_outputs, n_embd].
        If it fails, the cells that were empty before are empty; a window's may have been overwritten.
        Raises: AdaptorError (adaptor_changed, foundation_changed) if a mapped file is not what it was; ClosedError.
        """
        with self._lock:
            if self.backend.closed:
                raise ClosedError("the Engine is closed")  # and the files, which cannot be looked at, soon are
            batch.store()
            try:
                weights.check_unchanged()
                program = self._program(model, weights, cache, batch)
                program.bind(weights, cache)
                program.run(self.backend, batch, out)
            except BaseException:
                batch.release()
                raise

    def bind(self, model: Model, weights: TaskWeights) -> None:
        """Point every kept graph that fits these weights at them, so that the next evaluation need not."""
        with self._lock:
            for (hp, layout, *_), program in self._programs.items():
                if layout == weights.layout and hp == model.hp:
                    program.bind_weights(weights)

    def forget(self, adaptor: Adaptor) -> None:
        """Let no graph take an adaptor's weights for bound, before these are unmapped."""
        with self._lock:
            for program in self._programs.values():
                program.forget(adaptor)

    def _program(self, model: Model, weights: TaskWeights, cache: KVCache, batch: UBatch | Step) -> Program:
        n_tokens, n_outputs, n_kv = batch.n_tokens, batch.n_outputs, cache.n_kv
        key = (model.hp, weights.layout, cache.layout, n_tokens, n_outputs, n_kv, batch.part)
        if self._last is not None and key == self._last[0]:  # as a rule, and without hashing all hyper-parameters
            return self._last[1]
        program = self._programs.get(key)
        if program is None:
            self._last = None  # it may be dropped
            self._trim()
            program = Program(
                model,
                weights,
                cache,
                self._buffer_type,
                n_tokens=n_tokens,
                n_outputs=n_outputs,
                n_kv=n_kv,
                flash_attn=self.flash_attn,
                first_layer=batch.first_layer,
                boundaries=batch.states,
                with_head=batch.with_head,
            )
            self._programs[key] = program
        self._programs.move_to_end(key)
        self._last = key, program
        return program

    def _trim(self) -> None:
        """Drop the graphs used longest ago until those left are within the limits."""
        idle = sum(program.nbytes for program in self._programs.values())
        while self._programs and (idle > MAX_IDLE_NBYTES or len(self._programs) >= MAX_GRAPHS):
            _, program = self._programs.popitem(last=False)
            idle -= program.nbytes

    def close(self) -> None:
        """Free all graphs and the threads."""
        with self._lock:
            self._programs.clear()
            self._last = None
            self.backend.close()
