# Included by gguf.pyx: how ggml reads a file's header, and how we hear why it refused one.

import threading

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void * buf, size_t count, int64_t offset)

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()

cdef enum:
    WINDOW_NBYTES = 65536
    LINE_NBYTES = 256

cdef struct Window:  # a file as ggml reads it: through one buffer
    int fd
    int64_t start  # position of buf in the file
    size_t n  # bytes in buf
    uint64_t pos  # end of what ggml has read
    char buf[WINDOW_NBYTES]

cdef struct Listener:  # hears ggml's log beside the callback that is installed
    c.ggml_log_callback next
    void * next_data
    pthread_t thread
    char line[LINE_NBYTES]  # first error since it was installed

cdef Listener _listener  # one for all threads, under _listener_lock: a late log call must find it alive
_listener_lock = threading.Lock()


cdef size_t _read_window(void * userdata, void * output, uint64_t offset, size_t n) noexcept nogil:
    cdef Window * w = <Window *> userdata
    cdef size_t done = 0
    cdef size_t at, take
    cdef ssize_t got
    while done < n:
        if <int64_t> (offset + done) < w.start or <int64_t> (offset + done) >= w.start + <int64_t> w.n:
            got = pread(w.fd, w.buf, WINDOW_NBYTES, <int64_t> (offset + done))
            if got <= 0:
                break
            w.start, w.n = <int64_t> (offset + done), <size_t> got
        at = <size_t> (<int64_t> (offset + done) - w.start)
        take = min(w.n - at, n - done)
        memcpy(<char *> output + done, w.buf + at, take)
        done += take
    w.pos = offset + done
    return done


cdef void _listen(c.ggml_log_level level, const char * text, void * user_data) noexcept nogil:
    if level == c.GGML_LOG_LEVEL_ERROR and _listener.line[0] == 0 and _listener.thread == pthread_self():
        strncpy(_listener.line, text, LINE_NBYTES - 1)
    if _listener.next != NULL:
        _listener.next(level, text, _listener.next_data)


cdef g.gguf_context * _parse(Window * w, uint64_t nbytes, list why) except? NULL:
    """Return ggml's parse of the file, or NULL with ggml's first complaint appended to `why`."""
    cdef g.gguf_init_params params
    cdef g.gguf_context * ctx
    params.no_alloc, params.ctx = True, NULL
    with _listener_lock:
        g.ggml_log_get(&_listener.next, &_listener.next_data)
        _listener.thread = pthread_self()
        memset(_listener.line, 0, LINE_NBYTES)
        c.ggml_log_set(_listen, NULL)
        with nogil:
            ctx = g.gguf_init_from_callback(_read_window, w, 0, nbytes, params)
            c.ggml_log_set(_listener.next, _listener.next_data)
        if ctx == NULL:
            why.append((<bytes> _listener.line).decode("utf-8", "replace").strip().partition(": ")[2])
    return ctx
