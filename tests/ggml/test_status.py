from __future__ import annotations

import logging

import pytest

from pyggml_adapt.errors import AllocError
from pyggml_adapt.ggml import Buffer, Device
from pyggml_adapt.ggml.status import last_log


def ask_for_too_much():
    with pytest.raises(AllocError) as caught:
        Buffer.allocate(Device.cpu().buffer_type, 1 << 55)
    return str(caught.value)


def test_ggmls_log_goes_to_logging(caplog):
    with caplog.at_level(logging.DEBUG, "pyggml_adapt.ggml"):
        message = ask_for_too_much()
    assert message.startswith(f"no memory for a buffer of {1 << 55} bytes of CPU memory: ")
    lines = [record.getMessage() for record in caplog.records if record.name == "pyggml_adapt.ggml"]
    assert any("failed to allocate" in line for line in lines)
    assert lines[-1] in message  # the exception quotes ggml's last complaint


def test_last_log_is_told_once(caplog):
    with caplog.at_level(logging.CRITICAL, "pyggml_adapt.ggml"):
        ask_for_too_much()
    assert last_log() == ""


def test_a_handler_that_raises_does_no_harm(python):
    out = python("""
        import logging
        class Bad(logging.Handler):
            def emit(self, record):
                raise RuntimeError
        logging.getLogger("pyggml_adapt.ggml").addHandler(Bad())
        logging.getLogger("pyggml_adapt.ggml").setLevel("DEBUG")
        try:
            Buffer.allocate(Device.cpu().buffer_type, 1 << 55)
        except AllocError as exc:
            print(type(exc).__name__)
        """)
    assert out == "AllocError\n"


def test_nothing_on_stderr_by_default(python):
    python("""
        import io, os, sys
        read, write = os.pipe()
        os.dup2(write, 2)
        try:
            Buffer.allocate(Device.cpu().buffer_type, 1 << 55)
        except AllocError:
            pass
        os.set_blocking(read, False)
        try:
            assert os.read(read, 1) == b""
        except BlockingIOError:
            pass
        """)
