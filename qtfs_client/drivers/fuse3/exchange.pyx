"""One request to the server and its reply, over the worker's own channel, through whatever happens meanwhile.

The worker first looks for the reply without sleeping: waking an idle processor costs several times what a round trip
does. Then it waits in slices, and between them sees to three things:

- an INTERRUPT. A caller that is about to die gets EINTR at once. One that merely caught a signal is given two seconds,
  because EINTR is for good here: the kernel does not restart our system calls, and few programs expect it of mkdir(2).
- a silent server, if the mount has a timeout: EIO.
- a broken channel: the manager gets a fresh one, and the same request goes out again under its old sequence number.

Once the kernel has its answer the worker stays bound to the channel until the server's reply comes, to give back what
it grants; or until the connection ends.
"""
from libc.errno cimport EAGAIN, EINTR, EIO, ENODEV
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from qtfs_client.drivers.fuse3.callers cimport caught_signal_pending, fatal_signal_pending, is_exiting
from qtfs_client.drivers.fuse3.delayed cimport put_off
from qtfs_client.drivers.fuse3.device cimport reply_error
from qtfs_client.drivers.fuse3.piping cimport begin_piping, drop_piped, expect_short_reply, receive_piped
from qtfs_client.drivers.fuse3.placing cimport bring_home
from qtfs_client.drivers.fuse3.replies cimport answer_from_memory_locked
from qtfs_client.drivers.fuse3.state cimport CAUGHT_SIGNAL_US, LINK_LOST, LINK_READY, LINK_UP, MAKES_ENTRIES, \
    MAKES_ENTRY, MAKES_HANDLE, MEMORY_US, MUST_ARRIVE, PHASE_BUILD, PHASE_SEND, PHASE_SENT, builder, line, mount_state, \
    worker
from qtfs_client.includes.linux cimport load_i64, load_int, load_u64, pthread_mutex_lock, pthread_mutex_unlock, \
    store_int
from qtfs_common.includes.polling cimport POLLIN, eventfd_read, eventfd_write, poll, pollfd
from qtfs_common.protocol cimport ERROR_DELAYED, MESSAGE_REPLY, ROOT_NODE
from qtfs_common.spinning cimport SPIN_CAP_US, move_away, spin_begin, spin_found, spin_shares, spin_turn
from qtfs_common.transport cimport RECEIVE_BEGUN, WAIT_READABLE, WAIT_WOKEN, WAIT_WRITABLE, message, now_us

cdef enum:
    SLICE_US = 1000000              # longest sleep between two looks at interrupts and timeouts
    CLOSED_SLICE_US = 1000          # the same while handles wait to be ended
    QUICK_ATTEMPTS = 8              # of one request, over connections that break one after the other; then it takes its time
    MOST_ATTEMPTS = 64              # of one that nobody waits for, or that was executed and is beyond its timeout
    FIRST_PAUSE_US = 50000          # until the next attempt after those, doubled each time
    LAST_PAUSE_US = 1000000
    PATIENCE_US = 120               # how long the next request may have to wait for us before somebody else takes it
    SPIN_CREDIT = 8                 # spins that may fail in a row before they are taken for useless
    SHARED_TURNS = 8                # shared with the engine, it seems, until we move
    SPIN_RETRY = 64                 # requests until a useless spin is tried again


cdef void drain(int fd) noexcept nogil:
    """Reset an eventfd."""
    cdef uint64_t count = 0
    eventfd_read(fd, &count)


cdef void lose(int manager_fd, line *link) noexcept nogil:
    """Give up a broken channel: the manager takes it from here."""
    store_int(&link.link, LINK_LOST)
    eventfd_write(manager_fd, 1)


cdef void stop(mount_state *m) noexcept nogil:
    """End the mount: wake everybody who sleeps."""
    cdef uint32_t i
    store_int(&m.stopping, 1)
    pthread_mutex_lock(&m.guard)
    for i in range(m.worker_count):
        eventfd_write(m.workers[i].link.wake_fd, 1)
    pthread_mutex_unlock(&m.guard)
    eventfd_write(m.event_fd, 1)
    eventfd_write(m.manager_fd, 1)


# ---- who reads the device meanwhile ----------------------------------------------------------------------------------

