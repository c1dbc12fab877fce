"""Training with ggml_opt: each kind of step against NumPy, and wrong calls that ggml would abort on."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest

from pyggml_adapt.errors import (
    AllocError,
    BackendError,
    BusyError,
    ClosedError,
    ComputeAborted,
    DTypeError,
    IndexRangeError,
    ParameterError,
    ShapeError,
)
from pyggml_adapt.ggml import (
    Backend,
    CGraph,
    Context,
    GAllocr,
    Sched,
    Slots,
    Tensor,
    TensorTable,
    Threadpool,
    Type,
    ops,
)
from pyggml_adapt.ggml.opt import SGD, AdamW, OptContext, OptDataset, OptLossType, OptResult, fit, progress

MSE, CE = OptLossType.MEAN_SQUARED_ERROR, OptLossType.CROSS_ENTROPY
RNG = np.random.default_rng(0)
X = RNG.standard_normal((24, 5), dtype=np.float32)
Y = RNG.standard_normal((24, 3), dtype=np.float32)
ONE_HOT = np.eye(3, dtype=np.float32)[RNG.integers(0, 3, 24)]
W = RNG.standard_normal((3, 5), dtype=np.float32)


class Linear:
    """outputs = w @ inputs, batches of 4."""

    def __init__(self, backend, n_batch=4):
        self.sched = Sched([backend])
        self.weights, self.ctx = Context(Context.size_for(8)), Context(Context.size_for(8))
        self.array = W.copy()
        self.w = Tensor.from_numpy(self.weights, self.array, "w").set_param()
        self.inputs = Tensor.from_numpy(self.weights, np.zeros((n_batch, 5), "f"), "inputs")
        self.outputs = self.w @ self.inputs

    def opt(self, **options):
        return OptContext(self.sched, self.inputs, self.outputs, **{"loss_type": MSE, **options})


@pytest.fixture
def linear(backend):
    return Linear(backend)


def mse_grad(w, x, y):
    return 2 * (x @ w.T - y).T @ x / y.size


def ce_grad(w, x, y):
    p = np.exp(x @ w.T)
    return (p / p.sum(axis=1, keepdims=True) - y).T @ x / len(x)


LOSSES = [(MSE, Y, mse_grad), (CE, ONE_HOT, ce_grad)]


@pytest.mark.parametrize("loss_type, labels, grad", LOSSES, ids=["mse", "cross_entropy"])
@pytest.mark.parametrize("opt_period", [1, 2, 3])
def test_sgd_is_numpys(linear, loss_type, labels, grad, opt_period):
    """Gradients of opt_period batches are added up, twice in a row, with a validation between."""
    opt = linear.opt(loss_type=loss_type, optimizer=SGD(alpha=0.1, wd=0.01), opt_period=opt_period)
    dataset = OptDataset(X, labels)
    expected = W.astype("d")
    split = 16 if opt_period == 2 else 12
    for _ in range(2):
        opt.epoch(dataset, idata_split=split)
        for i in range(0, split, 4 * opt_period):
            batch = slice(i, i + 4 * opt_period)
            expected = expected * (1 - 0.1 * 0.01) - 0.1 * grad(expected, X[batch], labels[batch])
    # F32 sums of 24 products, a few roundings of 2**-24 each
    np.testing.assert_allclose(linear.array, expected, rtol=1e-5, atol=1e-6)


def test_adamw_is_numpys(linear):
    rates = {1: 0.1, 2: 0.05}
    opt = linear.opt(optimizer=lambda epoch: AdamW(alpha=rates[epoch], wd=0.02))
    dataset = OptDataset(X, Y)
    w, m, v, n = W.astype("d"), 0.0, 0.0, 0
    for epoch in (1, 2):
        opt.epoch(dataset)
        assert opt.n_epochs == epoch
        for i in range(0, 24, 4):
            n += 1
            g = mse_grad(w, X[i : i + 4], Y[i : i + 4])
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            step = m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
            w = w * (1 - rates[epoch] * 0.02) - rates[epoch] * step
    np.testing.assert_allclose(linear.array, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", [OptLossType.MEAN, OptLossType.SUM])
def test_losses_without_labels(linear, loss_type):
    with linear.opt(loss_type=loss_type, optimizer=SGD(alpha=0.5)) as opt:
        assert opt.labels is None
        result = OptResult()
        opt.epoch(OptDataset(X), result_eval=result, idata_split=0)
        total = (X @ W.T).sum()
        assert result.loss[0] == pytest.approx(total if loss_type == OptLossType.SUM else total / 72, rel=1e-5)
        opt.epoch(OptDataset(X[:4]))
    scale = 1 if loss_type == OptLossType.SUM else 1 / 12
    np.testing.assert_allclose(linear.array, W - 0.5 * scale * X[:4].sum(axis=0), rtol=1e-5, atol=1e-6)


def test_results(linear):
    with linear.opt(loss_type=CE) as opt:
        result = OptResult()
        assert (result.ndata, result.loss[0], len(result.pred)) == (0, 0.0, 0)
        assert np.isnan(result.accuracy).all()
        opt.epoch(OptDataset(X, ONE_HOT), result_eval=result, idata_split=0)
        logits = (X @ W.T).astype("d")
        losses = np.log(np.exp(logits).sum(axis=1)) - (logits * ONE_HOT).sum(axis=1)
        right = (logits.argmax(axis=1) == ONE_HOT.argmax(axis=1)).mean()
        batches = losses.reshape(6, 4).mean(axis=1)
        assert result.ndata == 24
        assert result.loss == pytest.approx((losses.mean(), batches.std() / np.sqrt(5)), rel=1e-4)
        assert result.accuracy == pytest.approx((right, np.sqrt(right * (1 - right) / 23)))
        np.testing.assert_array_equal(result.pred, logits.argmax(axis=1))
        assert repr(result) == f"<OptResult of 24 datapoints, loss {result.loss[0]:g}>"
        result.reset()
        assert (result.ndata, len(result.pred)) == (0, 0)


def test_steps_by_hand(linear):
    with linear.opt(optimizer=SGD(alpha=0.1), opt_period=2) as opt:
        for batch in (slice(0, 4), slice(4, 8)):
            opt.alloc(backward=True)
            linear.inputs.set_data(X[batch])
            opt.labels.set_data(Y[batch])
            result = OptResult()
            opt.eval(result)
            loss = ((X[batch] @ W.T - Y[batch]) ** 2).mean()
            assert result.loss[0] == pytest.approx(loss, rel=1e-5)
            assert opt.loss.to_numpy()[0] == pytest.approx(loss / 2, rel=1e-5)
        np.testing.assert_allclose(opt.grad_acc(linear.w).to_numpy(), mse_grad(W, X[:8], Y[:8]), rtol=1e-4, atol=1e-6)
        assert opt.grad_acc(linear.inputs) is None
        assert opt.pred is None
        assert opt.ncorrect is None
        opt.reset()
        assert not opt.grad_acc(linear.w).to_numpy().any()
        opt.reset(optimizer=True)


def dynamic_step(opt, linear, batch):
    with Context(OptContext.size_for(8, 256)) as ctx:
        graph = CGraph(ctx, 256)
        inputs = ctx.new_tensor(Type.F32, (5, 4)).set_input()
        outputs = graph.expand(ops.mul_mat(ctx, linear.w, inputs))
        opt.prepare_alloc(graph, inputs, outputs)
        opt.alloc(backward=batch is not None)
        inputs.set_data(X[batch or slice(4)])
        opt.labels.set_data(Y[batch or slice(4)])
        result = OptResult()
        opt.eval(result)
        return result.loss[0]


@pytest.mark.parametrize("opt_period", [1, 2])
def test_dynamic_graphs(linear, opt_period):
    opt = OptContext(linear.sched, loss_type=MSE, optimizer=SGD(alpha=0.1), opt_period=opt_period)
    assert not opt.static_graphs
    expected = W.astype("d")
    for i in range(0, 16, 4 * opt_period):
        for k in range(opt_period):
            batch = slice(i + 4 * k, i + 4 * k + 4)
            loss = dynamic_step(opt, linear, batch)
            assert loss == pytest.approx(((X[batch] @ expected.T - Y[batch]) ** 2).mean(), rel=1e-4)
        whole = slice(i, i + 4 * opt_period)
        expected = expected - 0.1 * mse_grad(expected, X[whole], Y[whole])
        for _ in range(opt_period):
            dynamic_step(opt, linear, None)
    np.testing.assert_allclose(linear.array, expected, rtol=1e-5, atol=1e-6)


def test_dynamic_graphs_are_alike(linear):
    opt = OptContext(linear.sched, loss_type=MSE)
    with pytest.raises(BackendError, match=r"alloc: there is no graph; see prepare_alloc"):
        opt.alloc(backward=True)
    with pytest.raises(BackendError, match="only static graphs can be trained by epochs"):
        opt.epoch(OptDataset(X, Y))
    with pytest.raises(BackendError, match="only static graphs can be reset"):
        opt.reset()
    dynamic_step(opt, linear, slice(4))
    ctx = Context(OptContext.size_for(8, 256))
    graph, small = CGraph(ctx, 256), CGraph(ctx, 8)
    inputs = ctx.new_tensor(Type.F32, (5, 4)).set_input()
    outputs = graph.expand(ops.scale(ctx, ops.mul_mat(ctx, linear.w, inputs), 2.0))
    with pytest.raises(ShapeError, match="other nodes than that of the first step"):
        opt.prepare_alloc(graph, inputs, outputs)
    with pytest.raises(AllocError, match=r"a training step of \d+ nodes and leaves, for graphs of"):
        opt.prepare_alloc(small, inputs, small.expand(ops.mul_mat(ctx, linear.w, inputs)))
    with pytest.raises(ShapeError, match="are not the graph's nodes"):
        opt.prepare_alloc(graph, inputs, ops.mul_mat(ctx, linear.w, inputs))
    cramped = Context(Context.size_for(8, 256))
    graph = CGraph(cramped, 256)
    inputs = cramped.new_tensor(Type.F32, (5, 4)).set_input()
    with pytest.raises(AllocError, match="has no room for a training step"):
        opt.prepare_alloc(graph, inputs, graph.expand(ops.mul_mat(cramped, linear.w, inputs)))


def test_a_prepared_graph_stays(linear):
    opt = OptContext(linear.sched, loss_type=MSE)
    with Context(OptContext.size_for(8, 256)) as ctx:
        graph = CGraph(ctx, 256)
        inputs = ctx.new_tensor(Type.F32, (5, 4)).set_input()
        outputs = graph.expand(ops.mul_mat(ctx, linear.w, inputs))
        opt.prepare_alloc(graph, inputs, outputs)
        assert opt.loss is None
        with pytest.raises(BackendError, match="no graph of a step"):
            opt.grad_acc(linear.w)
        graph.expand(ops.sqr(ctx, outputs))
        with pytest.raises(BackendError, match="the graph or its Context has grown since prepare_alloc"):
            opt.alloc(backward=True)
        with pytest.raises(ShapeError, match="and what they need are not the graph's nodes"):
            opt.prepare_alloc(graph, inputs, outputs)
        graph.clear()
        graph.expand(outputs)
        opt.prepare_alloc(graph, inputs, outputs)
        opt.alloc(backward=True)
        assert not opt.grad_acc(linear.w).to_numpy().any()
        loss = opt.loss
    with pytest.raises(ClosedError):
        opt.eval()
    with pytest.raises(ClosedError):
        loss.to_numpy()


def test_other_losses_are_refused(backend):
    ctx = Context(Context.size_for(8))
    w = Tensor.from_numpy(ctx, np.ones((1, 5), "f")).set_param()
    inputs = Tensor.from_numpy(ctx, X[:1].copy())
    outputs = (w @ inputs).set_loss()
    with pytest.raises(ShapeError, match="is marked as a loss; training has its own"):
        OptContext(Sched([backend]), inputs, outputs, loss_type=MSE)


def test_callbacks(linear, capsys):
    calls = []
    with linear.opt() as opt:
        dataset = OptDataset(X, Y)
        opt.epoch(dataset, idata_split=8, callback_train=lambda *args: calls.append(args), callback_eval=progress)
        assert [(train, i, n) for train, _, _, _, i, n, _ in calls] == [(True, 1, 2), (True, 2, 2)]
        assert all(each[1] is opt and each[2] is dataset and each[6] >= 0 for each in calls)
        assert "validation 4/4: loss " in capsys.readouterr().err

        def fail(*args):
            raise KeyError("stop")

        with pytest.raises(KeyError, match="stop"):
            opt.epoch(dataset, callback_train=fail)
        opt.epoch(dataset)  # goes on

        def close(*args):
            opt.close()

        with pytest.raises(ClosedError, match="OptContext is closed"):
            opt.epoch(dataset, callback_train=close)
        assert opt.closed


def test_fit(backend):
    linear = Linear(backend)
    target = OptDataset(X, X @ np.float32([[1, 2, 3, 4, 5]] * 3).T)
    train, val = fit(linear.sched, linear.inputs, linear.outputs, target, loss_type=MSE,
                     optimizer=lambda epoch: AdamW(alpha=0.5 * 0.97**epoch), nepoch=150, nbatch_logical=8,
                     val_split=0.34)  # fmt: skip
    assert (train.ndata, val.ndata) == (8, 16)
    linear = Linear(backend)
    train, val = fit(linear.sched, linear.inputs, linear.outputs, target, loss_type=MSE,
                     optimizer=lambda epoch: AdamW(alpha=0.5 * 0.97**epoch), nepoch=150)  # fmt: skip
    assert (train.ndata, val.ndata) == (24, 0)
    np.testing.assert_allclose(linear.array, [[1, 2, 3, 4, 5]] * 3, atol=0.05)
    linear.sched.reset()  # it was let go


def test_shuffle_keeps_shards(linear):
    opt = linear.opt()
    ids = np.arange(24, dtype="f")
    dataset = OptDataset(ids, -ids, ndata_shard=2)
    assert (dataset.ndata, dataset.ndata_shard, dataset.ne_datapoint, dataset.ne_label) == (24, 2, 1, 1)
    assert repr(dataset) == "<OptDataset of 24 datapoints of 1 elements, 1 labels each>"

    def order():
        data, labels = dataset.get_batch(0, 24)
        np.testing.assert_array_equal(labels, -data)
        return data[:, 0].tolist()

    assert order() == ids.tolist()
    dataset.shuffle(opt, 8)
    assert order()[8:] == ids.tolist()[8:]
    dataset.shuffle(opt)
    found = order()
    assert found != ids.tolist()
    assert sorted(found) == ids.tolist()
    assert all(b == a + 1 for a, b in zip(found[::2], found[1::2], strict=True))
    assert dataset.get_batch(2, 4)[0].shape == (4, 1)
    for idata in (25, 3):
        with pytest.raises(ShapeError, match=f"shuffle: {idata} of 24 datapoints in shards of 2"):
            dataset.shuffle(opt, idata)
    with pytest.raises(IndexError, match="batch 6 of 6"):
        dataset.get_batch(6, 4)
    with pytest.raises(ShapeError, match="batches of 3 datapoints for shards of 2"):
        dataset.get_batch(0, 3)
    dataset.close()
    with pytest.raises(ClosedError, match="OptDataset is closed"):
        dataset.get_batch(0, 2)


@pytest.mark.parametrize(
    "data, labels, shard, error, message",
    [
        (X, Y[:-1], 1, ShapeError, "23 labels for 24 datapoints"),
        (X, Y, 5, ShapeError, "24 datapoints are not a multiple of ndata_shard = 5"),
        (X, Y, 0, ShapeError, "not a multiple of ndata_shard = 0"),
        (X[:0], None, 1, ShapeError, "data of shape .0, 5. have no datapoints"),
        (np.float32(1), None, 1, ShapeError, "data of shape .. have no datapoints"),
        (X, Y[:, :0], 1, ShapeError, "labels of shape .24, 0. have no datapoints"),
        (X > 0, Y, 1, DTypeError, "ggml has no type for data of bool"),
        (X, ["a"] * 24, 1, DTypeError, "ggml has no type for labels of"),
    ],
)
def test_wrong_datasets(data, labels, shard, error, message):
    with pytest.raises(error, match=message):
        OptDataset(data, labels, ndata_shard=shard)


@pytest.mark.parametrize(
    "dataset, split, message",
    [
        ((X[:, :4], Y), -1, "datapoints of 4 elements of F32 for inputs"),
        ((X.astype("d"), Y), -1, "datapoints of 5 elements of F64 for inputs"),
        ((X, None), -1, "the loss MEAN_SQUARED_ERROR needs labels"),
        ((X, Y[:, :2]), -1, "2 labels of F32 for each datapoint"),
        ((X, Y.astype("d")), -1, "3 labels of F64 for each datapoint"),
        ((X[:22], Y[:22]), -1, "22 datapoints to train with and 0 others are not multiples of 4"),
        ((X, Y), 6, "6 datapoints to train with and 18 others are not multiples of 4"),
        ((X, Y), 28, "28 datapoints to train with and -4 others"),
    ],
)
def test_datasets_that_do_not_fit(linear, dataset, split, message):
    with pytest.raises(ShapeError, match=message):
        linear.opt().epoch(OptDataset(*dataset), idata_split=split)


def test_shards_that_do_not_fit(linear):
    with pytest.raises(ShapeError, match="batches of 4 datapoints for shards of 8"):
        linear.opt().epoch(OptDataset(X, Y, ndata_shard=8))
    with pytest.raises(ShapeError, match="the loss SUM has no labels"):
        Linear(linear.sched.backends[0]).opt(loss_type=OptLossType.SUM).epoch(OptDataset(X, Y))


def test_wrong_contexts(linear, backend):
    other = Linear(backend)
    with pytest.raises(ParameterError, match="inputs and outputs are given both"):
        OptContext(linear.sched, linear.inputs)
    with pytest.raises(ParameterError, match="opt_period must be 1 to"):
        linear.opt(opt_period=0)
    with pytest.raises(ParameterError, match="the optimiser must be AdamW or SGD"):
        linear.opt(optimizer="adam")
    with pytest.raises(ShapeError, match="are not computed from inputs"):
        OptContext(linear.sched, other.inputs, linear.outputs)
    with pytest.raises(ShapeError, match="inputs must be a leaf"):
        OptContext(linear.sched, linear.outputs, linear.outputs)
    with pytest.raises(ShapeError, match="no node is a parameter"):
        plain = Context(Context.size_for(4))
        x = Tensor.from_numpy(plain, X[:4].copy())
        OptContext(linear.sched, x, ops.scale(plain, x, 2.0), loss_type=MSE)
    with pytest.raises(AllocError, match="for a scheduler of 8"):
        OptContext(Sched([backend], 8), linear.inputs, linear.outputs, loss_type=MSE)
    opt = linear.opt()
    with pytest.raises(BackendError, match="this scheduler serves a graph already"):
        linear.opt()
    with pytest.raises(BackendError, match="serves a graph already"):
        linear.sched.alloc_graph(CGraph(Context(Context.size_for(1, 8)), 8))
    opt.close()
    opt.close()
    linear.opt().close()


def test_parameters_must_be_writable(backend, tmp_path):
    linear = Linear(backend)
    ctx = Context(Context.size_for(4))
    w = Tensor.from_numpy(ctx, np.frombuffer(W.tobytes(), "f").reshape(3, 5), "frozen").set_param()
    with pytest.raises(DTypeError, match="parameter 'frozen' is in a read-only mapping"):
        OptContext(linear.sched, linear.inputs, ops.mul_mat(ctx, w, linear.inputs), loss_type=MSE)
    w = ctx.new_tensor(Type.F32, (5, 3), "nowhere").set_param()
    with pytest.raises(ClosedError, match="tensor 'nowhere' has no data"):
        OptContext(linear.sched, linear.inputs, ops.mul_mat(ctx, w, linear.inputs), loss_type=MSE)


def test_large_graphs_are_refused(backend):
    linear = Linear(backend)
    ctx = Context(Context.size_for(1600))
    cur = linear.outputs
    for _ in range(1500):
        cur = ops.scale(ctx, cur, 1.0)
    with pytest.raises(AllocError, match=r"a training step of \d+ nodes and leaves, for graphs of 2048"):
        OptContext(Sched([backend], 8192), linear.inputs, cur, loss_type=MSE)


def test_no_gradient(linear):
    with pytest.raises(ShapeError, match="ggml has no gradient"):
        OptContext(linear.sched, linear.inputs, ops.tanh(linear.weights, linear.outputs), loss_type=MSE)


def test_order_of_calls(linear):
    opt = linear.opt(opt_period=2)
    with pytest.raises(BackendError, match=r"eval: alloc\(\) comes first"):
        opt.eval()
    opt.alloc(backward=True)
    with pytest.raises(BackendError, match="the batch before was not evaluated"):
        opt.alloc(backward=True)
    opt.eval()
    with pytest.raises(BackendError, match="alloc: 1 of opt_period = 2 batches were trained with"):
        opt.alloc(backward=False)
    opt.alloc(backward=True)
    opt.eval()
    opt.alloc(backward=False)
    opt.eval()
    with pytest.raises(BackendError, match="must be a multiple of opt_period = 2"):
        opt.alloc(backward=True)
    with pytest.raises(BackendError, match="the graphs are static"):
        opt.prepare_alloc(_graph(), linear.inputs, linear.outputs)


def _graph():
    return CGraph(Context(Context.size_for(1, 8)), 8)


def test_results_are_of_one_kind(linear):
    result = OptResult()
    with linear.opt() as opt:
        opt.epoch(OptDataset(X, Y), result)
    linear.sched.reset()
    with linear.opt(loss_type=CE) as opt:
        with pytest.raises(ShapeError, match="eval: a result of"):
            opt.epoch(OptDataset(X, ONE_HOT), result)
        opt.epoch(OptDataset(X, ONE_HOT))  # nothing was left half done


def test_a_parameter_too_late(linear):
    extra = Tensor.from_numpy(linear.weights, np.ones((4, 3), "f"), "extra")
    opt = OptContext(linear.sched, linear.inputs, ops.add(linear.weights, linear.outputs, extra), loss_type=MSE)
    extra.set_param()
    with pytest.raises(ShapeError, match="'extra' was marked as a parameter, or as a loss, after the graphs were b"):
        opt.epoch(OptDataset(X, Y))


def test_a_loss_too_late(backend):
    """The gradient of a parameter that is marked as a loss would begin with 1."""
    ctx = Context(Context.size_for(8))
    w = Tensor.from_numpy(ctx, np.ones((1, 1), "f"), "w").set_param()
    inputs = Tensor.from_numpy(ctx, np.zeros((4, 1), "f"))
    opt = OptContext(Sched([backend]), inputs, w @ inputs, loss_type=MSE, opt_period=2)
    w.set_loss()
    with pytest.raises(ShapeError, match="'w' was marked as a parameter, or as a loss, after the graphs were built"):
        opt.epoch(OptDataset(np.ones((8, 1), "f"), np.ones((8, 1), "f")))


@pytest.mark.parametrize("opt_period", [1, 2])
def test_a_transposed_parameter(backend, opt_period):
    """Its gradient is permuted as it comes, which ggml's steps do not look at."""
    ctx = Context(Context.size_for(16))
    array = W.T.copy()
    w = Tensor.from_numpy(ctx, array, "w").set_param()
    inputs = Tensor.from_numpy(ctx, np.zeros((4, 5), "f"))
    options = {"loss_type": MSE, "optimizer": SGD(alpha=0.1, wd=0.0), "opt_period": opt_period}
    outputs = ops.mul_mat(ctx, ops.cont(ctx, ops.transpose(ctx, w)), inputs)
    if opt_period == 1:
        with pytest.raises(ShapeError, match=r"the gradient of parameter 'w' is permuted; put an ops\.reshape b"):
            OptContext(Sched([backend]), inputs, outputs, **options)
        transposed = ops.transpose(ctx, ops.reshape(ctx, w, 3, 5))
        outputs = ops.mul_mat(ctx, ops.cont(ctx, transposed), inputs)
    n = 4 * opt_period
    OptContext(Sched([backend]), inputs, outputs, **options).epoch(OptDataset(X[:n], Y[:n]))
    np.testing.assert_allclose(array, (W - 0.1 * mse_grad(W, X[:n], Y[:n])).T, atol=1e-6)


