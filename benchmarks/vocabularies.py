"""The vocabularies that are measured: the pinned release's, which were trained on real text, or some trained here."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from text import STYLES, make_text

from pyggml_adapt.ggml import GGUFWriter

ROOT = Path(__file__).resolve().parent.parent
INSIDE = "vendor/llama.cpp/models/ggml-vocab-"
RELEASED = {
    "SentencePiece, 32 k": "llama-spm",
    "byte-level, 32 k": "deepseek-coder",
    "byte-level, 128 k": "llama-bpe",
    "byte-level, 152 k": "qwen2",
}
TRAINED = {"byte-level, 32 k": ("default", 32000), "byte-level, 152 k": ("qwen2", 151936)}  # pre-tokenizer, tokens
N_TRAINING = 1 << 20  # bytes of each style


def vocabularies(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, str], str]:
    """Return the paths of the vocabularies' GGUF files, kept in a folder, and what to say of where they come from."""
    released = {label: folder / "models" / f"ggml-vocab-{name}.gguf" for label, name in RELEASED.items()}
    if not all(path.exists() for path in released.values()) and not _unpack(folder, say):
        made = _train(folder, say)
        return made, "trained on text of the same kinds, since pip cannot fetch those of llama.cpp's release"
    return {label: str(path) for label, path in released.items()}, "those of llama.cpp's release, trained on real text"


def _unpack(folder: Path, say: Callable[[str], None]) -> bool:
    """Return whether pip could fetch the release that is pinned, whose vocabularies are then in folder/models."""
    say("fetching the pinned release for its vocabularies ...")
    spec = importlib.util.spec_from_file_location("unpack", ROOT / "vendor" / "ggml" / "unpack.py")
    assert spec is not None and spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            archive = unpack.download(Path(scratch))
        except subprocess.CalledProcessError:
            return False
        unpack.extract(archive, folder, tuple(f"{INSIDE}{name}.gguf" for name in RELEASED.values()))
    return True


def _train(folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Return the paths of vocabularies trained on text that is made here."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {label: folder / f"{label.replace(' ', '')}.gguf" for label in ("SentencePiece, 32 k", *TRAINED)}
    if not all(path.exists() for path in paths.values()):
        say("training vocabularies ...")
        text = [make_text(style, N_TRAINING, seed=-1) for style in STYLES]
        for label, (pre, n_vocab) in TRAINED.items():
            _train_bytes(paths[label], text, pre, n_vocab)
        _train_pieces(paths["SentencePiece, 32 k"], text, 32000)
    return {label: str(path) for label, path in paths.items()}


def _write(path: Path, model: str, tokens: list[str], types: list[int], more: dict[str, tuple[object, str]]) -> None:
    writer = GGUFWriter()
    writer.set("general.architecture", "llama", "str")
    writer.set("tokenizer.ggml.model", model, "str")
    writer.set("tokenizer.ggml.tokens", tokens, "str")
    writer.set("tokenizer.ggml.token_type", types, "i32")
    for key, (value, type) in more.items():
        writer.set(f"tokenizer.ggml.{key}", value, type)
    writer.write(path, {}, overwrite=True)


def _train_bytes(path: Path, text: list[str], pre: str, n_vocab: int) -> None:
    """Write a byte-level vocabulary; what the text gives no merges for is filled up with pairs of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    found = tokenizer.get_vocab()
    tokens, merges, rng = sorted(found, key=found.__getitem__), _merges(tokenizer), random.Random(1)
    while len(tokens) < n_vocab - 2:
        left, right = rng.choices(tokens, k=2)
        if left + right not in found and len(left + right) < 16:
            found[left + right] = len(tokens)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    ends = {"bos_token_id": (n_vocab - 2, "u32"), "eos_token_id": (n_vocab - 1, "u32")}
    tokens += ["<|im_start|>", "<|im_end|>"]
    types = [1] * (n_vocab - 2) + [3, 3]
    _write(path, "gpt2", tokens, types, {"pre": (pre, "str"), "merges": (merges, "str"), **ends})


def _train_pieces(path: Path, text: list[str], n_vocab: int) -> None:
    """Write a SentencePiece vocabulary: the pieces in the order of their merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=n_vocab - 259, show_progress=False))
    found = tokenizer.get_vocab()
    pieces = sorted(found, key=found.__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    _write(path, "llama", tokens, types, {"scores": (scores, "f32")})


def _merges(tokenizer: object) -> list[str]:
    """Return a trained tokenizer's merges as GGUF has them."""
    import json

    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
