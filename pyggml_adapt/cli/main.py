"""The command line: parses arguments, runs a sub-command, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pyggml_adapt.cli import bake, bench, chat, embed, info, inspect, link, merge, perplexity, run, split, verify
from pyggml_adapt.errors import Error

DONE, FAILED, INTERRUPTED = 0, 1, 130  # argparse itself exits with 2 on wrong usage


def parser() -> argparse.ArgumentParser:
    """Return the parser of all sub-commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--verbose", action="store_true", help="show ggml's log and ours, and tracebacks")
    top = argparse.ArgumentParser("pyggml-adapt", description="Many fine-tuned models from one shared foundation.")
    top.add_argument("--version", action="version", version=f"pyggml-adapt {version('pyggml_adapt')}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (split, merge, bake, verify, link, inspect, run, chat, embed, perplexity, bench, info):
        module.add_parser(commands, common)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 130 interrupted; wrong usage exits with 2."""
    _open_streams()
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        stream=sys.stderr,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: say nothing more
        return FAILED
    except (Error, OSError, MemoryError) as error:
        if args.verbose:
            raise
        print(f"pyggml-adapt: error: {describe(error)}", file=sys.stderr)
        return FAILED


def _open_streams() -> None:
    """Let standard streams that were closed before the start be empty, and take what is written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the process ends)


def describe(error: Exception) -> str:
    """Return one sentence about an error; one of the system's own that names no file came from writing the output."""
    if isinstance(error, OSError) and not isinstance(error, Error) and error.filename is None:
        return f"the output cannot be written: {error.strerror or error}"
    return str(error) or type(error).__name__