def trained_step(opt, w, which):
    """Return the loss of a dynamic step without training, of one of two graphs with the same numbers of nodes."""
    with Context(OptContext.size_for(40, 1024)) as ctx:
        graph, inputs = CGraph(ctx, 1024), ctx.new_tensor(Type.F32, (4, 1)).set_input()
        first = ops.mul(ctx, ops.sqr(ctx, inputs), w)
        last = ops.scale(ctx, ops.scale(ctx, first, 2.0), 2.0)
        outputs = graph.expand(ops.add(ctx, last, last if which == "a" else first))
        opt.prepare_alloc(graph, inputs, outputs)
        opt.alloc(backward=False)
        inputs.set_data(np.arange(4, dtype="f"))
        opt.eval()
        return opt.loss.to_numpy().item()


def test_a_step_that_looks_like_the_one_before(backend):
    w = Tensor.from_numpy(Context(Context.size_for(1)), np.ones((1, 4), "f")).set_param()
    with OptContext(Sched([backend]), loss_type=OptLossType.SUM) as opt:
        assert [trained_step(opt, w, which) for which in "aba"] == [8 * 14, 5 * 14, 8 * 14]


def test_training_what_was_allocated_for_another_graph(backend):
    """The allocator lets its nodes share memory, which training would copy."""
    leaves, ctx = Context(Context.size_for(4)), Context(Context.size_for(16, 64))
    w = Tensor.from_numpy(leaves, W.copy()).set_param()
    inputs = Tensor.from_numpy(leaves, np.zeros((4, 5), "f"))
    outputs = ops.sqr(ctx, ops.sqr(ctx, ops.mul_mat(ctx, w, inputs)))
    graph, allocr = CGraph(ctx, 64), GAllocr(backend.device.buffer_type)
    graph.expand(outputs)
    allocr.alloc_graph(graph)
    with pytest.raises(BackendError, match="was allocated with another graph, and shares its memory: it cannot be tra"):
        OptContext(Sched([backend]), inputs, outputs, loss_type=MSE)


