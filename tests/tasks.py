"""Three tasks that differ from each other in which tensors they change, which they have, and in types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

COMMON = {"type": "Q8_0", "n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1, "n_layer": 3}
TASKS = {
    "base": {},
    "code": {"changed": {r"blk\.[12]\.attn_[qkvo]": 1}},                                # a part of the linears
    "sum": {"changed": {"ffn_down|norm": 2}, "optional": r"\.bias"},                    # tied head, biases
    "tone": {"changed": {r"blk\.1\.|token_embd": 3}, "types": {r"blk\.1\.attn_v": "F16"}},  # embedding, another type
}  # fmt: skip


def task_models(tiny_gguf: Callable[..., Path]) -> dict[str, Path]:
    """Return the whole model of each task."""
    return {task: tiny_gguf(**{**COMMON, **variant}) for task, variant in TASKS.items()}
