"""Options that several sub-commands share; flags are llama.cpp's where it has one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyggml_adapt.errors import ParameterError

if TYPE_CHECKING:
    from pyggml_adapt.runtime.host import Host


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a Host."""
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="foundation, or a complete model")
    parser.add_argument(
        "-a",
        "--adaptor",
        "-mpa",
        "--model-path-alias",
        "--adapter",
        action="append",
        default=[],
        dest="adaptors",
        metavar="NAME=PATH",
        help="an adaptor and its task's name; repeatable",
    )
    parser.add_argument(
        "--define",
        action="append",
        default=[],
        metavar="NAME=A:X,B:Y",
        help="a task made of loaded adaptors, low-rank ones times a factor; repeatable",
    )
    parser.add_argument(
        "--max-adaptor-bytes", type=size, metavar="N", help="of adaptors in memory, as 300M or 2G (default: no limit)"
    )
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: all processors)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=2048, metavar="N", help="tokens per batch (%(default)s)"
    )
    parser.add_argument(
        "-ub", "--ubatch-size", type=int, default=512, metavar="N", help="tokens per computation (%(default)s)"
    )
    parser.add_argument(
        "-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto", help="flash attention (auto: on)"
    )
    parser.add_argument("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help="type of K in the cache (f16)")
    parser.add_argument("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help="type of V in the cache (f16)")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0, metavar="N", help="layers on a GPU (0)")
    parser.add_argument("--no-mmap", action="store_true", help="read the weights into private memory")
    parser.add_argument("--mlock", action="store_true", help="keep the weights in physical memory")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how tokens are drawn."""
    parser.add_argument("--temp", type=float, default=0.8, metavar="T", help="temperature, 0 for greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=40, metavar="K", help="0 for all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="1 for all (%(default)s)")
    parser.add_argument("--min-p", type=float, default=0.05, metavar="P", help="0 for all (%(default)s)")
    parser.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="1 for none (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="seed (default, and -1: another each time)")


def size(text: str) -> int:
    """Return a number of bytes; K, M and G stand for powers of 1024.  Raises: ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, as 300M or 2G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def named_paths(values: Sequence[str], flag: str = "", form: str = "NAME=PATH") -> dict[str, str]:
    """Return name -> path of NAME=PATH values, or of others of the form NAME=something.

    Raises: ParameterError for a value without a name or a path, or a name given twice.
    """
    paths: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise ParameterError(f"{flag}{value!r}: expected {form}")
        if name in paths:
            raise ParameterError(f"{flag}{value!r}: the name {name!r} is given twice")
        paths[name] = path
    return paths


def open_host(args: argparse.Namespace) -> Host:
    """Return the Host that the options describe, with the tasks that they define."""
    from pyggml_adapt.runtime.host import Host

    host = Host(
        args.model,
        named_paths(args.adaptors, "-a "),
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        max_adaptor_bytes=args.max_adaptor_bytes,
        n_batch=args.batch_size,
        n_ubatch=args.ubatch_size,
        flash_attn=args.flash_attn != "off",
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        use_mmap=not args.no_mmap,
        use_mlock=args.mlock,
    )
    try:
        for task, adaptors in named_paths(args.define, "--define ", "NAME=A:X,B:Y").items():
            host.define_task(task, adaptors.split(","))
    except BaseException:
        host.close()
        raise
    return host


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SamplerParams that the options describe."""
    return {
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "seed": None if args.seed == -1 else args.seed,
    }