def test_a_parameter_that_was_marked_after_expand(backend):
    leaves, ctx = Context(Context.size_for(4)), Context(OptContext.size_for(16, 512))
    late, other = (Tensor.from_numpy(leaves, np.ones((1, 1), "f"), name) for name in ("late", "other"))
    graph, inputs = CGraph(ctx, 512), ctx.new_tensor(Type.F32, (1, 8)).set_input()
    outputs = graph.expand(ops.add(ctx, ops.mul_mat(ctx, late, inputs), other.set_param()))
    late.set_param()
    with OptContext(Sched([backend]), loss_type=MSE) as opt:
        with pytest.raises(ShapeError, match=r"^prepare_alloc: parameter 'late' was marked after CGraph.expand\(\)$"):
            opt.prepare_alloc(graph, inputs, outputs)


def test_a_factor_that_was_exchanged(linear):
    """Static graphs have the factor that a node had when ggml copied them."""
    ctx = Context(Context.size_for(16, 64))
    graph = CGraph(ctx, 64)
    slots = Slots(graph)
    table = Tensor.from_numpy(linear.weights, np.eye(3, dtype="f"))
    scaled = slots.add_scale(ops.scale(ctx, linear.outputs, 1.0))
    out = graph.expand(ops.mul_mat(ctx, slots.add(table), scaled))
    slots.seal()
    opt = OptContext(linear.sched, linear.inputs, out, loss_type=MSE)
    opt.epoch(OptDataset(X, Y))
    slots.bind(TensorTable([table], [2.0]))
    with pytest.raises(BackendError, match=r"^the parameters of .*SCALE.* have changed since the graphs were built$"):
        opt.epoch(OptDataset(X, Y))


