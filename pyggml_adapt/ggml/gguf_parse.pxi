# Included by gguf.pyx: how ggml reads a file's header, and how we hear why it refused one.

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void * buf, size_t count, int64_t offset)

cdef extern from *:
    """
    static _Thread_local char * pyggml_adapt_heard = NULL;
    """
    char * heard "pyggml_adapt_heard"  # where this thread keeps ggml's first error of a file, NULL if it parses none

cdef enum:
    WINDOW_NBYTES = 65536
    LINE_NBYTES = 256

cdef struct Window:  # a file as ggml reads it: through one buffer
    int fd
    int64_t start  # position of buf in the file
    size_t n  # bytes in buf
    uint64_t pos  # end of what ggml has read
    char buf[WINDOW_NBYTES]

cdef c.ggml_log_callback _next  # status.pyx's, which hears everything after us
cdef void * _next_data


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
    if level == c.GGML_LOG_LEVEL_ERROR and heard != NULL and heard[0] == 0:
        strncpy(heard, text, LINE_NBYTES - 1)
    if _next != NULL:
        _next(level, text, _next_data)


cdef g.gguf_context * _parse(Window * w, uint64_t nbytes, list why) except? NULL:
    """Return ggml's parse of the file, or NULL with ggml's first complaint appended to `why`.

    No lock is held meanwhile: a handler of the log may be called in it, and parse another file, also on this thread.
    """
    global heard
    cdef g.gguf_init_params params
    cdef g.gguf_context * ctx
    cdef char line[LINE_NBYTES]
    cdef char * outer = heard
    params.no_alloc, params.ctx = True, NULL
    memset(line, 0, LINE_NBYTES)
    with nogil:
        heard = line
        ctx = g.gguf_init_from_callback(_read_window, w, 0, nbytes, params)
        heard = outer
    if ctx == NULL:
        why.append((<bytes> line).decode("utf-8", "replace").strip().partition(": ")[2])
    return ctx


g.ggml_log_get(&_next, &_next_data)
c.ggml_log_set(_listen, NULL)
