"""The workers' loop: who reads the device, who parks, and who is woken.

One worker reads /dev/fuse, first without sleeping: the caller would pay for waking it. It reads the next request itself
when it has its reply, so the engine's worker at the other end of its channel stays awake too. It *owes* the mount a reader
meanwhile, and wakes another one when the next request comes before its reply, when that takes long, or when requests pile
up. The worker that parked last (its cache is warmest) is woken first.
"""
from libc.errno cimport EAGAIN, EINTR, ENOENT, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from qtfs_client.drivers.fuse3.dispatch cimport send_forgets, send_releases, serve
from qtfs_client.drivers.fuse3.exchange cimport drain, is_quiet, stop, wake_another_locked
from qtfs_client.drivers.fuse3.piping cimport drop_piped
from qtfs_client.drivers.fuse3.placing cimport all_in_buffer, read_placed
from qtfs_client.drivers.fuse3.state cimport BACKLOG, BUFFER_BYTES, FORGETS_AT_ONCE, LINK_UP, MAX_IDLE, mount_state, \
    pending_request, worker
from qtfs_client.includes.fuse_abi cimport fuse_in_header
from qtfs_client.includes.linux cimport load_int, pthread_mutex_lock, pthread_mutex_unlock, read, store_u64
from qtfs_common.includes.polling cimport POLLIN, poll, pollfd
from qtfs_common.pipes cimport pipe_drop
from qtfs_common.protocol cimport MAX_RELEASES
from qtfs_common.spinning cimport SPIN_CAP_US, spin_begin, spin_found, spin_turn
from qtfs_common.transport cimport now_us

cdef enum:
    WAS_THERE_US = 5                # a read that takes less found a request waiting
    LOOK_CREDIT = 8                 # looks that may fail in a row before they are taken for useless
    LOOK_RETRY = 64                 # requests until a useless look is tried again
    RELEASES_US = 50                # of looking, for which handles that are to be ended wait for company

cdef enum turn:                     # what a worker does next
    TURN_READ                       # read the device
    TURN_PENDING                    # serve the request that was set aside; it is in the buffer
    TURN_PARK


# ---- whose turn it is ------------------------------------------------------------------------------------------------

cdef void _take_pending_locked(worker *w) noexcept nogil:
    """Move the oldest request that was set aside into the worker's buffer."""
    cdef mount_state *m = w.mount
    cdef pending_request *pending = m.pending
    m.pending = pending.next
    if m.pending == NULL:
        m.pending_end = &m.pending
    if not pending.answered:
        m.pending_count -= 1
        m.pending_bytes -= pending.size
    all_in_buffer(w)
    memcpy(w.buffer, pending + 1, pending.size)
    w.device = pending.device
    w.answered = pending.answered
    w.delay_us = pending.delay_us
    w.since_us = pending.since_us
    w.interrupted_us = pending.interrupted_us
    store_u64(&w.current, w.request.unique)
    store_u64(&w.interrupted, w.request.unique if pending.interrupted_us > 0 else 0)
    free(pending)


cdef turn _next_turn(worker *w) noexcept nogil:
    cdef mount_state *m = w.mount
    cdef turn next_turn = TURN_READ
    pthread_mutex_lock(&m.guard)
    if w.serving:
        w.serving = False
        m.serving -= 1
    if m.pending != NULL:
        _take_pending_locked(w)
        wake_another_locked(m)
        next_turn = TURN_PENDING
    elif m.idle >= MAX_IDLE:
        w.next_parked = m.parked
        m.parked = w
        w.parked = True
        next_turn = TURN_PARK
    else:
        m.idle += 1
        m.reader = w
        w.owes = False
    pthread_mutex_unlock(&m.guard)
    return next_turn


cdef void _arrive(worker *w) noexcept nogil:
    """A worker that was woken is there."""
    pthread_mutex_lock(&w.mount.guard)
    w.mount.coming -= 1
    w.owes = w.mount.idle + w.mount.coming == 0     # until it reads: forgets go out first
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
    pipe_drop(&w.pipe)                  # of which a user may have 64
    fds.fd = w.link.wake_fd
    fds.events = POLLIN
    while _is_parked(w):
        if load_int(&w.mount.stopping):
            return
        poll(&fds, 1, -1)
        drain(w.link.wake_fd)
    _arrive(w)


# ---- reading -------------------------------------------------------------------------------------------------------

cdef ssize_t _read_device(worker *w, int device) noexcept nogil:
    """What read(2) brings into the buffer: its size or -errno."""
    cdef ssize_t got = read(device, w.buffer, BUFFER_BYTES)
    w.device = device
    all_in_buffer(w)
    return got if got >= 0 else -errno


cdef bint _has_to_end_some(const mount_state *m) noexcept nogil:
    """Whether there are handles that the server has to be told to end, and nobody is at it."""
    return m.closed_count > 0 and not m.ending