def test_datapoints_are_counted_whatever_the_outputs_are(linear):
    result = OptResult()
    flat = ops.reshape(linear.ctx, linear.outputs, 12)
    with OptContext(linear.sched, linear.inputs, flat, loss_type=MSE) as opt:
        opt.epoch(OptDataset(X, Y), result)
    assert result.ndata == len(X)


def test_an_array_of_labels_keeps_training_open(linear):
    opt = linear.opt()
    labels = opt.labels.to_numpy()
    with pytest.raises(BusyError, match=r"^OptContext cannot be closed: 1 array\(s\) still show its memory$"):
        opt.close()
    del labels
    opt.epoch(OptDataset(X, Y))
    opt.close()


@pytest.mark.parametrize("beta", [1, 1 - 1e-9])
def test_betas_by_which_steps_would_divide_by_0(beta):
    for name in ("beta1", "beta2"):
        with pytest.raises(ParameterError, match=f"^AdamW: {name} must be 0 to 0.99999994, not "):
            AdamW(**{name: beta})
    assert AdamW(alpha=np.float32(0.5)).alpha == 0.5


def test_graphs_of_what_ggml_has_built(linear):
    opt = linear.opt()
    opt.epoch(OptDataset(X, Y))
    ctx = opt.loss.ctx
    for size in (1, 2, 4):
        with pytest.raises(AllocError, match=f"^a graph of {size} nodes is too small for 'loss_mean_squared_error'"):
            CGraph(ctx, size).expand(opt.loss)