cdef void wake_another_locked(mount_state *m) noexcept nogil:
    """See that somebody reads the device: a parked worker, a new one, or the event thread."""
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


cdef void hand_over(worker *w) noexcept nogil:
    """We are not back soon: if nobody has read the device since we did, somebody else has to."""
    if not w.owes:
        return
    w.owes = False
    pthread_mutex_lock(&w.mount.guard)
    wake_another_locked(w.mount)
    pthread_mutex_unlock(&w.mount.guard)


cdef bint is_quiet(int device) noexcept nogil:
    """Whether the kernel asks for nothing at this moment."""
    cdef pollfd fds
    fds.fd = device
    fds.events = POLLIN
    return poll(&fds, 1, 0) == 0


# ---- sending and receiving -------------------------------------------------------------------------------------------

cdef void _lose(worker *w) noexcept nogil:
    """Give up the worker's broken channel, which may hold data of the request in hand."""
    bring_home(w)
    drop_piped(w)
    lose(w.mount.manager_fd, &w.link)


cdef int _commit(worker *w) noexcept nogil:
    if w.payload_placed == 0:
        return w.link.ch.ops.commit(w.link.ch, w.message_bytes, w.payload, w.payload_bytes)
    w.placed_sent = True
    return w.link.ch.ops.commit_placed(w.link.ch, w.message_bytes, w.payload, w.payload_bytes, w.payload_placed)


cdef int _send(worker *w, builder build) noexcept nogil:
    """Bring the message on its way, or further on its way. 0: it is out; -EAGAIN: wait; other: see ask."""
    cdef int status
    if w.phase == PHASE_BUILD:
        w.link.ch.ops.release(w.link.ch)    # the last reply has been handed on
        expect_short_reply(w)
        status = build(w)
        if status < 0:
            return status
        w.phase = PHASE_SEND
        w.begun = True
        status = _commit(w)
    else:
        status = w.link.ch.ops.flush(w.link.ch)
    if status == 0:
        w.phase = PHASE_SENT
    elif status != -EAGAIN:
        _lose(w)
        status = -EAGAIN
    return status


cdef bint _is_reply(const worker *w, const message *reply) noexcept nogil:
    """Whether a message is the reply to what was sent last."""
    return w.phase == PHASE_SENT and reply.head.sequence == w.sequence and reply.head.op == w.asked_op and \
        reply.head.flags & MESSAGE_REPLY


cdef int _receive(worker *w, message *reply) noexcept nogil:
    """1: the reply has come; 0: not yet, or the channel has just broken."""
    cdef int found = receive_piped(w, reply) if w.piped_bytes > 0 else w.link.ch.ops.receive(w.link.ch, reply)
    if found == RECEIVE_BEGUN:
        found = begin_piping(w, reply) if _is_reply(w, reply) else w.link.ch.ops.receive(w.link.ch, reply)
    if found == 0:
        return 0
    if found > 0 and _is_reply(w, reply):
        w.renewals_seen = load_int(&w.mount.renewals)
        if load_int(&w.mount.overdue):
            store_int(&w.mount.overdue, 0)
        return 1
    _lose(w)
    return 0


cdef int _spin(worker *w, message *reply) noexcept nogil:
    """Look for the reply without sleeping, for at most spin_us: 1 or 0 as _receive."""
    cdef int64_t now = now_us()
    cdef int64_t until = now + SPIN_CAP_US
    cdef int64_t look = PATIENCE_US
    cdef int found = _receive(w, reply)
    while found == 0 and load_int(&w.link.link) == LINK_UP and w.spinner.spent_us < w.mount.spin_us and now < until:
        now = spin_turn(&w.spinner, now)
        found = _receive(w, reply)
        if found == 0 and w.owes and w.spinner.spent_us > look:
            look = w.spinner.spent_us + PATIENCE_US // 4
            if not is_quiet(w.mount.device):
                hand_over(w)
    if found > 0:
        spin_found(&w.spinner, now)
    # Not where the caller runs: /proc/PID/stat would tell, but must not be read in a FLUSH, callers.pyx says why.
    if spin_shares(&w.spinner, SHARED_TURNS, now):
        move_away()
    if found:
        w.spin_credit = min(w.spin_credit + 1, SPIN_CREDIT)
    else:
        w.spin_credit -= 1
    return found


