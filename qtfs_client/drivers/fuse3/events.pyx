"""The event thread: the event channel, blocking locks, the server's pulse, and triage.

Triage: while every worker is busy, perhaps with a server that hangs, this thread reads the device instead, so that an
INTERRUPT is always seen. What it reads for the workers it puts aside, in order, and they take that first.
"""
from libc.errno cimport EAGAIN, EINTR, EIO, ENODEV, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from qtfs_client.drivers.fuse3.callers cimport fatal_signal_pending
from qtfs_client.drivers.fuse3.device cimport write_reply
from qtfs_client.drivers.fuse3.exchange cimport drain, lose, stop
from qtfs_client.drivers.fuse3.interrupts cimport answer_pending_locked, interrupt
from qtfs_client.drivers.fuse3.replies cimport queue_forget
from qtfs_client.drivers.fuse3.state cimport BUFFER_BYTES, LINK_LOST, LINK_READY, LINK_UP, MAX_CHANGES, \
    PENDING_BYTES, PENDING_REQUESTS, lock_wait, mount_change, mount_state, pending_request, worker
from qtfs_client.includes.fuse_abi cimport FUSE_BATCH_FORGET, FUSE_FORGET, FUSE_INTERRUPT, FUSE_LK_FLOCK, \
    fuse_batch_forget_in, fuse_forget_in, fuse_in_header, fuse_interrupt_in, fuse_lk_in
from qtfs_client.includes.linux cimport POLLIN, add_int, eventfd_write, load_i64, load_int, load_u64, poll, pollfd, \
    pthread_mutex_lock, pthread_mutex_unlock, read, store_i64, store_int, store_u64
from qtfs_common.protocol cimport EVENT_SLOT, LOCK_FLOCK, MESSAGE_REPLY, OP_CANCEL, OP_MOUNTS_CHANGED, OP_PING, OP_SETLKW, caller, header, \
    lock_request
from qtfs_common.transport cimport WAIT_READABLE, WAIT_WRITABLE, message, now_us

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLLIN
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)

cdef extern from "<unistd.h>" nogil:
    int close(int)

cdef enum:
    TICK_US = 1000000               # while somebody waits for something
    PING_US = 5000000               # between two PINGs, at most
    SETTLE_US = 10000               # all workers busy for that long: triage begins
    UNLOCK = 2                      # lock_request.type


# ---- blocking locks --------------------------------------------------------------------------------------------------

cdef int wait_for_lock(worker *w) noexcept nogil:
    """Take over a worker's SETLKW: it is free for others. 0 or -ENOMEM."""
    cdef mount_state *m = w.mount
    cdef fuse_lk_in *asked = <fuse_lk_in *>w.argument
    cdef lock_wait *wait = <lock_wait *>calloc(1, sizeof(lock_wait))
    if wait == NULL:
        return -ENOMEM
    wait.request = w.request[0]
    wait.device = w.device
    wait.since_us = now_us()
    wait.lock.handle = asked.fh
    wait.lock.owner = asked.owner
    wait.lock.start = asked.start
    wait.lock.end = asked.end
    wait.lock.type = asked.type
    wait.lock.pid = asked.pid
    wait.lock.flags = LOCK_FLOCK if asked.lk_flags & FUSE_LK_FLOCK else 0
    pthread_mutex_lock(&m.guard)
    # Together with the list, so that an INTERRUPT finds the request in one place or the other.
    wait.interrupted = load_u64(&w.interrupted) == w.request.unique
    store_u64(&w.current, 0)
    wait.next = m.lock_waits
    m.lock_waits = wait
    pthread_mutex_unlock(&m.guard)
    eventfd_write(m.event_fd, 1)
    return 0


cdef lock_wait **_find_wait_locked(mount_state *m, uint64_t unique) noexcept nogil:
    cdef lock_wait **at = &m.lock_waits
    while at[0] != NULL and at[0].request.unique != unique:
        at = &at[0].next
    return at


cdef void _forget_wait_locked(lock_wait **at) noexcept nogil:
    cdef lock_wait *wait = at[0]
    at[0] = wait.next
    free(wait)