cdef bint _looking_pays(worker *w, int64_t now) noexcept nogil:
    """Whether to look for the next request without sleeping: it came soon lately, or it is time for a try."""
    w.look_count += 1
    if w.mount.spin_us == 0 or w.mount.triage_device < 0 or not spin_begin(&w.looker, now):
        return False
    if w.look_credit <= 0 and w.look_count % LOOK_RETRY == 0:
        w.look_credit = 1
    return w.look_credit > 0


cdef ssize_t _look(worker *w, int64_t now) noexcept nogil:
    """Look at the device again and again, for at most spin_us. The size of a request, -EAGAIN: none, or -errno.

    Who sleeps there leaves a processor idle, and the caller pays for waking it.
    """
    cdef int64_t until = now + SPIN_CAP_US
    cdef bint whole = not _has_to_end_some(w.mount)
    cdef int64_t longest = w.mount.spin_us if whole else min(w.mount.spin_us, <int64_t>RELEASES_US)
    cdef int device = w.mount.triage_device
    cdef ssize_t got = -EAGAIN
    while got == -EAGAIN and w.looker.spent_us < longest and now < until:
        got = read_placed(w, device)
        if got == -EAGAIN:
            now = spin_turn(&w.looker, now)
    if got != -EAGAIN:
        spin_found(&w.looker, now)
    if got != -EAGAIN:
        w.look_credit = min(w.look_credit + 1, LOOK_CREDIT)
    elif whole:
        w.look_credit -= 1
    return got


cdef ssize_t _sleep(worker *w) noexcept nogil:
    """Read the device when there is something. -EAGAIN: we were woken for another reason."""
    cdef int device = w.mount.triage_device if w.mount.triage_device >= 0 else w.mount.device
    cdef pollfd fds[2]
    fds[0].fd = device
    fds[1].fd = w.link.wake_fd
    fds[0].events = fds[1].events = POLLIN
    if poll(fds, 2, -1) < 0:
        return -errno
    if fds[1].revents != 0:
        drain(w.link.wake_fd)
    return _read_device(w, device) if fds[0].revents != 0 else -EAGAIN


cdef ssize_t _next_request(worker *w) noexcept nogil:
    """The next request into the buffer, however long it takes. Its size or -errno."""
    cdef int64_t asked_us = now_us()
    cdef ssize_t got = -EAGAIN
    if _looking_pays(w, asked_us):
        got = _look(w, asked_us)
    w.releases_due = got == -EAGAIN and _has_to_end_some(w.mount) and is_quiet(w.mount.device)
    if w.releases_due:
        return got                      # before we may sleep
    if got == -EAGAIN:
        got = _sleep(w)
    w.since_us = now_us()
    w.interrupted_us = 0
    w.backlog = w.backlog + 1 if w.since_us - asked_us < WAS_THERE_US else 0
    return got


cdef ssize_t _read(worker *w) noexcept nogil:
    """Read the device, as one of its idle readers. The size, 0 to try again, or -errno."""
    cdef mount_state *m = w.mount
    cdef ssize_t got = _next_request(w)
    pthread_mutex_lock(&m.guard)
    m.idle -= 1
    m.reader = NULL
    w.owes = m.idle + m.coming == 0     # after an error too: forgets may go out before the next read
    if got > 0:
        w.answered = False
        w.delay_us = 0
        store_u64(&w.current, w.request.unique)
        w.serving = True
        m.serving += 1
        if w.owes and w.backlog >= BACKLOG and m.serving < m.crew:
            w.backlog = 0
            w.owes = False
            wake_another_locked(m)
    pthread_mutex_unlock(&m.guard)
    # ENOENT: the request was interrupted before we had it.
    return 0 if got in (-EINTR, -EAGAIN, -ENOENT) else got


cdef void _see_to_releases(worker *w) noexcept nogil:
    """Handles are ended when nothing else was asked for a moment, when there are many of them, or before we park: whoever
    reads the device instead may sleep there.
    """
    cdef mount_state *m = w.mount
    while _has_to_end_some(m) and (w.releases_due or m.closed_count == MAX_RELEASES or m.idle >= MAX_IDLE):
        send_releases(w)
        w.releases_due = False
    w.releases_due = False


cdef void _see_to_forgets(worker *w) noexcept nogil:
    """Forgets are sent when there is nothing better to do, or a message full of them."""
    cdef mount_state *m = w.mount
    while m.forget_count > 0 and load_int(&w.link.link) == LINK_UP and \
            (m.forget_count >= FORGETS_AT_ONCE or is_quiet(m.device)):
        send_forgets(w)


cdef void _serve(worker *w, size_t size) noexcept nogil:
    """Serve the request in the buffer, unless the kernel sent nonsense."""
    if size >= sizeof(fuse_in_header) and w.request.len == size:
        w.argument_bytes = size - sizeof(fuse_in_header)
        serve(w)
        drop_piped(w)                   # of a reply that came after its caller had been answered
    store_u64(&w.current, 0)


cdef bint _work_once(worker *w) noexcept nogil:
    """One turn; False when the mount has ended."""
    cdef ssize_t got
    cdef turn next_turn
    _see_to_releases(w)
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
