"""pyggml-adapt verify: hash every tensor of a foundation and its adaptors."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-command `verify`."""
    parser = subparsers.add_parser(
        "verify",
        parents=[common],
        help="check that files belong together and are undamaged",
        description="Check that the adaptors belong to the foundation, hash every tensor of all of them, and look for "
        "weights that are NaN or infinite.",
    )
    parser.add_argument("foundation", metavar="FOUNDATION", help="the foundation")
    parser.add_argument("adaptors", nargs="*", metavar="ADAPTOR", help="its adaptors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, and print how much was checked."""
    import json
    from dataclasses import asdict

    from pyggml_adapt.cli.console import progress_bar
    from pyggml_adapt.errors import FileFormatError
    from pyggml_adapt.tools import verify

    with progress_bar() as progress:
        report = verify(args.foundation, *args.adaptors, progress=progress)
    if report.not_finite:
        path, name = report.not_finite[0]
        more = f" (and {len(report.not_finite) - 1} more)" if len(report.not_finite) > 1 else ""
        raise FileFormatError(f"tensor {name!r}{more} has elements that are NaN or infinite", path=path, key=name)
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        tasks = f" and {', '.join(report.tasks)}" if report.tasks else ""
        print(
            f"{report.foundation}{tasks}: {report.n_tensors} tensors, {report.nbytes} bytes, all as they were written"
        )
    return 0
