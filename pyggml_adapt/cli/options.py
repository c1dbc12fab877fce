"""Options that several sub-commands share; flags are llama.cpp's where it has one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyggml_adapt.errors import FileAccessError, ParameterError

if TYPE_CHECKING:
    from pyggml_adapt.host.host import Host


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
    for flags, field, default, what in _SAMPLING:
        flag, value = type(default), "N" if isinstance(default, int) else "X"
        parser.add_argument(*flags, dest=field, type=flag, default=default, metavar=value, help=f"{what} (%(default)s)")
    parser.add_argument(
        "--dry-sequence-breaker",
        action="append",
        metavar="TEXT",
        dest="dry_sequence_breakers",
        help="no repeated sequence goes across it; repeatable, none for no breaker (newline, colon, quote, asterisk)",
    )
    parser.add_argument(
        "-l",
        "--logit-bias",
        type=logit_bias,
        action="append",
        default=[],
        metavar="TOKEN(+/-)BIAS",
        help="add to a token id's logit, as 15043+1 or 15043-inf; repeatable",
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="seed (default, and -1: another each time)")
    _add_constraint_options(parser.add_mutually_exclusive_group())


def _add_constraint_options(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "-j", "--json-schema", metavar="SCHEMA", help='the output is JSON that meets this schema, "{}" for any JSON'
    )
    group.add_argument("-jf", "--json-schema-file", metavar="FILE", help="as --json-schema, from a file")
    group.add_argument("--regex", metavar="REGEX", help="the output matches this regular expression, all of it")
    group.add_argument("--grammar", metavar="GRAMMAR", help="the output is in this grammar, GBNF or Lark")
    group.add_argument("--grammar-file", metavar="FILE", help="as --grammar, from a file")


_SAMPLING: tuple[tuple[tuple[str, ...], str, float, str], ...] = (  # flags, field of SamplerParams, default, help
    (("--temp", "--temperature"), "temperature", 0.8, "temperature, 0 for greedy"),
    (("--top-k",), "top_k", 40, "most probable tokens that are kept, 0 for all"),
    (("--top-p",), "top_p", 0.95, "sum of the probabilities that are kept, 1 for all"),
    (("--min-p",), "min_p", 0.05, "least probability relative to the most probable token's, 0 for all"),
    (("--top-n-sigma", "--top-nsigma"), "top_n_sigma", -1.0, "standard deviations below the largest logit, -1 for all"),
    (("--typical", "--typical-p"), "typical_p", 1.0, "sum of the locally typical probabilities kept, 1 for all"),
    (("--xtc-probability",), "xtc_probability", 0.0, "of leaving out the most probable tokens, 0 for never"),
    (("--xtc-threshold",), "xtc_threshold", 0.1, "least probability of those that XTC leaves out"),
    (("--repeat-last-n",), "repeat_last_n", 64, "tokens that penalties look back at, 0 for none, -1 for all"),
    (("--repeat-penalty",), "repeat_penalty", 1.0, "factor on the logits of repeated tokens, 1 for none"),
    (("--presence-penalty",), "presence_penalty", 0.0, "subtracted from the logits of repeated tokens"),
    (("--frequency-penalty",), "frequency_penalty", 0.0, "subtracted for each occurrence of a token"),
    (("--dry-multiplier",), "dry_multiplier", 0.0, "of DRY's penalty for repeated sequences, 0 for none"),
    (("--dry-base",), "dry_base", 1.75, "of DRY's penalty, base to the power of the length"),
    (("--dry-allowed-length",), "dry_allowed_length", 2, "length of a repeated sequence that DRY allows"),
    (("--dry-penalty-last-n",), "dry_penalty_last_n", 64, "tokens that DRY looks back at, 0 for none, -1 for all"),
    (("--dynatemp-range",), "dynatemp_range", 0.0, "how far the temperature varies with entropy, 0 for not"),
    (("--dynatemp-exp",), "dynatemp_exponent", 1.0, "exponent of dynamic temperature"),
    (("--mirostat",), "mirostat", 0, "2 for Mirostat 2.0 in place of the other filters, 0 for none"),
    (("--mirostat-lr",), "mirostat_eta", 0.1, "Mirostat's learning rate"),
    (("--mirostat-ent",), "mirostat_tau", 5.0, "Mirostat's target entropy, bits"),
)


def logit_bias(text: str) -> tuple[int, float]:
    """Return token id and bias of TOKEN(+/-)BIAS.  Raises: ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]{1,10})([+-](?:[0-9]+\.?[0-9]*|\.[0-9]+|inf))", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a bias, as 15043+1 or 15043-inf")
    return int(match[1]), float(match[2])


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
    from pyggml_adapt.host.host import Host

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


def named_task(args: argparse.Namespace, host: Host) -> str:
    """Return the task of --task, else the only one.  Raises: ParameterError if there are several."""
    if args.task is None and len(host.tasks) > 1:
        raise ParameterError(f"several tasks are loaded: name one with --task: {', '.join(host.tasks)}")
    return args.task if args.task is not None else host.active


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SamplerParams that the options describe."""
    values = {field: getattr(args, field) for _, field, _, _ in _SAMPLING}
    values["seed"] = None if args.seed == -1 else args.seed
    if args.dry_sequence_breakers is not None:
        texts = args.dry_sequence_breakers
        last_none = max((i for i, text in enumerate(texts) if text == "none"), default=-1)
        values["dry_sequence_breakers"] = texts[last_none + 1 :]
    biases: dict[int, float] = {}
    for token, bias in args.logit_bias:  # what is given twice counts twice, as in llama.cpp
        biases[token] = biases.get(token, 0.0) + bias
    return {**values, "logit_bias": biases, **_constraint(args)}


def _constraint(args: argparse.Namespace) -> dict[str, str]:
    """Return json_schema, regex or grammar if one is given.  Raises: as read_file()."""
    given = {name: getattr(args, name) for name in ("json_schema", "regex", "grammar")}
    if args.json_schema_file is not None:
        given["json_schema"] = read_file(args.json_schema_file, "the JSON Schema")
    if args.grammar_file is not None:
        given["grammar"] = read_file(args.grammar_file, "the grammar")
    return {name: text for name, text in given.items() if text is not None}


def read_file(path: str, what: str) -> str:
    """Return the text of a file.  Raises: FileAccessError; as decode()."""
    try:
        with open(path, "rb") as file:
            return decode(file.read(), path, what)
    except OSError as error:
        raise FileAccessError.of(path, error) from error


def decode(data: bytes, name: str, what: str) -> str:
    """Return bytes as text.  Raises: ParameterError if they are not UTF-8, naming `what` they should be."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{name}: {what} is not UTF-8 at byte {error.start}") from error