def test_inputs_that_another_computation_uses(linear, backend):
    opt, found = linear.opt(), []

    def train(out, array):
        try:
            opt.epoch(OptDataset(X, Y))
        except BusyError as exc:
            found.append(str(exc))
        out[...] = array

    ctx = Context(Context.size_for(8, 8))
    graph = CGraph(ctx, 8)
    graph.expand(ops.map_custom1(ctx, linear.inputs, train))
    GAllocr(backend.device.buffer_type).alloc_graph(graph)
    graph.compute(Backend(n_threads=1))
    assert found == ["tensor 'inputs' cannot be written: a computation uses its memory"]


def test_rows_that_are_not_there(backend):
    ctx = Context(Context.size_for(8))
    table = Tensor.from_numpy(ctx, W.copy(), "table").set_param()
    ids = Tensor.from_numpy(ctx, np.zeros((4, 1), "i"), "ids")
    outputs = ops.get_rows(ctx, table, ops.reshape(ctx, ids, 4))
    opt = OptContext(Sched([backend]), ids, outputs, loss_type=MSE)
    opt.epoch(OptDataset(np.int32([[0], [1], [2], [1]]), np.zeros((4, 5), "f")))
    with pytest.raises(IndexRangeError, match="picks row 3 of 3"):
        opt.epoch(OptDataset(np.int32([[0], [1], [3], [1]]), np.zeros((4, 5), "f")))
    opt.epoch(OptDataset(np.int32([[0], [1], [2], [1]]), np.zeros((4, 5), "f")))  # nothing was left half done


