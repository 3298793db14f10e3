"""The event thread: the event channel, whatever waits for the server there, the server's pulse, and triage.

Triage: while every worker is busy, perhaps with a server that hangs, this thread reads the device instead, so that an
INTERRUPT is always seen. What it reads for the workers it puts aside, in order, and they take that first.
"""
from libc.errno cimport EAGAIN, ENODEV, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from qtfs_client.drivers.fuse3.delayed cimport bring_back_locked, see_to_crew
from qtfs_client.drivers.fuse3.device cimport write_reply
from qtfs_client.drivers.fuse3.exchange cimport drain, lose, stop
from qtfs_client.drivers.fuse3.interrupts cimport answer_pending_locked, interrupt
from qtfs_client.drivers.fuse3.made_nodes cimport see_to_opens
from qtfs_client.drivers.fuse3.replies cimport take_forgets
from qtfs_client.drivers.fuse3.state cimport BUFFER_BYTES, LINK_READY, LINK_UP, MAX_CHANGE_BYTES, MAX_CHANGES, PENDING_BYTES, \
    PENDING_REQUESTS, mount_change, mount_state, pending_request
from qtfs_client.drivers.fuse3.waits cimport ask_again, next_wait_message, see_to_waits_locked, take_wait_reply
from qtfs_client.includes.fuse_abi cimport FUSE_BATCH_FORGET, FUSE_FORGET, FUSE_INTERRUPT, FUSE_NOTIFY_POLL, \
    fuse_in_header, fuse_interrupt_in
from qtfs_client.includes.linux cimport add_int, load_int, load_u64, pthread_mutex_lock, pthread_mutex_unlock, read, \
    store_i64, store_int
from qtfs_common.includes.polling cimport EPOLLIN, EPOLL_CTL_ADD, EPOLL_CTL_DEL, POLLIN, epoll_ctl, epoll_event, \
    eventfd_write, poll, pollfd
from qtfs_common.protocol cimport EVENT_SLOT, MESSAGE_REPLY, OP_CANCEL, OP_MOUNTS_CHANGED, OP_PING, OP_READY, header
from qtfs_common.transport cimport WAIT_READABLE, WAIT_WRITABLE, message, now_us

cdef enum:
    TICK_US = 1000000               # while somebody waits for something
    CREW_TICK_US = 50000            # while all workers do
    PING_US = 5000000               # between two PINGs, at most
    DEAD_US = 10000000              # silence after which the event channel is replaced
    SETTLE_US = 10000               # all workers busy for that long: triage begins
    TOLD_AT_ONCE = 4096             # pollers, between two looks at everything else
    UNCONFIRMED_AT_MOST = 32        # the server keeps messages until we confirm them


# ---- sending -----------------------------------------------------------------------------------------------------------

cdef void _lose(mount_state *m) noexcept nogil:
    """The event channel broke: whatever broke it may have broken the others."""
    add_int(&m.breaks, 1)
    lose(m.manager_fd, &m.event)


cdef uint8_t *_begin(mount_state *m, size_t size) noexcept nogil:
    """Room for a message. It will tell the server how far we are."""
    m.event_unconfirmed = 0
    return m.event.ch.ops.reserve(m.event.ch, size, False)


cdef size_t _put_short(mount_state *m, uint16_t op, uint64_t tag) noexcept nogil:
    """A message without a body: its size."""
    cdef header *head = <header *>_begin(m, sizeof(header))
    memset(head, 0, sizeof(header))
    head.length = sizeof(header)
    head.op = op
    head.slot = EVENT_SLOT
    head.sequence = m.event_seen
    head.tag = tag
    return sizeof(header)


cdef size_t _put_whole(mount_state *m, const uint8_t *ready, size_t size) noexcept nogil:
    """A message that lies ready: its size."""
    cdef uint8_t *room = _begin(m, size)
    memcpy(room, ready, size)
    (<header *>room).sequence = m.event_seen
    return size


cdef size_t _next_message(mount_state *m, int64_t now) noexcept nogil:
    """Put what is to be sent next into the channel's room: its size; 0: there is nothing."""
    cdef uint8_t *found = NULL
    cdef size_t size = 0
    if next_wait_message(m, &found, &size):
        return _put_whole(m, found, size) if size > 0 else _put_short(m, OP_CANCEL, (<header *>found).tag)
    if now - m.pinged_us < _ping_us(m) and m.event_unconfirmed < UNCONFIRMED_AT_MOST:
        return 0
    m.pinged_us = now
    if m.unanswered_us == 0:
        m.unanswered_us = now
    return _put_short(m, OP_PING, 0)