cdef bint _spin_pays(worker *w) noexcept nogil:
    """Whether to spin for this reply: if it succeeded lately, or is due for a try, and nobody else wants to run."""
    w.spin_count += 1
    if w.mount.spin_us == 0 or not spin_begin(&w.spinner, w.asked_us):
        return False
    if w.spin_credit <= 0 and w.spin_count % SPIN_RETRY == 0:
        w.spin_credit = 1
    return w.spin_credit > 0


# ---- a fresh channel -------------------------------------------------------------------------------------------------

cdef bint _has_to_arrive(const worker *w) noexcept nogil:
    return not w.own and w.row.flags & MUST_ARRIVE != 0


cdef bint _has_to_be_finished(worker *w) noexcept nogil:
    """Whether the server may grant something, once, that nobody but us can give back."""
    return w.own or w.row.flags & MUST_ARRIVE != 0 or \
        w.begun and w.row.flags & (MAKES_ENTRY | MAKES_HANDLE | MAKES_ENTRIES) != 0


cdef bint _is_not_wanted(const worker *w) noexcept nogil:
    """Whether what the server has not executed need not be sent again: the caller has its answer."""
    return w.answered and not w.executed and not w.own and not _has_to_arrive(w)


cdef int _same_session(worker *w) noexcept nogil:
    """The slot lives on, and the server told how far it came. 0 or as _take_fresh."""
    cdef uint64_t accepted = w.link.fresh_sequence, asked = w.sequence
    w.executed = w.begun and asked == accepted
    if w.executed:
        return 0                        # the server answers again what it answered before
    w.sequence = accepted + 1
    if _is_not_wanted(w):
        return -EINTR
    return 0 if not w.begun or asked == accepted + 1 else -EIO


cdef int _new_session(worker *w) noexcept nogil:
    """The server has forgotten us: what was executed is unknown. 0 or as _take_fresh."""
    cdef bint in_doubt = w.executed or w.phase == PHASE_SENT
    w.link.epoch = w.link.fresh_epoch
    w.sequence = w.link.fresh_sequence + 1
    w.begun = w.executed = False
    if w.own or w.answered:
        return -EINTR
    return -EIO if in_doubt and not w.repeatable else 0


cdef bint _is_hopeless(const worker *w, int64_t now) noexcept nogil:
    """Whether the request breaks every connection that it goes out by, for as long as the server may be silent.

    What the server has granted is fetched for longer.
    """
    if w.attempts <= QUICK_ATTEMPTS or _has_to_arrive(w):
        return False
    if w.own:
        return w.attempts > MOST_ATTEMPTS
    return w.mount.timeout_us > 0 and now - w.since_us > w.mount.timeout_us and \
        (w.attempts > MOST_ATTEMPTS or not w.executed)


cdef int64_t _pause_us(const worker *w) noexcept nogil:
    """How long the next attempt waits, so that what breaks connections does not keep both sides busy with it."""
    if w.attempts <= QUICK_ATTEMPTS:
        return 0
    return min(<int64_t>FIRST_PAUSE_US << min(w.attempts - QUICK_ATTEMPTS - 1, 8), <int64_t>LAST_PAUSE_US)


cdef int _take_fresh(worker *w) noexcept nogil:
    """Go on over the manager's fresh channel: 0; -EIO: the request cannot be sent again; -EINTR: nobody waits."""
    cdef int status
    cdef int64_t now = now_us()
    w.link.ch = w.link.fresh
    store_int(&w.link.link, LINK_UP)
    w.renewals_seen = load_int(&w.mount.renewals)
    w.suspect_us = 0
    w.most_piped = 0
    w.attempts += 1
    w.paused_until_us = now + _pause_us(w)
    if w.link.fresh_epoch != w.link.epoch:
        status = _new_session(w)
    else:
        status = _same_session(w)
        if status == 0 and _is_hopeless(w, now):
            status = -EIO
    w.phase = PHASE_BUILD
    return status


# ---- waiting -------------------------------------------------------------------------------------------------------

cdef void _answer_early(worker *w, int error) noexcept nogil:
    reply_error(w, error)
    w.answered = True


