"""Train a small network to read digits that are drawn here, until it knows over 95 % of those it has never seen.

usage: python train_mlp.py [EPOCHS]
"""

from __future__ import annotations

import sys

import numpy as np

from pyggml_adapt.ggml import AdamW, Backend, Context, OptContext, OptDataset, OptResult, Sched, Tensor, fit, ops
from pyggml_adapt.ggml.opt import progress

SIDE, N_HIDDEN, N_BATCH = 16, 128, 50
# The seven strokes of a digit on a clock, as ends (x, y) in a box of 1 x 2, and which of them each digit has.
STROKES = [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 1), (1, 1)), ((0, 1), (0, 2)), ((1, 1), (1, 2)),
           ((0, 2), (1, 2))]  # fmt: skip
DIGITS = ["012456", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356"]


def draw(digit: int, rng: np.random.Generator) -> np.ndarray:
    """Return one digit [SIDE, SIDE] of 0 to 1: moved, slanted, stretched, thick or thin, and noisy."""
    y, x = np.mgrid[:SIDE, :SIDE]
    width, height = rng.uniform(4, 7), rng.uniform(4, 6)
    left, top, slant = rng.uniform(3, 13 - width), rng.uniform(1, 14 - 2 * height), rng.uniform(-0.2, 0.2)
    thickness = rng.uniform(0.5, 1.2)
    image = np.zeros((SIDE, SIDE))
    for stroke in DIGITS[digit]:
        ends = np.array(STROKES[int(stroke)]) * (width, height) + (left, top) + rng.normal(0, 0.2, (2, 2))
        ends[:, 0] += slant * (top + height - ends[:, 1])
        a, along = ends[0], ends[1] - ends[0]
        t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / (along @ along), 0, 1)
        distance = np.hypot(x - a[0] - t * along[0], y - a[1] - t * along[1])
        image = np.maximum(image, np.clip(1 + thickness - distance, 0, 1))
    return image + rng.normal(0, 0.1, image.shape)


def digits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return n images [n, SIDE * SIDE], and which digits they are [n, 10], one 1 in each row."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 10, n)
    images = np.stack([draw(digit, rng).ravel() for digit in which])
    return images.astype(np.float32), np.eye(10, dtype=np.float32)[which]


def network(ctx: Context) -> tuple[Tensor, Tensor]:
    """Return the inputs and outputs of two layers with ReLU between, their weights random."""
    rng = np.random.default_rng(1)

    def param(*shape: int) -> Tensor:
        scale = np.sqrt(2 / shape[-1]) if len(shape) > 1 else 0
        return Tensor.from_numpy(ctx, (scale * rng.standard_normal(shape)).astype(np.float32)).set_param()

    inputs = Tensor.from_numpy(ctx, np.zeros((N_BATCH, SIDE * SIDE), np.float32))
    hidden = ops.relu(ctx, param(N_HIDDEN, SIDE * SIDE) @ inputs + param(N_HIDDEN))
    return inputs, param(10, N_HIDDEN) @ hidden + param(10)


def optimizer(epoch: int) -> AdamW:
    """Return the parameters of an epoch: smaller steps from one to the next."""
    return AdamW(alpha=0.003 * 0.85**epoch, wd=0.02)


def main() -> None:
    n_epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    train, held_out = OptDataset(*digits(20_000, seed=2)), OptDataset(*digits(1000, seed=3))
    inputs, outputs = network(Context(Context.size_for(16)))
    sched = Sched([Backend(n_threads=1)])
    fit(sched, inputs, outputs, train, optimizer=optimizer, nepoch=n_epochs, val_split=0.1, callback=progress)
    result = OptResult()
    with OptContext(sched, inputs, outputs) as opt:
        opt.epoch(held_out, result_eval=result, idata_split=0)
    print(f"held-out digits: {result.accuracy[0]:.1%} right, uncertainty {result.accuracy[1]:.1%}")
    if result.accuracy[0] <= 0.95:
        raise SystemExit("not enough")


if __name__ == "__main__":
    main()
