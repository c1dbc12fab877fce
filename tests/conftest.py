"""Fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import Tiny, write_tiny

import pyggml_adapt as pga

ROOT = Path(__file__).parents[1]
VOCAB_PREFIXES = ("vendor/llama.cpp/models/ggml-vocab-", "vendor/llama.cpp/models/templates/")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run in an empty folder: a Python started in the repository would import the sources, not what is installed."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Take Ctrl-C even where a shell has started the tests in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes the model that Tiny(arch, **variant) describes, once, and returns its path."""
    directory = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(arch: str = "llama", **variant: object) -> Path:
        tiny = Tiny(arch, **variant)  # type: ignore[arg-type]
        if repr(tiny) not in made:
            made[repr(tiny)] = write_tiny(directory / f"tiny-{len(made)}.gguf", tiny)
        return made[repr(tiny)]

    return make


@pytest.fixture(scope="session")
def split_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Path]]]:
    """Return a function that splits whole models and returns the paths of the foundation and of each adaptor."""

    def split(models: dict[str, Path], layout: str = "complement") -> tuple[Path, dict[str, Path]]:
        directory = tmp_path_factory.mktemp("split")
        foundation = None
        if layout == "overlay":
            foundation = models["base"]
            models = {task: path for task, path in models.items() if task != "base"}
        report = pga.split(models, directory, foundation=foundation)
        return Path(report.foundation), {task: Path(path) for task, path in report.adaptors.items()}

    return split


@pytest.fixture(scope="session")
def vocab_dir(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """Return the folder of llama.cpp's vocabularies, unpacked from the pinned release; skip where it cannot be had.

    Its chat templates are in the folder `templates` there.
    """
    spec = importlib.util.spec_from_file_location("unpack", ROOT / "vendor" / "ggml" / "unpack.py")
    assert spec is not None and spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    kept = pytestconfig.cache.mkdir("vocab") if pytestconfig.pluginmanager.hasplugin("cacheprovider") else None
    base = kept or tmp_path_factory.mktemp("vocab")
    target, stamp = base / "models", base / "PIN"
    if not (stamp.is_file() and stamp.read_text() == unpack.PIN.read_text()):
        try:
            archive = unpack.download(tmp_path_factory.mktemp("release"))
        except subprocess.CalledProcessError:
            pytest.skip("pip cannot fetch the release that is pinned in vendor/ggml/pin.txt")
        unpack.extract(archive, base, VOCAB_PREFIXES)
        archive.unlink()
        stamp.write_text(unpack.PIN.read_text())
    return target
