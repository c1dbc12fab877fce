"""pyggml-adapt merge: a foundation and an adaptor in, the model that was split out."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-command `merge`."""
    parser = subparsers.add_parser(
        "merge",
        parents=[common],
        help="write the model again that an adaptor was split from",
        description="Write the whole model of a foundation and an adaptor, byte-identical to the one that was split.",
    )
    parser.add_argument("foundation", metavar="FOUNDATION", help="the foundation")
    parser.add_argument("adaptor", metavar="ADAPTOR", help="the adaptor of the model to give back")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, and print the digest."""
    import json
    from dataclasses import asdict

    from pyggml_adapt.cli.console import progress_bar
    from pyggml_adapt.tools import merge

    with progress_bar() as progress:
        report = merge(args.foundation, args.adaptor, args.output, force=args.force, progress=progress)
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    print(f"{report.path}: {report.n_tensors} tensors, {report.nbytes} bytes, sha256 {report.sha256}")
    if report.n_shards > 1:
        print(f"identical to what the {report.n_shards} shards that were split make as a single file")
    else:
        print("identical to the model that was split")
    return 0
