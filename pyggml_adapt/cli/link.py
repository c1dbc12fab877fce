"""pyggml-adapt link: name a pair so that an unmodified llama.cpp loads it."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-command `link`."""
    parser = subparsers.add_parser(
        "link",
        parents=[common],
        help="make links by which llama.cpp loads a foundation and an adaptor",
        description="Make symbolic links to an adaptor and its foundation, named as the two shards of one model.",
    )
    parser.add_argument("foundation", metavar="FOUNDATION", help="the foundation")
    parser.add_argument("adaptor", metavar="ADAPTOR", help="the adaptor of the model to run")
    parser.add_argument("-d", "--directory", required=True, metavar="DIR", help="where the links go")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the links, and print the path that llama.cpp takes."""
    import json

    from pyggml_adapt.tools import link

    adaptor, foundation = link(args.foundation, args.adaptor, args.directory, force=args.force)
    if args.json:
        print(json.dumps({"adaptor": adaptor, "foundation": foundation}))
    else:
        print(adaptor)
        print(foundation)
    return 0
