"""ggml's status codes as exceptions, and its log as records of the logger `pyggml_adapt.ggml`."""

import logging

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
_pending = ""
_pending_level = logging.INFO
_last_problem = ""


cdef void _on_log(c.ggml_log_level level, const char * text, void * user_data) noexcept nogil:
    if Py_IsInitialized():  # not so in destructors of C++ that run after Python's end
        _log(level, text)


cdef void _log(c.ggml_log_level level, const char * text) noexcept with gil:
    global _pending, _pending_level, _last_problem
    try:
        if level != c.GGML_LOG_LEVEL_CONT:
            _pending_level = _levels.get(level, logging.INFO)
        _pending += (<bytes> text).decode("utf-8", "replace")
        while "\n" in _pending:
            line, _, _pending = _pending.partition("\n")
            if _pending_level >= logging.WARNING:
                _last_problem = line
            _logger.log(logging.DEBUG if _pending_level < logging.WARNING else logging.INFO, "%s", line)
    except BaseException:
        pass  # a log line is not worth a crash: this runs inside C, where nothing can be raised


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
