from __future__ import annotations

import logging
from pathlib import Path

import pytest
from raw_gguf import gguf, key

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


HANDLER = """
    import logging, threading
    class Reading(logging.Handler):
        raises = False
        def emit(self, record):
            heard.append(record.getMessage())
            why.append(read())
            if self.raises:
                raise RuntimeError
    def read():
        try:
            GGUFReader(path)
        except FileFormatError as exc:
            return str(exc)
    heard, why = [], []
    logger = logging.getLogger("pyggml_adapt.ggml")
    logger.addHandler(Reading())
    logger.setLevel("DEBUG")
    """


def test_a_handler_may_parse_files(python, tmp_path: Path):
    """Which ggml complains about as well: that is not heard, as it would have no end."""
    (tmp_path / "bad").write_bytes(gguf([key("", 4, bytes(4))]))
    python(
        HANDLER
        + f"""
    path = {str(tmp_path / "bad")!r}
    outer = read()
    assert "key 0 is empty" in outer, outer
    assert heard and all("gguf_init" in each or "gguf" in each for each in heard), heard
    assert set(why) == {{outer}}, why
    assert len(heard) < 5
    Reading.raises = True
    assert read() == outer
    """
    )


def test_threads_may_parse_files_at_once(python, tmp_path: Path):
    (tmp_path / "bad").write_bytes(gguf([key("", 4, bytes(4))]))
    (tmp_path / "other").write_bytes(gguf([key("k", 99, bytes(8))]))
    python(
        HANDLER
        + f"""
    import sys
    sys.setswitchinterval(1e-5)
    path = {str(tmp_path / "other")!r}
    Reading.raises = True
    found = []
    def run(name, message):
        for _ in range(20):
            try:
                GGUFReader(name)
            except FileFormatError as exc:
                found.append(message in str(exc))
    threads = [threading.Thread(target=run, args=each) for each in
               [({str(tmp_path / "bad")!r}, "key 0 is empty"), (path, "invalid GGUF type")] * 2]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [True] * 80, found
    """
    )
