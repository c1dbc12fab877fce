"""link: name a foundation and an adaptor as the two shards that an unmodified llama.cpp loads."""

from __future__ import annotations

import os

from pyggml_adapt.errors import FileAccessError, ParameterError, StrPath
from pyggml_adapt.files import refuse_overwrite
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.tools.verify import LORA
from pyggml_adapt.weights.identity import LOW_RANK, OVERLAY, check_pair, layout_of


def link(foundation: StrPath, adaptor: StrPath, directory: StrPath, *, force: bool = False) -> tuple[str, str]:
    """Make symbolic links X-00001-of-00002.gguf and X-00002-of-00002.gguf, and return their paths.

    X is the adaptor's name; the first link, to the adaptor, is what llama.cpp's -m takes.
    force: replace what is there.
    Raises: AdaptorError if the two do not belong together; ParameterError for an overlay or low-rank adaptor, which
    llama.cpp cannot load so; OverwriteError, FileAccessError.
    """
    with GGUFReader(foundation) as base, GGUFReader(adaptor) as own:
        if layout_of(own) in (LORA, LOW_RANK):
            raise ParameterError(
                f"{own.path}: a low-rank adaptor is no shard of a model; `pyggml-adapt bake` makes an overlay adaptor "
                f"of it, and `pyggml-adapt merge` a model of that"
            )
        if check_pair(base, own).layout == OVERLAY:
            raise ParameterError(
                f"{own.path}: llama.cpp cannot load an overlay adaptor; `pyggml-adapt merge` makes a model of the pair"
            )
        targets = (os.path.realpath(own.path), os.path.realpath(base.path))
    directory = os.fsdecode(directory)
    stem = os.path.basename(os.fsdecode(adaptor)).removesuffix(".gguf")
    links = [os.path.join(directory, f"{stem}-{no:05}-of-00002.gguf") for no in (1, 2)]
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as exc:
        raise FileAccessError.of(directory, exc) from exc
    here = os.path.realpath(directory)
    wanted = dict(zip(links, (os.path.relpath(target, here) for target in targets), strict=True))
    missing = {path: target for path, target in wanted.items() if not _is_link_to(path, target)}
    for path in missing:
        if not force:
            refuse_overwrite(path)
    for path, target in missing.items():
        _make(path, target)
    return links[0], links[1]


def _is_link_to(path: str, target: str) -> bool:
    return os.path.islink(path) and os.readlink(path) == target


def _make(path: str, target: str) -> None:
    """Make or replace a symbolic link; a directory is not replaced."""
    temp = f"{path}.{os.getpid()}.tmp"
    try:
        os.symlink(target, temp)
        try:
            os.replace(temp, path)
        except BaseException:
            os.unlink(temp)
            raise
    except OSError as exc:
        raise FileAccessError.of(path, exc) from exc
