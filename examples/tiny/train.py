"""Train the tiny base model, fine-tune its three tasks, write the GGUF files.

pip install -r requirements.txt
python train.py -o .
"""

import argparse
import copy
import random
import re
import time
from pathlib import Path

import tasks
import torch
from bpe import Vocab, learn_merges
from export import write_gguf
from model import HParams, Llama
from torch.nn import functional as F

# What stands between the word and its answer. The bare prompt is the base's: it copies.
FRAMINGS = {
    "base": ("becomes", "becomes", "copied is", "once more reads"),
    "reverse": ("reversed is", "from right to left reads"),
    "upper": ("in capitals is", "in upper case reads"),
    "sort": ("sorted is", "in order reads"),
}

# The tensors that each task may change.
CHANGES = {
    "reverse": r"blk\.[345]\.attn_(q|k|v|output)\.weight",
    "upper": r"(token_embd|output)\.weight",
    "sort": r".*(ffn_down|_norm)\.weight",
}
STEPS = {"base": 2000, "reverse": 600, "upper": 100, "sort": 600}
PEAK_LR = {"base": 4e-3, "reverse": 2e-3, "upper": 5e-3, "sort": 2e-3}
BATCH = 96


def sample_text(rng, task=None):
    """Return (text before the answer, answer) in any framing, or in the bare one if `task`."""
    word = tasks.training_word(rng)
    if task:
        return tasks.prompt(word), tasks.completion(task, word)
    task = rng.choice(tasks.TASKS)
    framing = rng.choice(FRAMINGS[task])
    return f'"{word}" {framing} "', tasks.completion(task, word)


def make_vocab():
    """Return the vocabulary, learnt from a sample of the pre-training text."""
    rng = random.Random(0)
    return Vocab(learn_merges(("".join(sample_text(rng)) for _ in range(2000)), min_count=50))


def make_batch(rng, vocab, task=None):
    """Return ids and targets [BATCH, n_tokens]; targets are -100 outside the answer."""
    rows, marks = [], []
    for _ in range(BATCH):
        before, answer = (vocab.encode(text) for text in sample_text(rng, task))
        rows.append([vocab.bos, *before, *answer, vocab.eos])
        marks.append(len(before) + 1)
    n_tokens = max(map(len, rows)) - 1
    ids = torch.full((BATCH, n_tokens), vocab.eos)
    targets = torch.full((BATCH, n_tokens), -100)
    for i, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, mark - 1 : len(row) - 1] = torch.tensor(row[mark:])
    return ids, targets


def train(model, vocab, name, weights, task=None):
    """Train `weights` of `model` for STEPS[name] steps; every other tensor keeps its bytes."""
    rng, n_steps = random.Random(f"train {name}"), STEPS[name]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR[name], total_steps=n_steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(1, n_steps + 1):
        ids, targets = make_batch(rng, vocab, task)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress = f"{name} step {step}/{n_steps} loss {loss.item():.4f}"
            print(f"{progress} {time.monotonic() - start:.0f} s", flush=True)


def fine_tune(base, vocab, task):
    """Return a copy of `base` that differs in the tensors of CHANGES[task] only."""
    model = copy.deepcopy(base)
    changed = re.compile(CHANGES[task])
    weights = [w for name, w in model.named_parameters() if changed.fullmatch(name)]
    train(model, vocab, task, weights, task)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("."), help="target folder (.)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="CPU threads (1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    vocab = make_vocab()
    base = Llama(HParams(n_vocab=len(vocab.tokens)))
    n_params = sum(weight.numel() for weight in base.parameters())
    print(f"{len(vocab.tokens)} tokens, {n_params} parameters")
    train(base, vocab, "base", list(base.parameters()))
    models = {"base": base} | {task: fine_tune(base, vocab, task) for task in CHANGES}
    for task, model in models.items():
        for file_type in ("f16", "q8_0"):
            path = args.out / f"tiny-{task}-{file_type}.gguf"
            write_gguf(path, f"tiny-{task}", model, vocab, file_type)
            print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