cdef bint ends_without(mount_state *m, uint32_t pid, int64_t since_us, int64_t now) noexcept nogil:
    """Whether a process that closes a file because it ends is not to wait for that: no signal reaches it any more, and
    it does not look at the result. Once one has waited in vain, the files that are still to be closed do not wait:
    all its own, and those of others until the server says something.
    """
    cdef bint waited = now - since_us > CAUGHT_SIGNAL_US or load_int(&m.overdue) or <uint32_t>load_int(&m.overdue_pid) == pid
    if not waited or not is_exiting(pid):
        return False
    store_int(&m.overdue, 1)
    store_int(&m.overdue_pid, <int32_t>pid)
    return True


cdef void _see_to_interrupt(worker *w, int64_t now) noexcept nogil:
    """Answer EINTR to an interrupted caller that will die, or that has waited long enough; and to one that is ending."""
    cdef bint has_waited
    if w.answered or w.own:
        return
    if _has_to_arrive(w) and ends_without(w.mount, w.request.pid, w.since_us, now):
        _answer_early(w, EINTR)
        return
    if load_u64(&w.interrupted) != w.request.unique:
        return
    hand_over(w)                        # callers.pyx says why
    if w.interrupted_us == 0:
        w.interrupted_us = now
    has_waited = now - w.interrupted_us >= CAUGHT_SIGNAL_US
    # A FLUSH that is overtaken could end the locks of a process to come with the same lock owner: it gets its time.
    if fatal_signal_pending(w.request.pid) and (has_waited or not _has_to_arrive(w)) or \
            has_waited and caught_signal_pending(w.request.pid):
        _answer_early(w, EINTR)


cdef bint is_given_up(mount_state *m, int64_t since_us, int64_t now) noexcept nogil:
    """Whether what was asked then is to wait no longer: the server has not been heard of for the mount's timeout."""
    return m.timeout_us > 0 and load_i64(&m.silent_us) > m.timeout_us and \
        now - since_us >= min(m.timeout_us, <int64_t>SLICE_US)


cdef void _see_to_silence(worker *w, int64_t now) noexcept nogil:
    """Answer EIO if the server is silent."""
    if not w.answered and not w.own and is_given_up(w.mount, w.since_us, now):
        _answer_early(w, EIO)


cdef void _see_to_root(worker *w, int64_t now) noexcept nogil:
    """Answer what is asked of the root from memory: umount(8) has to come to its end."""
    cdef mount_state *m = w.mount
    if w.answered or w.own or w.request.nodeid != ROOT_NODE or now - w.since_us < MEMORY_US:
        return
    pthread_mutex_lock(&m.guard)
    w.answered = answer_from_memory_locked(m, w.device, w.request)
    pthread_mutex_unlock(&m.guard)


cdef void _see_to_caller(worker *w, int64_t now) noexcept nogil:
    """Answer a caller that need not wait any longer."""
    _see_to_interrupt(w, now)
    _see_to_silence(w, now)
    _see_to_root(w, now)


cdef void _see_to_channel(worker *w, int64_t now) noexcept nogil:
    """Give up a channel over which nothing comes since the event channel had to be replaced."""
    if w.phase != PHASE_SENT or w.renewals_seen == load_int(&w.mount.renewals) or load_int(&w.link.link) != LINK_UP:
        return
    if w.suspect_us == 0:
        w.suspect_us = now
    elif now - w.suspect_us >= SLICE_US:
        _lose(w)


cdef int64_t _slice_us(worker *w, int64_t now) noexcept nogil:
    """How long to sleep at most. Handles that are to be ended need somebody who looks at the device for them."""
    cdef int64_t left = w.interrupted_us + CAUGHT_SIGNAL_US - now if w.interrupted_us > 0 and not w.answered else 0
    if w.owes and w.mount.closed_count > 0:
        return CLOSED_SLICE_US
    return min(left, <int64_t>SLICE_US) if left > 0 else SLICE_US


cdef bint _is_paused(const worker *w, int64_t now) noexcept nogil:
    return w.phase == PHASE_BUILD and now < w.paused_until_us


