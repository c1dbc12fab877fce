"""The package as it is installed: what importing does, what it contains, what it says of itself."""

import json
import os
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import pyggml_adapt as pga
from pyggml_adapt import errors

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "pyggml_adapt"
PACKAGE = Path(pga.__file__).parent
IS_EDITABLE = PACKAGE == SOURCE
CHECK = """
import json, os, sys
import numpy  # its BLAS starts threads
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
import pyggml_adapt
print(json.dumps({"modules": sorted(sys.modules), "threads": threads() - before}))
"""


def python(code, *args, **options):
    """Return what a fresh interpreter prints, from a directory without our sources."""
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd="/",
                          **options).stdout  # fmt: skip


def test_build_info():
    info = pga.build_info()
    assert info["version"] == pga.__version__ == version("pyggml_adapt")
    assert info["ggml_version"] == "0.25.3"
    assert info["llama_cpp_commit"] == "0c1e57098"
    assert "CPU" in info["backends"]
    cpu = next(device for device in info["devices"] if device["type"] == "CPU")
    assert cpu["memory_total"] >= cpu["memory_free"] >= 0
    assert json.loads(json.dumps(info)) == info


def test_importing_does_no_work():
    found = json.loads(python(CHECK))
    assert found["threads"] == 0
    heavy = {"sentencepiece", "tokenizers", "rich", "torch", "argparse", "llama_cpp", "pyggml_adapt.cli"}
    assert heavy & set(found["modules"]) == set()


def test_importing_prints_nothing():
    assert python("import pyggml_adapt") == ""


@pytest.mark.parametrize("order", ["pyggml_adapt, llama_cpp", "llama_cpp, pyggml_adapt"])
def test_beside_another_ggml(order, tiny_gguf):
    """Importing llama_cpp first or last does not lend us its libraries, nor it ours."""
    code = f"""
import {order}
import ctypes, sys
with pyggml_adapt.Host(sys.argv[1], n_threads=1) as host, host.session(n_ctx=64) as session:
    session.eval([1, 2, 3])
maps = open("/proc/self/maps").read()
names = {{line.split("/")[-1] for line in maps.splitlines() if "ggml" in line and ".so" in line}}
print(sorted(name.split(".so")[0] for name in names if name.startswith("libpyggml_adapt")))
print(pyggml_adapt.ggml.ggml_version())
"""
    names, ggml = python(code, str(tiny_gguf())).splitlines()
    assert names == "['libpyggml_adapt_ggml', 'libpyggml_adapt_ggml-base', 'libpyggml_adapt_ggml-cpu']"
    assert ggml == "0.25.3"


def test_every_error_is_ours_and_a_built_in():
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(classes) > 10
    for cls in classes:
        assert issubclass(cls, pga.Error)
        if cls not in (pga.Error, errors.GGMLError):
            assert any(base.__module__ == "builtins" and base is not Exception for base in cls.__mro__[:-3]), cls


@pytest.mark.skipif(IS_EDITABLE, reason="the package is installed in editable mode")
def test_installed_files_are_ours_only():
    files = [Path(str(file)) for file in distribution("pyggml_adapt").files]
    tops = {file.parts[0] for file in files}
    assert tops <= {"pyggml_adapt", f"pyggml_adapt-{pga.__version__}.dist-info", ".."}  # ..: bin/pyggml-adapt
    assert [file for file in files if ".." in file.parts and file.name != "pyggml-adapt"] == []
    suffixes = {file.suffix for file in files if file.parts[0] == "pyggml_adapt"}
    assert suffixes <= {".py", ".pyc", ".pyi", ".pxd", ".so", ".typed"}
    libraries = {file.name.split(".")[0] for file in files if file.parts[:2] == ("pyggml_adapt", "lib")}
    assert libraries == {f"libpyggml_adapt_ggml{part}" for part in ("", "-base", "-cpu")}


def test_licences_travel():
    texts = [file.read_text() for file in distribution("pyggml_adapt").files if "LICENSE" in file.name]
    assert len(texts) == 2
    assert any("ggml authors" in text for text in texts)


@pytest.mark.skipif(IS_EDITABLE, reason="the package is installed in editable mode")
def test_the_installed_package_is_tested():
    """Not the source tree: its .py files are there, its extensions are not."""
    assert ROOT not in PACKAGE.parents or "site-packages" in PACKAGE.parts


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_libraries_are_found_beside_the_package():
    code = "import pyggml_adapt; print([x.split()[-1] for x in open('/proc/self/maps') if 'libpyggml_adapt' in x])"
    out = python(code, env={key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"})
    paths = {Path(path) for path in json.loads(out.replace("'", '"'))}
    assert {path.parent.name for path in paths} == {"lib"} and len({path.parent for path in paths}) == 1
