"""pyggml-adapt embed: vectors for texts."""

from __future__ import annotations

import argparse
import json

from pyggml_adapt.cli.options import add_host_options, named_task, open_host
from pyggml_adapt.cli.run import read_prompt
from pyggml_adapt.errors import ParameterError


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "embed",
        parents=[common],
        help="turn texts into vectors with one task",
        description="Print the embedding of each text, its numbers on one line, as llama-embedding's raw output.",
    )
    add_host_options(parser)
    parser.add_argument("--task", metavar="NAME", help="the task; needed if several are loaded")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the texts, one on each line")
    prompt.add_argument("-f", "--file", metavar="FILE", help="a file with the texts, - for standard input")
    parser.add_argument(
        "--embd-separator", default="\n", metavar="TEXT", help="what is between the texts (default: the end of a line)"
    )
    parser.add_argument(
        "--pooling",
        choices=("none", "mean", "cls", "last"),
        help="of which tokens: none gives a line for each (default: the model's own, else mean)",
    )
    parser.add_argument(
        "--embd-normalize",
        type=int,
        choices=(-1, 2),
        default=2,
        metavar="N",
        help="2: vectors of Euclidean length 1, -1: as they are (%(default)s)",
    )
    parser.add_argument(
        "-c", "--ctx-size", type=int, default=0, metavar="N", help="size of the context (default: the longest text's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line of numbers for each text, or a JSON object."""
    texts = read_prompt(args).removesuffix("\n")
    if not args.embd_separator:
        raise ParameterError("--embd-separator is empty: there must be something between the texts")
    with open_host(args) as host:
        task = named_task(args, host)
        found = host.embed(
            texts.split(args.embd_separator),
            task=task,
            pooling=args.pooling,
            normalize=args.embd_normalize == 2,
            n_ctx=args.ctx_size or None,
            parse_special=True,
        )
    if args.json:
        print(json.dumps({"task": task, "embeddings": [each.tolist() for each in found]}))
        return 0
    for each in found:
        for row in each.reshape(-1, each.shape[-1]):
            print(" ".join(f"{number:.9g}" for number in row))
    return 0