cdef void _sleep_unconnected(worker *w, int64_t timeout_us) noexcept nogil:
    cdef pollfd fds
    fds.fd = w.link.wake_fd
    fds.events = POLLIN
    if poll(&fds, 1, <int>(timeout_us // 1000) + 1) > 0:
        drain(w.link.wake_fd)


cdef int _wait(worker *w) noexcept nogil:
    """Sleep until something happens. 0; -ENODEV: the mount ends; -EIO: the server is out of reach; -EINTR: nobody waits."""
    cdef int64_t now = now_us()
    cdef int seen
    if load_int(&w.mount.stopping):
        return -ENODEV
    _see_to_caller(w, now)
    _see_to_channel(w, now)
    if load_int(&w.link.link) != LINK_UP:
        hand_over(w)
        if load_int(&w.mount.down) and not _has_to_be_finished(w):
            return -EIO
        if load_int(&w.mount.down) and not w.answered and not w.own:
            _answer_early(w, EIO)
        _sleep_unconnected(w, _slice_us(w, now))
        return 0
    if _is_paused(w, now):
        if _is_not_wanted(w):
            return -EINTR
        hand_over(w)
        _sleep_unconnected(w, min(_slice_us(w, now), w.paused_until_us - now))
        return 0
    seen = w.link.ch.ops.wait(w.link.ch, WAIT_READABLE if w.phase == PHASE_SENT else WAIT_WRITABLE, w.link.wake_fd,
                              w.mount.device if w.owes else -1, _slice_us(w, now))
    if seen != WAIT_READABLE:
        hand_over(w)                    # the next request is there, or this one takes its time
    if seen & WAIT_WOKEN:
        drain(w.link.wake_fd)
    return 0


cdef void _look_at_channel(worker *w, message *reply) noexcept nogil:
    """Find out whether the channel broke when the event channel did, before anything is sent that may be lost in it."""
    cdef int32_t breaks = load_int(&w.mount.breaks)
    if w.breaks_seen != breaks:
        w.breaks_seen = breaks
        _receive(w, reply)


cdef int _advance(worker *w, builder build, message *reply) noexcept nogil:
    """Do what can be done without sleeping: 1: the reply is there; 0: wait; -errno: as ask."""
    cdef int status
    if load_int(&w.link.link) == LINK_READY:
        status = _take_fresh(w)
        if status < 0:
            return status
    if w.phase == PHASE_BUILD and load_int(&w.link.link) == LINK_UP:
        _look_at_channel(w, reply)
    if load_int(&w.link.link) != LINK_UP or w.attempts > QUICK_ATTEMPTS and _is_paused(w, now_us()):
        return 0
    if w.phase != PHASE_SENT:
        status = _send(w, build)
        if status < 0:
            return 0 if status == -EAGAIN else status
        if _spin_pays(w):
            return _spin(w, reply)
    return _receive(w, reply)


cdef int _converse(worker *w, builder build, message *reply) noexcept nogil:
    cdef int status = 0
    w.phase = PHASE_BUILD
    w.begun = w.executed = False
    w.attempts = 0
    w.paused_until_us = 0
    w.suspect_us = 0
    w.sequence += 1
    w.asked_us = now_us()
    while status == 0:
        status = _advance(w, build, reply)
        if status == 0:
            status = _wait(w)
    if w.phase == PHASE_BUILD and not w.executed and load_int(&w.link.link) == LINK_UP:
        w.sequence -= 1                 # the server has not seen this number
    return status


cdef int ask(worker *w, builder build, bint repeatable, message *reply) noexcept nogil:
    """Send what `build` makes for the kernel's request, and wait for the reply.

    1: it is in `reply`, to be handed on, or undone if worker.answered is set. -errno: there is none, and the kernel is
    to be told so unless worker.answered is set. That is also set if the request was put off.
    """
    cdef int status
    w.own = False
    w.repeatable = repeatable
    status = _converse(w, build, reply)
    while status == 1 and reply.head.error == ERROR_DELAYED:
        if w.answered and not _has_to_arrive(w) or put_off(w):
            w.answered = True
            return -EINTR
        hand_over(w)
        _sleep_unconnected(w, SLICE_US)     # too many wait already: this one waits here
        _see_to_caller(w, now_us())
        status = -ENODEV if load_int(&w.mount.stopping) else _converse(w, build, reply)
    return status


cdef int ask_for_ourselves(worker *w, builder build) noexcept nogil:
    """Send what `build` makes where no caller waits. 1: the server has answered; -errno: it may not have it."""
    cdef message reply
    cdef int status
    w.own = True
    w.repeatable = True
    status = _converse(w, build, &reply)
    w.own = False
    return status
