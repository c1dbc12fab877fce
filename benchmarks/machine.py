"""The machine and the versions that results belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pyggml_adapt as pga


def _first(path: str, key: str) -> str:
    """Return the value of the first line of a /proc file that starts with key."""
    with open(path, encoding="utf-8") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")


def describe() -> dict[str, str]:
    """Return what a reader needs to judge the results."""
    info = pga.build_info()
    features = sorted(name for name, value in info["features"].items() if value == "1")
    total = int(_first("/proc/meminfo", "MemTotal").split()[0]) * 1024
    return {
        "CPU": f"{_first('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "CPU features used": ", ".join(features),
        "memory": f"{total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "pyggml_adapt": f"{info['version']}, ggml {info['ggml_version']}, {info['compiler']}",
        "llama.cpp": f"llama-cpp-python {version('llama-cpp-python')}, built from its source release",
    }


def now(repository: Path) -> dict[str, str]:
    """Return the date, the commit, with + if files differ from it, and the load average."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=repository, stdout=subprocess.PIPE, text=True, check=True).stdout

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}",
        "commit": git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else ""),
        "load average": f"{os.getloadavg()[0]:.2f}",
    }