def test_an_abort_flag_is_heard(linear, backend):
    opt = linear.opt()
    backend.abort_flag = True
    try:
        with pytest.raises(ComputeAborted, match="training: stopped by an abort flag"):
            opt.epoch(OptDataset(X, Y))
    finally:
        backend.abort_flag = False


def test_closed_owners(linear):
    opt = linear.opt()
    dataset = OptDataset(X, Y)
    linear.weights.close()
    with pytest.raises(ClosedError, match="Context of this Tensor is closed"):
        opt.epoch(dataset)
    opt.close()
    with pytest.raises(ClosedError, match="OptContext is closed"):
        opt.epoch(dataset)
    with pytest.raises(ClosedError, match="OptContext is closed"):
        opt.labels


def test_what_it_uses_lives_on(backend):
    def make():
        linear = Linear(backend)
        return linear.opt(), linear.array

    opt, array = make()
    gc.collect()
    labels = opt.labels
    opt.epoch(OptDataset(X, Y))
    assert not np.array_equal(array, W)
    opt.close()
    with pytest.raises(ClosedError):
        labels.set_data(bytes(48))


@pytest.mark.parametrize("values", [{"alpha": 0}, {"alpha": float("nan")}, {"alpha": "x"}, {"wd": 2}, {"wd": -1}])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_wrong_parameters(kind, values):
    with pytest.raises(ParameterError, match=f"{kind.__name__}: {next(iter(values))} must be"):
        kind(**values)


def test_the_optimiser_stays(linear):
    kinds = iter([SGD(), AdamW()])
    opt = linear.opt(optimizer=lambda epoch: next(kinds))
    with pytest.raises(ParameterError, match="the optimiser must be SGD, not AdamW"):
        opt.epoch(OptDataset(X, Y))


def test_memory_is_freed(backend):
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    dataset = OptDataset(X, Y)
    for i in range(60):
        linear = Linear(backend)
        linear.opt().epoch(dataset)
        if i == 20:
            before = peak()
    assert peak() - before < 20_000  # KB; one context of graphs is 0.6 MB


@pytest.mark.parametrize("base", [OptContext, OptDataset, OptResult], ids=lambda base: base.__name__)
def test_no_class_can_be_derived(base):
    with pytest.raises(TypeError, match="is not an acceptable base type"):
        type("Derived", (base,), {})


def test_the_scheduler_is_not_reset_meanwhile(linear):
    """It is for the optimiser until that is closed, also between the steps of dynamic graphs."""
    sched = linear.sched
    for make in (linear.opt, lambda: OptContext(sched, loss_type=MSE)):
        opt = make()
        for _ in range(2):
            with pytest.raises(BackendError, match="close the Context of the scheduler's graph first"):
                sched.reset()
            opt.epoch(OptDataset(X, Y)) if opt.static_graphs else dynamic_step(opt, linear, slice(4))
        opt.close()
        sched.reset()


@pytest.mark.parametrize("static", [True, False])
def test_a_graph_of_the_scheduler_is_closed_first(linear, static):
    def make():
        return linear.opt() if static else OptContext(linear.sched, loss_type=MSE)

    with Context(Context.size_for(4, 8)) as left:
        graph = CGraph(left, 8)
        graph.expand(ops.scale(left, left.new_tensor(Type.F32, (4,)).set_input(), 2.0))
        linear.sched.reserve(graph)
        with pytest.raises(BackendError, match="close the Context of the graph that the scheduler had before"):
            make()
    make().close()


def test_where_tensors_were_to_be_is_forgotten(python):
    """As ggml does: a leaf that is first seen through a view had no place, and ggml ended the process."""
    python(
        PRELUDE
        + """
        ctx = Context(Context.size_for(16, 64))
        leaf = ctx.new_tensor(Type.F32, (5, 4))
        sched.set_tensor_backend(leaf, sched.backends[0])
        opt = OptContext(sched, inputs, outputs, loss_type=OptLossType.MEAN)
        opt.epoch(OptDataset(np.ones((4, 5), "f")))
        opt.close()
        graph = CGraph(ctx, 64)
        graph.expand(ops.scale(ctx, ops.reshape(ctx, leaf, 4, 5), 2.0))
        sched.alloc_graph(graph)
        """
    )


PRELUDE = """
        sched = Sched([Backend(n_threads=1)])
        weights = Context(Context.size_for(8))
        w = Tensor.from_numpy(weights, np.ones((3, 5), "f"), "w").set_param()
        inputs = Tensor.from_numpy(weights, np.zeros((4, 5), "f"), "inputs")
        outputs = w @ inputs
"""


