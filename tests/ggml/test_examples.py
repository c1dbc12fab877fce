"""The programs of examples/ggml, run as a person runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "ggml"


def run(name, *args, cwd):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_example_is_run():
    source = Path(__file__).read_text()
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


def test_matmul(tmp_path):
    assert run("matmul.py", cwd=tmp_path).stdout.endswith("[ 3. 12.]] True\n")
    lines = (EXAMPLES / "matmul.py").read_text().partition("import Context, Tensor, compute\n")[2].strip().splitlines()
    assert len(lines) == 5


def test_dump_graph(tmp_path):
    out = run("dump_graph.py", "ffn.dot", cwd=tmp_path).stdout
    assert out.startswith("ffn.dot: 5 nodes\n")
    drawing = (tmp_path / "ffn.dot").read_text()
    assert drawing.startswith("digraph G {")
    assert "l_out-0" in drawing
    if importlib.util.find_spec("pygraphviz") is None:
        assert out.endswith("no SVG: that needs `pip install pygraphviz`\n")
        return
    assert out.endswith("ffn.svg: drawn\n")
    svg = ElementTree.parse(tmp_path / "ffn.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    groups = [each.get("class") for each in svg.iter("{http://www.w3.org/2000/svg}g")]
    assert (groups.count("node"), groups.count("edge")) == (9, 10)
    assert any("l_out-0" in (each.text or "") for each in svg.iter("{http://www.w3.org/2000/svg}text"))


def test_quantise(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32))
    out = run("quantise.py", "a.npy", cwd=tmp_path).stdout
    table = {line.split()[0]: line.split()[1:3] for line in out.splitlines()[1:]}
    assert len(table) == 27
    assert table["Q4_K"][0] == "4.5000"
    assert float(table["Q8_0"][1].rstrip("%")) < 1
    bits = [float(row[0]) for row in table.values()]
    assert bits == sorted(bits)


def test_train_mlp(tmp_path):
    done = run("train_mlp.py", cwd=tmp_path)
    found = re.search(r"held-out digits: ([\d.]+)% right", done.stdout)
    assert float(found[1]) > 95
    assert "validation 40/40: loss " in done.stderr