cdef int64_t _ping_us(mount_state *m) noexcept nogil:
    """Between two PINGs: several within the timeout."""
    return min(<int64_t>PING_US, m.timeout_us // 3) if m.timeout_us > 0 else PING_US


cdef void _send(mount_state *m, int64_t now) noexcept nogil:
    """Send what there is, as far as the channel takes it."""
    cdef int status = m.event.ch.ops.flush(m.event.ch)
    cdef size_t size = _next_message(m, now) if status == 0 else 0
    while size > 0:
        status = m.event.ch.ops.commit(m.event.ch, size, NULL, 0)
        size = _next_message(m, now) if status == 0 else 0
    m.event_flushing = status == -EAGAIN
    if status < 0 and status != -EAGAIN:
        _lose(m)


# ---- the server's pulse ----------------------------------------------------------------------------------------------

cdef void _hear(mount_state *m) noexcept nogil:
    """The server has said something."""
    m.unanswered_us = 0
    store_i64(&m.silent_us, 0)


cdef void _count_silence(mount_state *m, int64_t slept_us, int64_t planned_us) noexcept nogil:
    """What is beyond the plan is no silence of the server's: we were stopped ourselves, and have not looked yet."""
    store_i64(&m.silent_us, m.silent_us + min(slept_us, planned_us + SETTLE_US))


# ---- receiving -----------------------------------------------------------------------------------------------------

cdef void _notify_pollers(mount_state *m, uint64_t kh) noexcept nogil:
    """Make the kernel ask again what a file that somebody polls is ready for."""
    write_reply(m.device, 0, FUSE_NOTIFY_POLL, &kh, sizeof(kh), NULL, 0)


cdef bint _is_news(mount_state *m, const message *got) noexcept nogil:
    """Whether a numbered message has not been seen yet: after a break the server repeats what we did not confirm."""
    if got.head.sequence == 0:
        return True
    if got.head.sequence <= m.event_seen:
        return False
    m.event_seen = got.head.sequence
    m.event_unconfirmed += 1
    return True


cdef void _note_mounts(mount_state *m, const message *got) noexcept nogil:
    """Keep a MOUNTS_CHANGED (NULL: there may have been some) for whoever follows the server's mounts.

    Without room the names expire by themselves.
    """
    cdef size_t size = got.body_bytes if got != NULL and got.body_bytes <= MAX_CHANGE_BYTES else 0
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


cdef bint _take_message(mount_state *m, const message *got) noexcept nogil:
    """False: it has no place here."""
    cdef bint is_reply = got.head.flags & MESSAGE_REPLY
    if not _is_news(m, got):
        return True
    if is_reply and got.head.op != OP_PING:
        take_wait_reply(m, got)
    elif got.head.op == OP_READY:
        _notify_pollers(m, got.head.tag)
    elif got.head.op == OP_MOUNTS_CHANGED:
        _note_mounts(m, got)
    return is_reply or got.head.op in (OP_READY, OP_MOUNTS_CHANGED)


cdef void _receive(mount_state *m) noexcept nogil:
    cdef message got
    cdef int found = m.event.ch.ops.receive(m.event.ch, &got)
    while found == 1 and not load_int(&m.stopping):
        _hear(m)
        if not _take_message(m, &got):
            break
        found = m.event.ch.ops.receive(m.event.ch, &got)
    if found != 0:
        _lose(m)


cdef void _greet_new_session(mount_state *m) noexcept nogil:
    """The server has forgotten what was polled: whoever polls has to ask again, and learn that the file is lost."""
    m.event_seen = 0
    m.next_told = 1


cdef void _tell_pollers(mount_state *m) noexcept nogil:
    """Tell some of those that are to be told: the kernel counts its open files, ever, and who polls is any of them."""
    cdef uint64_t until = min(m.next_told + TOLD_AT_ONCE, load_u64(&m.last_polled) + 1)
    if m.next_told == 0:
        return
    while m.next_told < until:
        _notify_pollers(m, m.next_told)
        m.next_told += 1
    if until > load_u64(&m.last_polled):
        m.next_told = 0


cdef void _take_fresh(mount_state *m) noexcept nogil:
    """Go on over a fresh channel: whoever waits asks again."""
    cdef bint same_session = m.event.epoch == m.event.fresh_epoch
    m.event.ch = m.event.fresh
    m.event.epoch = m.event.fresh_epoch
    m.event_flushing = False
    store_int(&m.event.link, LINK_UP)
    if m.dead:
        m.dead = False
        add_int(&m.renewals, 1)         # the workers' channels may be as dead, and their replies lost with them
    _hear(m)
    _note_mounts(m, NULL)
    ask_again(m, same_session)
    if not same_session:
        _greet_new_session(m)


cdef bint _is_dead(mount_state *m) noexcept nogil:
    """Whether PINGs go unanswered for so long that a fresh connection may find the server sooner than TCP's ever rarer
    retransmissions.
    """
    return m.unanswered_us > 0 and m.silent_us > (min(m.timeout_us // 2, <int64_t>DEAD_US) if m.timeout_us > 0 else DEAD_US)


cdef void _attend_channel(mount_state *m, int64_t now) noexcept nogil:
    """All that can be done on the event channel without sleeping."""
    if load_int(&m.event.link) == LINK_READY:
        _take_fresh(m)
    if load_int(&m.event.link) == LINK_UP:
        _receive(m)
    if load_int(&m.event.link) == LINK_UP and _is_dead(m):
        m.dead = True
        _lose(m)
    if load_int(&m.event.link) == LINK_UP:
        _send(m, now)


# ---- triage --------------------------------------------------------------------------------------------------------

cdef int _set_aside_locked(mount_state *m, const uint8_t *buffer, size_t size) noexcept nogil:
    """Keep a request for the workers: 0 or -ENOMEM."""
    cdef pending_request *pending = <pending_request *>malloc(sizeof(pending_request) + size)
    if pending == NULL:
        return -ENOMEM
    pending.next = NULL
    pending.size = size
    pending.device = m.triage_device
    pending.delay_us = 0
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
        take_forgets(m, request)
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

cdef int64_t _tick(mount_state *m, int64_t now) noexcept nogil:
    """Answer those that need not wait any longer; see to what was put off. When there is the next to see to, or 0."""
    cdef int64_t next_us
    pthread_mutex_lock(&m.guard)
    see_to_waits_locked(m, now)
    answer_pending_locked(m, now)
    next_us = bring_back_locked(m, now)
    pthread_mutex_unlock(&m.guard)
    see_to_crew(m, now)
    if see_to_opens(m):
        next_us = min(next_us, now + TICK_US) if next_us > 0 else now + TICK_US
    return next_us


cdef int64_t _sleep_us(mount_state *m, bint triage, bint settling, int64_t now, int64_t next_us) noexcept nogil:
    """How long there is nothing to do unless somebody wakes us."""
    cdef bint connected = load_int(&m.event.link) == LINK_UP
    cdef int64_t left = max(m.pinged_us + _ping_us(m) - now, 1000) if connected else TICK_US
    if m.next_told > 0:
        return 0
    if settling:
        return SETTLE_US
    if next_us > 0:
        left = min(left, max(next_us - now, <int64_t>1000))
    if m.waiting_since_us > 0:
        left = min(left, <int64_t>CREW_TICK_US)
    if triage or m.waits != NULL or m.pending != NULL or m.unanswered_us > 0:
        return min(left, TICK_US)
    return left


cdef void _sleep(mount_state *m, int64_t timeout_us) noexcept nogil:
    """Wait for the event channel or for what the bell collects."""
    cdef pollfd fds
    if load_int(&m.event.link) == LINK_UP:
        m.event.ch.ops.wait(m.event.ch, WAIT_READABLE | (WAIT_WRITABLE if m.event_flushing else 0), m.bell,
                            -1, timeout_us)
        return
    fds.fd = m.bell
    fds.events = POLLIN
    poll(&fds, 1, <int>(timeout_us // 1000) + 1)


cdef void _listen(int bell, int fd, bint wanted) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.fd = fd
    epoll_ctl(bell, EPOLL_CTL_ADD if wanted else EPOLL_CTL_DEL, fd, &event)


cdef void _watch(mount_state *m) noexcept nogil:
    cdef bint triage = False, settling = False, wanted
    cdef int64_t now, next_us, planned_us
    while not load_int(&m.stopping):
        now = now_us()
        next_us = _tick(m, now)     # first: what it finds over has to be told to the server
        _attend_channel(m, now)
        _tell_pollers(m)
        wanted = _still_saturated(m)
        if wanted and not triage and not settling:
            settling = True             # most of the time a worker is back before it is worth the trouble
        elif wanted != triage:
            _listen(m.bell, m.triage_device, wanted)
            triage = wanted
            settling = False
        elif not wanted:
            settling = False
        while triage and _triage_one(m, m.triage_buffer):
            pass
        if triage:
            next_us = _tick(m, now) # what is refused anyway, at once
        planned_us = _sleep_us(m, triage, settling, now, next_us)
        _sleep(m, planned_us)
        _count_silence(m, now_us() - now, planned_us)
        drain(m.event_fd)


cdef void watch(mount_state *m) noexcept nogil:
    """The event thread, from its start to the end of the mount."""
    _listen(m.bell, m.event_fd, True)
    _watch(m)