def test_numbers_of_an_optimiser_are_those_that_were_checked(python):
    """In a process of its own: ggml aborts on them."""
    python(
        PRELUDE
        + """
        class Changing(AdamW):
            alpha = property(lambda self: float("nan"))
        class Large(float):
            __le__ = __ge__ = lambda self, other: True
        odd = object.__new__(Changing)
        spoilt = AdamW()
        object.__setattr__(spoilt, "beta1", 2.0)
        for name in ("beta1", "beta2", "eps", "wd"):
            object.__setattr__(odd, name, 0.5)
        for make in (lambda: odd, lambda: spoilt, lambda: AdamW(wd=Large(-1)), lambda: SGD(alpha=Large("nan"))):
            try:
                each = make()
                opt = OptContext(sched, inputs, outputs, loss_type=OptLossType.MEAN, optimizer=each)
                opt.epoch(OptDataset(np.ones((4, 5), "f")))
            except ParameterError as exc:
                assert " must be " in str(exc), exc
            else:
                raise SystemExit(f"{each} was taken")
        """
    )


def test_an_optimiser_of_a_derived_class(linear):
    class Mine(AdamW):
        pass

    opt = linear.opt(optimizer=Mine())
    opt.epoch(OptDataset(X, Y))  # with AdamW's two moments, which SGD has not
    assert not np.array_equal(linear.array, W)
    sgd = Linear(linear.sched.backends[0])
    sgd.opt(optimizer=SGD()).epoch(OptDataset(X, Y))
    assert not np.array_equal(linear.array, sgd.array)


def test_no_marks_after_prepare_alloc(python):
    """In a process of its own: ggml aborts on a loss of our own."""
    python(
        PRELUDE
        + """
        opt = OptContext(sched, loss_type=OptLossType.SUM)
        ctx = Context(OptContext.size_for(16, 512))
        graph = CGraph(ctx, 512)
        x = ctx.new_tensor(Type.F32, (5, 4)).set_input()
        out = graph.expand(ops.sum(ctx, ops.mul_mat(ctx, w, x)))
        opt.prepare_alloc(graph, x, out)
        out.set_loss()
        try:
            opt.alloc(backward=True)
        except ShapeError as exc:
            assert "was marked as a parameter, or as a loss, after the graphs were built" in str(exc), exc
        else:
            raise SystemExit("it was taken")
        """
    )


@pytest.mark.parametrize("owner", ["weights", "outputs", "sched", "backend"])
def test_reset_after_an_owner_was_closed(owner):
    with Backend(n_threads=1) as backend:
        linear = Linear(backend)
        opt = linear.opt(opt_period=2)
        {"weights": linear.weights, "outputs": linear.outputs.ctx, "sched": linear.sched, "backend": backend}[
            owner
        ].close()
        for optimizer in (False, True):
            with pytest.raises(ClosedError, match="is closed"):
                opt.reset(optimizer=optimizer)
        opt.close()


def test_data_that_has_moved(linear):
    """Static graphs have the address that a slot's data had."""
    ctx = Context(Context.size_for(16, 64))
    graph = CGraph(ctx, 64)
    slots = Slots(graph)
    tables = [Tensor.from_numpy(Context(Context.size_for(1)), np.eye(3, dtype="f")) for _ in range(2)]
    out = graph.expand(ops.mul_mat(ctx, slots.add(tables[0]), linear.outputs))
    opt = OptContext(linear.sched, linear.inputs, out, loss_type=MSE)
    opt.epoch(OptDataset(X, Y))
    slots.seal()
    slots.bind(TensorTable(tables[1:]))
    with pytest.raises(BackendError, match=r"the data of tensor .* has moved since the graphs were built"):
        opt.epoch(OptDataset(X, Y))
    slots.bind(TensorTable(tables[:1]))
    opt.epoch(OptDataset(X, Y))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no masks")
def test_an_error_after_a_batch_loses_no_count(monkeypatch):
    """What ggml has added to a result is counted, so that pred has room for it."""
    backend = Backend(threadpool=Threadpool(1, cpumask=[min(os.sched_getaffinity(0))]))
    opt, result, dataset = Linear(backend).opt(loss_type=CE), OptResult(), OptDataset(X[:8], ONE_HOT[:8])

    def fail(*args):
        raise OSError("no such processor")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no such processor"):
        patched.setattr(os, "sched_setaffinity", fail)
        opt.epoch(dataset, result)
    assert (len(result.pred), result.ndata) == (4, 4)
    opt.epoch(dataset, result)
    assert (len(result.pred), result.ndata) == (12, 12)


def test_numbers_are_integers(linear):
    opt, dataset = linear.opt(), OptDataset(X, Y)
    for use in (
        lambda: dataset.shuffle(opt, 1.5),
        lambda: dataset.get_batch(0.5, 4),
        lambda: dataset.get_batch(0, 4.0),
        lambda: opt.epoch(dataset, idata_split=4.5),
        lambda: OptDataset(X, Y, ndata_shard=1.5),
        lambda: OptContext.size_for(1.5, 8),
        lambda: OptContext(linear.sched, opt_period=1.5),
        lambda: fit(linear.sched, linear.inputs, linear.outputs, dataset, nepoch=1.5),
        lambda: fit(linear.sched, linear.inputs, linear.outputs, dataset, nbatch_logical=4.5),
    ):
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            use()
    for n in (-1, 1 << 40):
        with pytest.raises(ShapeError, match=f"size_for: {n} tensors, not 0 to"):
            OptContext.size_for(n, 8)
    with pytest.raises(ShapeError, match="a graph of -1 nodes"):
        OptContext.size_for(8, -1)


