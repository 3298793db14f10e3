"""The workers' loop: who reads the device, who parks, and who is woken.

At most MAX_IDLE workers wait in read(/dev/fuse), so that a request finds one awake without waking a crowd; the others
park, and the one that parked last (its cache is warmest) is woken first, when the last idle one takes a request.
"""
from libc.errno cimport EAGAIN, EINTR, EIO, ENODEV, ENOENT, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from qtfs_client.drivers.fuse3.dispatch cimport send_forgets, serve
from qtfs_client.drivers.fuse3.exchange cimport drain
from qtfs_client.drivers.fuse3.state cimport BUFFER_BYTES, FORGETS_AT_ONCE, LINK_UP, MAX_IDLE, mount_state, \
    pending_request, worker
from qtfs_client.includes.fuse_abi cimport fuse_in_header
from qtfs_client.includes.linux cimport POLLIN, eventfd_write, load_int, poll, pollfd, pthread_mutex_lock, \
    pthread_mutex_unlock, read, store_int, store_u64

cdef enum turn:                     # what a worker does next
    TURN_READ                       # read the device
    TURN_PENDING                    # serve the request that was set aside; it is in the buffer
    TURN_PARK


# ---- whose turn it is ------------------------------------------------------------------------------------------------

cdef void _wake_another_locked(mount_state *m) noexcept nogil:
    """The last idle worker has taken a request: see that somebody reads the next."""
    cdef worker *w = m.parked
    if m.idle + m.coming > 0:
        return
    if w != NULL:
        m.parked = w.next_parked
        w.parked = False
        m.coming += 1
        eventfd_write(w.link.wake_fd, 1)
        return
    if m.worker_count < m.worker_limit and not m.starting:
        m.starting = True
        eventfd_write(m.manager_fd, 1)
    if not m.saturated:
        m.saturated = True
        eventfd_write(m.event_fd, 1)


cdef void _take_pending_locked(worker *w) noexcept nogil:
    """Move the oldest request that was set aside into the worker's buffer."""
    cdef mount_state *m = w.mount
    cdef pending_request *pending = m.pending
    m.pending = pending.next
    if m.pending == NULL:
        m.pending_end = &m.pending
    m.pending_count -= 1
    m.pending_bytes -= pending.size
    memcpy(w.buffer, pending + 1, pending.size)
    w.device = m.triage_device
    store_u64(&w.current, w.request.unique)
    store_u64(&w.interrupted, w.request.unique if pending.interrupted_us > 0 else 0)
    free(pending)


cdef turn _next_turn(worker *w) noexcept nogil:
    cdef mount_state *m = w.mount
    cdef turn next_turn = TURN_READ
    pthread_mutex_lock(&m.guard)
    if m.pending != NULL:
        _take_pending_locked(w)
        _wake_another_locked(m)
        next_turn = TURN_PENDING
    elif m.idle >= MAX_IDLE:
        w.next_parked = m.parked
        m.parked = w
        w.parked = True
        next_turn = TURN_PARK
    else:
        m.idle += 1
    pthread_mutex_unlock(&m.guard)
    return next_turn


cdef void _arrive(worker *w) noexcept nogil:
    """A worker that was woken is there."""
    pthread_mutex_lock(&w.mount.guard)
    w.mount.coming -= 1
    pthread_mutex_unlock(&w.mount.guard)


cdef bint _is_parked(worker *w) noexcept nogil:
    cdef bint parked
    pthread_mutex_lock(&w.mount.guard)
    parked = w.parked
    pthread_mutex_unlock(&w.mount.guard)
    return parked


cdef void _park(worker *w) noexcept nogil:
    """Sleep until woken; or until the mount ends."""
    cdef pollfd fds
    fds.fd = w.link.wake_fd
    fds.events = POLLIN
    while _is_parked(w):
        if load_int(&w.mount.stopping):
            return
        poll(&fds, 1, -1)
        drain(w.link.wake_fd)
    _arrive(w)


# ---- reading -------------------------------------------------------------------------------------------------------

cdef ssize_t _read(worker *w) noexcept nogil:
    """Read the device, as one of its idle readers. The size, 0 to try again, or -errno."""
    cdef mount_state *m = w.mount
    cdef ssize_t got = read(m.device, w.buffer, BUFFER_BYTES)
    cdef int error = errno if got < 0 else 0
    pthread_mutex_lock(&m.guard)
    m.idle -= 1
    if got > 0:
        w.device = m.device
        store_u64(&w.current, w.request.unique)
        _wake_another_locked(m)
    pthread_mutex_unlock(&m.guard)
    # ENOENT: the request was interrupted before we had it.
    return got if error == 0 else 0 if error in (EINTR, EAGAIN, ENOENT) else -error


cdef bint _is_quiet(int device) noexcept nogil:
    """Whether the kernel asks for nothing at this moment."""
    cdef pollfd fds
    fds.fd = device
    fds.events = POLLIN
    return poll(&fds, 1, 0) == 0


cdef void _see_to_forgets(worker *w) noexcept nogil:
    """Forgets are sent when there is nothing better to do, or a message full of them."""
    cdef mount_state *m = w.mount
    while m.forget_count > 0 and load_int(&w.link.link) == LINK_UP and \
            (m.forget_count >= FORGETS_AT_ONCE or _is_quiet(m.device)):
        send_forgets(w)


cdef void _serve(worker *w, size_t size) noexcept nogil:
    """Serve the request in the buffer, unless the kernel sent nonsense."""
    if size >= sizeof(fuse_in_header) and w.request.len == size:
        w.argument_bytes = size - sizeof(fuse_in_header)
        serve(w)
    store_u64(&w.current, 0)


cdef bint _work_once(worker *w) noexcept nogil:
    """One turn; False when the mount has ended."""
    cdef ssize_t got
    cdef turn next_turn
    _see_to_forgets(w)
    next_turn = _next_turn(w)
    if next_turn == TURN_PARK:
        _park(w)
    elif next_turn == TURN_PENDING:
        _serve(w, w.request.len)
    else:
        got = _read(w)
        if got < 0:
            return False
        if got > 0:
            _serve(w, got)
    return not load_int(&w.mount.stopping)


cdef void work(worker *w) noexcept nogil:
    """A worker, from its start to the end of the mount."""
    while _work_once(w):
        pass
    stop(w.mount)


cdef void stop(mount_state *m) noexcept nogil:
    """End the mount: wake everybody who sleeps anywhere but in read(/dev/fuse), which ends with ENODEV."""
    cdef uint32_t i
    store_int(&m.stopping, 1)
    pthread_mutex_lock(&m.guard)
    for i in range(m.worker_count):
        eventfd_write(m.workers[i].link.wake_fd, 1)
    pthread_mutex_unlock(&m.guard)
    eventfd_write(m.event_fd, 1)
    eventfd_write(m.manager_fd, 1)
