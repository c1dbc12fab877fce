"""The stubs say what the compiled modules have."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyggml_adapt
from pyggml_adapt.ggml import ops

OPS = sorted(name for name in vars(ops) if callable(getattr(ops, name)) and not name.startswith("_"))
ALLOWED = Path(__file__).with_name("stubtest_allowlist.txt")


def test_stubs_agree_with_the_modules(tmp_path: Path):
    base = Path(pyggml_adapt.__file__).parents[1]
    # mypy finds what is in site-packages by itself, an editable install not
    env = os.environ if base.name == "site-packages" else os.environ | {"MYPYPATH": str(base)}
    command = [sys.executable, "-m", "mypy.stubtest", "pyggml_adapt.ggml", "--concise", "--allowlist", str(ALLOWED)]
    command += ["--ignore-unused-allowlist"]  # some are of one version of Python
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stubs() -> dict[str, ast.FunctionDef]:
    """Return the stubs of the ops."""
    trees = [ast.parse(path.read_text()) for path in Path(ops.__file__).parent.glob("*.pyi")]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", OPS)
def test_stub_of_an_op_has_its_parameters(name: str, stubs: dict[str, ast.FunctionDef]):
    """stubtest cannot see them; Cython writes them into the docstring."""
    line = getattr(ops, name).__doc__.splitlines()[0]
    inside = re.fullmatch(rf"{name}\((.*)\)", line)
    assert inside, line
    actual = [each.partition("=")[0].split()[-1] for each in re.sub(r"=\([^)]*\)", "=", inside[1]).split(", ")]
    args = stubs[name].args
    assert actual == [each.arg for each in args.args] + ([f"*{args.vararg.arg}"] if args.vararg else [])
