"""pyggml-adapt info: what this installation was built from and can run on."""

from __future__ import annotations

import argparse
import json


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "info",
        parents=[common],
        help="show versions, backends and devices",
        description="Show what this installation was built from and what it can run on.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print build_info()."""
    from pyggml_adapt.info import build_info

    info = build_info()
    if args.json:
        print(json.dumps(info))
        return 0
    devices, features = info.pop("devices"), info.pop("features")
    for key, value in info.items():
        print(f"{key + ':':<18}{', '.join(value) if isinstance(value, list) else value}")
    print(f"{'CPU features:':<18}{' '.join(sorted(features))}")
    for device in devices:
        print(
            f"{'device:':<18}{device['name']} ({device['type']}, {device['description']}), "
            f"{device['memory_free'] / 2**30:.1f} of {device['memory_total'] / 2**30:.1f} GiB free"
        )
    return 0
