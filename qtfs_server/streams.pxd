"""What waits for a FIFO, a device or a pseudo file, and who is to hear of its changes."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_server.includes.linux cimport pthread_mutex_t
from qtfs_server.session cimport handle, session

cdef struct stream_wait:                # a READ or WRITE of the event channel that has to wait; a WRITE's data follows
    stream_wait *next
    uint64_t tag
    uint16_t op
    uint32_t size
    uint32_t done                       # bytes written so far

cdef struct stream:                     # of one handle
    pthread_mutex_t guard               # above session.guard and session.outbox_guard; held over read(2) and write(2)
    session *s
    handle *h
    int fd                              # the handle's; -1: closing
    uint32_t interest                   # EPOLL* that the epoll watches for; 0: not in it
    bint armed                          # READY is to be sent at the next change
    uint64_t notify                     # READY's tag
    uint32_t latched                    # POLLPRI and POLLERR that nobody was told of and that cannot be seen again
    stream_wait *waits                  # in order; each pins the handle
    bint posted                         # to the thread, for it to watch for `wanted` too; under the post's guard
    uint32_t wanted
    int error                           # what came of that
    bint armed_before
    stream *next_posted
    stream *next                        # of all, or of those to be freed
    stream *previous

cdef int stream_wait_for(session *s, handle *h, uint16_t op, uint64_t tag, const uint8_t *data, uint32_t size,
                         uint8_t *buffer) noexcept nogil
cdef int stream_arm(session *s, handle *h, uint64_t notify, uint32_t events) noexcept nogil
cdef uint32_t stream_take_news(handle *h) noexcept nogil
cdef bint stream_cancel(session *s, uint64_t tag) noexcept nogil
cdef void abandon_stream_waits(session *s) noexcept nogil
cdef void end_streams(session *s) noexcept nogil
cdef list writes_begun(session *s)
cdef int carry_write(session *s, uint64_t tag, uint32_t done) except -1
cdef void watch_streams() noexcept nogil
cdef void stop_watching_streams() noexcept nogil
cdef void go_on_watching_streams() noexcept nogil
