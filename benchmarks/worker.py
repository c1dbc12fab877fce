"""Run one measurement in this process: `worker.py NAME JSON` prints its result as JSON."""

from __future__ import annotations

import importlib
import json
import sys

MODULES = {
    "speed": "speed",
    "architecture": "architectures",
    "overhead": "speed",
    "swap": "switching",
    "reload": "switching",
    "load": "switching",
    "lowrank_speed": "lowrank",
    "lowrank_switch": "lowrank",
    "fork": "fork",
    "soak": "soak",
    "memory": "memory",
    "files": "files",
    "tokenizing": "tokenizing",
    "sampling": "sampling",
    "rendering": "chatting",
    "first_token": "chatting",
    "around": "chatting",
    "constraining": "constraining",
}


def main() -> None:
    """Call the function NAME with the keyword arguments in JSON."""
    name, arguments = sys.argv[1:]
    function = getattr(importlib.import_module(MODULES[name]), name)
    print(json.dumps(function(**json.loads(arguments))))


if __name__ == "__main__":
    main()
