"""ggml's status codes as exceptions, and its log as records of the logger `pyggml_adapt.ggml`.

What ggml says to a thread while that thread handles such a record is not logged.
"""

import logging
import threading

from pyggml_adapt.ggml cimport libggml as c

cdef extern from "Python.h" nogil:
    bint Py_IsInitialized()

from pyggml_adapt.errors import AllocError, BackendError, ComputeAborted

_logger = logging.getLogger(__name__.rpartition(".")[0])
_levels = {
    c.GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    c.GGML_LOG_LEVEL_INFO: logging.INFO,
    c.GGML_LOG_LEVEL_WARN: logging.WARNING,
    c.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}
_last_problem = ""


class _Speaker(threading.local):
    """What ggml has said so far on a thread."""

    pending = ""
    level = logging.INFO
    is_heard = False  # a handler of ours is at work: what ggml says to it would make it work again, without end


_speaker = _Speaker()


cdef void _on_log(c.ggml_log_level level, const char * text, void * user_data) noexcept nogil:
    if Py_IsInitialized():  # not so in destructors of C++ that run after Python's end
        _log(level, text)


cdef void _log(c.ggml_log_level level, const char * text) noexcept with gil:
    global _last_problem
    try:
        if level != c.GGML_LOG_LEVEL_CONT:
            _speaker.level = _levels.get(level, logging.INFO)
        _speaker.pending += (<bytes> text).decode("utf-8", "replace")
        while "\n" in _speaker.pending:
            line, _, _speaker.pending = _speaker.pending.partition("\n")
            if _speaker.level >= logging.WARNING:
                _last_problem = line
            if not _speaker.is_heard:
                _tell(logging.DEBUG if _speaker.level < logging.WARNING else logging.INFO, line)
    except BaseException:
        pass  # a log line is not worth a crash: this runs inside C, where nothing can be raised


def _tell(level, line):
    _speaker.is_heard = True
    try:
        _logger.log(level, "%s", line)
    finally:
        _speaker.is_heard = False


def last_log():
    """Return ggml's last warning or error since the previous call, or "" ."""
    global _last_problem
    line, _last_problem = _last_problem, ""
    return line


cdef int check(c.ggml_status status, str doing) except -1:
    """Raise the exception for `status`, naming what was being done and ggml's last complaint."""
    if status == c.GGML_STATUS_SUCCESS:
        return 0
    why = last_log() or (<bytes> c.ggml_status_to_string(status)).decode()
    if status == c.GGML_STATUS_ABORTED:
        raise ComputeAborted(f"{doing}: stopped by its abort flag")
    if status == c.GGML_STATUS_ALLOC_FAILED:
        raise AllocError(f"{doing}: {why}")
    raise BackendError(f"{doing}: {why}")


c.ggml_log_set(_on_log, NULL)