def test_calls_within_calls(linear):
    """Callbacks and optimisers that train, without end or after the end."""
    opt, dataset = linear.opt(), OptDataset(X, Y)

    def again(*args):
        opt.epoch(dataset, callback_train=again)

    with pytest.raises(RecursionError):
        opt.epoch(dataset, callback_train=again)
    opt.epoch(dataset)
    opt.close()

    def optimizer(epoch):
        if epoch > 1:
            opt.close()
        return SGD()

    opt = linear.opt(optimizer=optimizer)
    opt.epoch(dataset)
    with pytest.raises(ClosedError, match="OptContext is closed"):
        opt.epoch(dataset)


def test_a_finaliser_that_closes(python):
    """The collector may call it wherever an object is made, up to Python 3.11 also within our own code."""
    python(
        PRELUDE
        + """
        import gc
        class Cycle:
            def __init__(self):
                self.me = self
            def __del__(self):
                try:
                    (opt.close, sched.close, dataset.close)[k % 3]()
                except BusyError:
                    pass
        gc.set_threshold(3, 1, 1)
        for k in range(60):
            sched, dataset, result = Sched([Backend(n_threads=1)]), OptDataset(np.ones((24, 5), "f")), OptResult()
            opt = OptContext(sched, inputs, outputs, loss_type=OptLossType.SUM)
            try:
                for _ in range(3):
                    Cycle()
                    opt.epoch(dataset, result)
                    dataset.shuffle(opt)
                    dataset.get_batch(0, 4)
                    opt.reset(optimizer=True)
            except ClosedError:
                pass
        """
    )


def test_marking_the_tensors_of_a_training(linear):
    opt = linear.opt()
    with pytest.raises(BackendError, match=r"^tensor 'labels' is an OptContext's, and cannot be changed$"):
        opt.labels.set_param()


def test_writing_what_a_step_uses(python):
    """Indices are read when it starts, whatever becomes of the array; nobody else writes into the tensor."""
    out = python("""
        import threading
        from pyggml_adapt.ggml import ops
        from pyggml_adapt.ggml.opt import OptContext, OptLossType
        ctx, n = Context(Context.size_for(64)), 4000
        good, bad = np.arange(n, dtype="i") % 8, np.full(n, 1 << 28, "i")
        w = ctx.new_tensor(Type.F32, (256, 8)).set_param()
        x, ids = ctx.new_tensor(Type.F32, (256, 64)).set_input(), ctx.new_tensor(Type.I32, (n,)).set_input()
        array = good.copy()
        shown = Tensor.from_numpy(ctx, array, "shown")
        ctx.alloc_tensors(Device.cpu().buffer_type)
        w.set_data(np.ones((8, 256), "f")), x.set_data(np.ones((64, 256), "f")), ids.set_data(good)
        out = ops.mul_mat(ctx, ops.add(ctx, ops.get_rows(ctx, w, ids), ops.get_rows(ctx, w, shown)), x)
        opt = OptContext(Sched([Backend(n_threads=1)], 8192), x, out, loss_type=OptLossType.MEAN)
        done, counts = threading.Event(), {"busy": 0, "wrong": 0, "step": 0}

        def write():
            while not done.wait(1e-4):
                for data in (bad, good):
                    array[:] = data
                    try:
                        ids.set_data(data)
                    except BusyError:
                        counts["busy"] += 1

        thread = threading.Thread(target=write)
        thread.start()
        while min(counts["busy"], counts["step"]) < 20:
            try:
                opt.alloc(backward=True)
            except (IndexRangeError, BackendError):
                pass
            try:
                opt.eval()
                counts["step"] += 1
            except (IndexRangeError, BackendError):
                counts["wrong"] += 1
        done.set()
        thread.join()
        print("ok")
    """)
    assert out == "ok\n"


def test_what_a_training_needs_is_gone(backend):
    """Operands in another Context that was closed, before each call that looks at them."""

    def prepared():
        home, ctx = Context(Context.size_for(4)), Context(OptContext.size_for(8, 256))
        w = Tensor.from_numpy(home, np.ones((3, 4), "f")).set_param()
        graph, inputs = CGraph(ctx, 256), ctx.new_tensor(Type.F32, (4, 2)).set_input()
        return home, w, graph, inputs, graph.expand(ops.mul_mat(ctx, w, inputs))

    gone = r"^Context is closed$"
    home, _, graph, inputs, outputs = prepared()
    opt = OptContext(Sched([backend]), loss_type=OptLossType.MEAN)
    opt.prepare_alloc(graph, inputs, outputs)
    home.close()
    with pytest.raises(ClosedError, match=gone):
        opt.alloc(backward=True)

    home, _, graph, inputs, outputs = prepared()
    home.close()
    with pytest.raises(ClosedError, match=gone):
        OptContext(Sched([backend]), loss_type=OptLossType.MEAN).prepare_alloc(graph, inputs, outputs)
    with pytest.raises(ClosedError, match=gone):
        OptContext(Sched([backend]), inputs, outputs, loss_type=OptLossType.MEAN)

    home, w, graph, inputs, outputs = prepared()
    opt = OptContext(Sched([backend]), loss_type=OptLossType.MEAN, opt_period=1)
    opt.prepare_alloc(graph, inputs, outputs)
    opt.alloc(backward=True)
    inputs.ctx.close()
    with pytest.raises(ClosedError, match=gone):
        opt.grad_acc(w)


def test_training_what_another_graph_computes_with(linear, backend):
    outputs = ops.mul_mat(linear.ctx, linear.w, linear.inputs)
    opt, raised = OptContext(linear.sched, linear.inputs, outputs, loss_type=MSE), []
    ctx = Context(Context.size_for(64, 64))
    graph = CGraph(ctx, 64)

    def meanwhile(dst, src):
        dst[:] = src
        with pytest.raises(BusyError, match=r"^compute: the graph writes into memory of a Buffer that another computa"):
            opt.alloc(backward=True)
        raised.append(True)

    graph.expand(ops.map_custom1(ctx, linear.w, meanwhile).set_output())
    GAllocr(backend.device.buffer_type).alloc_graph(graph)
    with Backend(n_threads=1) as own:
        graph.compute(own)
    assert raised == [True]
    opt.epoch(OptDataset(X, Y))
