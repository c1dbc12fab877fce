"""Every function of ggml's headers is wrapped, or left out for a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("header_coverage.py")
INCLUDE = SCRIPT.parents[2] / "vendor" / "ggml" / "upstream" / "ggml" / "include"


@pytest.mark.skipif(not INCLUDE.is_dir(), reason="ggml's source is not unpacked: the package was built elsewhere")
def test_every_function_is_wrapped_or_left_out_for_a_reason():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