cdef void _answer_wait_locked(lock_wait **at, int error) noexcept nogil:
    """Answer the kernel (errno, positive, or 0) what the server said, and forget the wait."""
    write_reply(at[0].device, at[0].request.unique, -error, NULL, 0, NULL, 0)
    _forget_wait_locked(at)


cdef void _give_up_wait_locked(lock_wait *wait, int error) noexcept nogil:
    """Answer the kernel before the server does; the server is told later."""
    write_reply(wait.device, wait.request.unique, -error, NULL, 0, NULL, 0)
    wait.orphan = True
    wait.dying = error == EINTR


cdef int _wait_is_over(mount_state *m, lock_wait *wait, int64_t now) noexcept nogil:
    """The errno that a wait is to end with although the server has not answered; 0: it goes on."""
    if load_int(&m.down) or (m.timeout_us > 0 and now - wait.since_us > m.timeout_us and
                             now - load_i64(&m.heard_us) > m.timeout_us):
        return EIO
    if wait.interrupted and fatal_signal_pending(wait.request.pid):
        return EINTR
    return 0


cdef void _see_to_waits_locked(mount_state *m, int64_t now) noexcept nogil:
    cdef lock_wait *wait = m.lock_waits
    cdef int error
    while wait != NULL:
        error = 0 if wait.orphan else _wait_is_over(m, wait, now)
        if error:
            _give_up_wait_locked(wait, error)
        wait = wait.next


cdef void _lose(mount_state *m) noexcept nogil:
    """The event channel broke: whatever broke it may have broken the others."""
    add_int(&m.breaks, 1)
    lose(m.manager_fd, &m.event)


# ---- sending -------------------------------------------------------------------------------------------------------

cdef uint8_t *_begin(mount_state *m, uint16_t op, uint64_t tag, size_t body_bytes) noexcept nogil:
    """Room for the body of a message, its header filled in; NULL if there is none."""
    cdef uint8_t *room = m.event.ch.ops.reserve(m.event.ch, sizeof(header) + body_bytes)
    cdef header *head = <header *>room
    if room == NULL:
        return NULL
    memset(head, 0, sizeof(header))
    head.length = <uint32_t>(sizeof(header) + body_bytes)
    head.op = op
    head.slot = EVENT_SLOT
    head.tag = tag
    return room + sizeof(header)


cdef size_t _put_lock(mount_state *m, lock_wait *wait) noexcept nogil:
    """A SETLKW: its bytes after the header."""
    cdef caller *who = <caller *>_begin(m, OP_SETLKW, wait.request.unique, sizeof(caller) + sizeof(lock_request))
    memset(who, 0, sizeof(caller))
    who.node = wait.request.nodeid
    who.uid = wait.request.uid
    who.gid = wait.request.gid
    who.pid = wait.request.pid
    (<lock_request *>(who + 1))[0] = wait.lock
    wait.sent = True
    return sizeof(caller) + sizeof(lock_request)


cdef void _put_cancel(mount_state *m, lock_wait *wait) noexcept nogil:
    _begin(m, OP_CANCEL, wait.request.unique, 0)
    wait.cancelled = True


cdef bint _put_orphan_locked(mount_state *m, lock_wait **at, size_t *body_bytes) noexcept nogil:
    """Tell the server that nobody waits any more: CANCEL, and for a dying owner an unlock, since the grant may have
    come first. What the server replies is not waited for. False: there was nothing to tell.
    """
    cdef lock_wait *wait = at[0]
    if wait.sent and not wait.cancelled:
        _put_cancel(m, wait)
        return True
    if not wait.sent or not wait.dying:
        _forget_wait_locked(at)
        return False
    wait.lock.type = UNLOCK
    body_bytes[0] = _put_lock(m, wait)
    _forget_wait_locked(at)
    return True


cdef bint _put_wait(mount_state *m, lock_wait *wait, size_t *body_bytes) noexcept nogil:
    """What the server has to know of somebody who waits; False: nothing new."""
    if not wait.sent:
        body_bytes[0] = _put_lock(m, wait)
        return True
    if wait.interrupted and not wait.cancelled:
        _put_cancel(m, wait)
        return True
    return False


cdef bint _next_message(mount_state *m, int64_t now, size_t *body_bytes) noexcept nogil:
    """Put what is to be sent next into the channel's room; False if there is nothing."""
    cdef lock_wait **at
    cdef lock_wait *wait
    cdef bint found = False
    body_bytes[0] = 0
    pthread_mutex_lock(&m.guard)
    at = &m.lock_waits
    while at[0] != NULL and not found:
        wait = at[0]
        found = _put_orphan_locked(m, at, body_bytes) if wait.orphan else _put_wait(m, wait, body_bytes)
        if at[0] == wait:
            at = &wait.next
    pthread_mutex_unlock(&m.guard)
    if not found and now - m.pinged_us >= _ping_us(m):
        _begin(m, OP_PING, 0, 0)
        m.pinged_us = now
        if m.unanswered_us == 0:
            m.unanswered_us = now
        found = True
    return found


cdef int64_t _ping_us(mount_state *m) noexcept nogil:
    """Between two PINGs: several within the timeout."""
    return min(<int64_t>PING_US, m.timeout_us // 3) if m.timeout_us > 0 else PING_US


cdef void _send(mount_state *m, int64_t now) noexcept nogil:
    """Send what there is, as far as the channel takes it."""
    cdef size_t body_bytes = 0
    cdef int status = m.event.ch.ops.flush(m.event.ch)
    while status == 0 and _next_message(m, now, &body_bytes):
        status = m.event.ch.ops.commit(m.event.ch, sizeof(header) + body_bytes, NULL, 0)
    m.event_flushing = status == -EAGAIN
    if status < 0 and status != -EAGAIN:
        _lose(m)


# ---- receiving -----------------------------------------------------------------------------------------------------

cdef void _take_message(mount_state *m, const message *got) noexcept nogil:
    """A reply to SETLKW ends a wait; others only show that the server lives."""
    cdef lock_wait **at
    if got.head.op != OP_SETLKW:
        return
    pthread_mutex_lock(&m.guard)
    at = _find_wait_locked(m, got.head.tag)
    if at[0] != NULL and not at[0].orphan:
        _answer_wait_locked(at, got.head.error if 0 <= got.head.error < 512 else EIO)
    pthread_mutex_unlock(&m.guard)


cdef void _note_mounts(mount_state *m, const message *got) noexcept nogil:
    """Keep a MOUNTS_CHANGED (NULL: there may have been some) for whoever follows the server's mounts.

    Without room the names expire by themselves.
    """
    cdef size_t size = got.body_bytes if got != NULL else 0
    cdef mount_change *change = NULL
    if m.change_count < MAX_CHANGES:
        change = <mount_change *>malloc(sizeof(mount_change) + size)
    if change == NULL:
        return
    change.next = NULL
    change.size = size
    if size > 0:
        memcpy(change + 1, got.body, size)
    pthread_mutex_lock(&m.guard)
    m.changes_end[0] = change
    m.changes_end = &change.next
    m.change_count += 1
    pthread_mutex_unlock(&m.guard)
    eventfd_write(m.changes_fd, 1)


cdef bint _is_expected(const message *got) noexcept nogil:
    return got.head.flags & MESSAGE_REPLY or got.head.op == OP_MOUNTS_CHANGED


cdef void _receive(mount_state *m, int64_t now) noexcept nogil:
    cdef message got
    cdef int found = m.event.ch.ops.receive(m.event.ch, &got)
    while found == 1 and _is_expected(&got) and not load_int(&m.stopping):
        m.unanswered_us = 0
        store_i64(&m.heard_us, now)
        if got.head.op == OP_MOUNTS_CHANGED:
            _note_mounts(m, &got)
        else:
            _take_message(m, &got)
        found = m.event.ch.ops.receive(m.event.ch, &got)
    if found != 0:
        _lose(m)


cdef void _take_fresh(mount_state *m, int64_t now) noexcept nogil:
    """Go on over a fresh channel: whoever waits for a lock asks again."""
    cdef lock_wait *wait
    m.event.ch = m.event.fresh
    m.event.epoch = m.event.fresh_epoch
    m.event_flushing = False
    store_int(&m.event.link, LINK_UP)
    m.unanswered_us = 0
    store_i64(&m.heard_us, now)
    _note_mounts(m, NULL)
    pthread_mutex_lock(&m.guard)
    wait = m.lock_waits
    while wait != NULL:
        wait.cancelled = False
        wait.sent = wait.orphan         # an orphan is only to be cancelled
        wait = wait.next
    pthread_mutex_unlock(&m.guard)


cdef bint _is_silent(mount_state *m, int64_t now) noexcept nogil:
    """Whether a PING has gone unanswered for the mount's timeout: a fresh connection may find the server sooner than
    TCP's ever rarer retransmissions. Not merely since it was heard: we may have been stopped ourselves.
    """
    return m.timeout_us > 0 and m.unanswered_us > 0 and now - m.unanswered_us > m.timeout_us


cdef void _attend_channel(mount_state *m, int64_t now) noexcept nogil:
    """All that can be done on the event channel without sleeping."""
    if load_int(&m.event.link) == LINK_READY:
        _take_fresh(m, now)
    if load_int(&m.event.link) == LINK_UP:
        _receive(m, now)
    if load_int(&m.event.link) == LINK_UP and _is_silent(m, now):
        _lose(m)
    if load_int(&m.event.link) == LINK_UP:
        _send(m, now)


# ---- triage --------------------------------------------------------------------------------------------------------

cdef void _triage_forgets(mount_state *m, fuse_in_header *request) noexcept nogil:
    """FORGET, BATCH_FORGET: for the next worker that sends some."""
    cdef uint8_t *argument = <uint8_t *>(request + 1)
    cdef size_t have = request.len - sizeof(fuse_in_header)
    cdef uint64_t *pairs = <uint64_t *>(argument + sizeof(fuse_batch_forget_in))
    cdef size_t i, count
    if request.opcode == FUSE_FORGET:
        if have >= sizeof(fuse_forget_in):
            queue_forget(m, request.nodeid, (<fuse_forget_in *>argument).nlookup)
    elif have >= sizeof(fuse_batch_forget_in):
        count = min(<size_t>(<fuse_batch_forget_in *>argument).count, (have - sizeof(fuse_batch_forget_in)) // 16)
        for i in range(count):
            queue_forget(m, pairs[2 * i], pairs[2 * i + 1])


cdef int _set_aside_locked(mount_state *m, const uint8_t *buffer, size_t size) noexcept nogil:
    """Keep a request for the workers: 0 or -ENOMEM."""
    cdef pending_request *pending = <pending_request *>malloc(sizeof(pending_request) + size)
    if pending == NULL:
        return -ENOMEM
    pending.next = NULL
    pending.size = size
    pending.since_us = now_us()
    pending.interrupted_us = 0
    pending.answered = False
    memcpy(pending + 1, buffer, size)
    m.pending_end[0] = pending
    m.pending_end = &pending.next
    m.pending_count += 1
    m.pending_bytes += size
    return 0


cdef bint _has_room_locked(mount_state *m) noexcept nogil:
    return m.pending_count < PENDING_REQUESTS and m.pending_bytes < PENDING_BYTES


cdef bint _nobody_reads_locked(mount_state *m) noexcept nogil:
    return m.idle + m.coming == 0 and m.parked == NULL


cdef bint _triage_one(mount_state *m, uint8_t *buffer) noexcept nogil:
    """Read and see to one request if still nobody else does. False: triage is over, for now."""
    cdef fuse_in_header *request = <fuse_in_header *>buffer
    cdef ssize_t got = -1
    cdef int kept = 0, error = 0
    pthread_mutex_lock(&m.guard)
    if _nobody_reads_locked(m) and _has_room_locked(m):
        # Under the guard: no worker can be about to sleep while a request is set aside for it. It does not block.
        got = read(m.triage_device, buffer, BUFFER_BYTES)
        error = errno if got < 0 else 0
        if got >= <ssize_t>sizeof(fuse_in_header) and \
                request.opcode not in (FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT):
            kept = _set_aside_locked(m, buffer, got)
    pthread_mutex_unlock(&m.guard)
    if error == ENODEV:
        stop(m)                         # unmounted: the workers, who wait for the server, would not learn of it
    if got < <ssize_t>sizeof(fuse_in_header) or request.len != <size_t>got:
        return False
    if kept < 0:
        write_reply(m.triage_device, request.unique, kept, NULL, 0, NULL, 0)
    elif request.opcode == FUSE_INTERRUPT and <size_t>got >= sizeof(fuse_in_header) + sizeof(fuse_interrupt_in):
        interrupt(m, m.triage_device, request.unique, (<fuse_interrupt_in *>(request + 1)).unique)
    elif request.opcode in (FUSE_FORGET, FUSE_BATCH_FORGET):
        _triage_forgets(m, request)
    return True


cdef bint _still_saturated(mount_state *m) noexcept nogil:
    """Whether all workers are busy; if not, they say so again when they are."""
    cdef bint saturated
    pthread_mutex_lock(&m.guard)
    m.saturated = m.saturated and _nobody_reads_locked(m)
    saturated = m.saturated and _has_room_locked(m)     # or the device stays readable, and we would never sleep
    pthread_mutex_unlock(&m.guard)
    return saturated and m.triage_device >= 0


# ---- the loop ------------------------------------------------------------------------------------------------------

cdef void _tick(mount_state *m, int64_t now) noexcept nogil:
    """Answer those that need not wait any longer."""
    pthread_mutex_lock(&m.guard)
    _see_to_waits_locked(m, now)
    answer_pending_locked(m, now)
    pthread_mutex_unlock(&m.guard)


cdef int64_t _sleep_us(mount_state *m, bint triage, bint settling, int64_t now) noexcept nogil:
    """How long there is nothing to do unless somebody wakes us."""
    cdef int64_t left = max(m.pinged_us + _ping_us(m) - now, 1000)
    if settling:
        return SETTLE_US
    return min(left, TICK_US) if triage or m.lock_waits != NULL or m.pending != NULL else left


cdef void _sleep(mount_state *m, int bell, int64_t timeout_us) noexcept nogil:
    """Wait for the event channel or for what the bell, an epoll descriptor, collects."""
    cdef pollfd fds
    if load_int(&m.event.link) == LINK_UP:
        m.event.ch.ops.wait(m.event.ch, WAIT_READABLE | (WAIT_WRITABLE if m.event_flushing else 0), bell, timeout_us)
        return
    fds.fd = bell
    fds.events = POLLIN
    poll(&fds, 1, <int>(timeout_us // 1000) + 1)


cdef void _listen(int bell, int fd, bint wanted) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.fd = fd
    epoll_ctl(bell, EPOLL_CTL_ADD if wanted else EPOLL_CTL_DEL, fd, &event)


cdef void _watch(mount_state *m, int bell, uint8_t *buffer) noexcept nogil:
    cdef bint triage = False, settling = False, wanted
    cdef int64_t now
    while not load_int(&m.stopping):
        now = now_us()
        _attend_channel(m, now)
        _tick(m, now)
        wanted = _still_saturated(m)
        if wanted and not triage and not settling:
            settling = True             # most of the time a worker is back before it is worth the trouble
        elif wanted != triage:
            _listen(bell, m.triage_device, wanted)
            triage = wanted
            settling = False
        elif not wanted:
            settling = False
        while triage and _triage_one(m, buffer):
            pass
        _sleep(m, bell, _sleep_us(m, triage, settling, now))
        drain(m.event_fd)


cdef void watch(mount_state *m) noexcept nogil:
    """The event thread, from its start to the end of the mount."""
    cdef int bell = epoll_create1(EPOLL_CLOEXEC)
    cdef uint8_t *buffer = <uint8_t *>malloc(BUFFER_BYTES)
    if bell >= 0 and buffer != NULL:
        _listen(bell, m.event_fd, True)
        _watch(m, bell, buffer)
    free(buffer)
    if bell >= 0:
        close(bell)
