"""The workers' loop: accept, receive, have it executed, answer.

All workers wait on one epoll. A connection is armed EPOLLONESHOT, so the worker that wakes for it owns it: it reads,
executes and answers, looks a little longer for the next request (waking an idle core costs more than a whole request),
and arms it again. Only session messages (HELLO, MOUNT, …) touch Python, and errands: rare requests that may take long.
Both are the server's (server.pyx), which is a Service.

A worker that has been at one thing for BLOCKED_US is taken to hang in the server's file systems, and another one is
started in its place, which ends when there are too many. What has been there for STUCK_US is looked into: stuck.pyx.
"""
from libc.errno cimport EAGAIN, EMFILE, ENFILE, EPROTO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc

from qtfs_common.includes.polling cimport EFD_CLOEXEC, EPOLLEXCLUSIVE, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLRDHUP, \
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, epoll_ctl, epoll_event, epoll_wait, eventfd
from qtfs_common.pipes cimport pipe_drop, pipe_make
from qtfs_common.protocol cimport MESSAGE_REPLY, OP_DETACH, OP_LOOKUP, OP_READ
from qtfs_common.rings.memory cimport RingMemory
from qtfs_common.spinning cimport SPIN_CAP_US, move_away, spin_begin, spin_found, spin_shares, spin_turn
from qtfs_common.transport cimport AF_UNIX, RECEIVE_BEGUN, WAIT_READABLE, WAIT_WRITABLE, commit_from_pipe, lend_buffers, message, \
    now_us, park
from qtfs_server.connection cimport STATE_EVENT, STATE_SLOT, connection, connection_count, connection_free, \
    connection_new, cut_those_in, somebody_new
from qtfs_server.chores cimport see_to_chores
from qtfs_server.dispatch cimport SLOT_BUSY, execute_in_slot, is_errand
from qtfs_server.early cimport write_early
from qtfs_server.event_channel cimport serve_event
from qtfs_server.handles cimport see_to_hung_closes
from qtfs_server.identity cimport identity_init
from qtfs_server.includes.linux cimport atomic_add_int, atomic_load_int, atomic_load_u64, atomic_store_u64, \
    atomic_swap_int, close, usleep
from qtfs_server.operations.locks cimport see_to_lock_polling
from qtfs_server.request cimport HANDED_OVER, SCRATCH_BYTES
from qtfs_server.session cimport session
from qtfs_server.stuck cimport MAX_WORKERS, judge, publish
from qtfs_server.worker cimport BUFFER_BYTES, worker
from qtfs_server cimport descriptors as descriptors_module

import logging
import os
import select
import socket
from collections.abc import Callable

from qtfs_common.addresses import tune_bell, tune_socket

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SOCK_CLOEXEC
        SOCK_NONBLOCK
    int accept4(int, void *, void *, int)

cdef enum:
    SPIN_US = 200                   # how long to look for the next request; below 100 it costs more than it gains
    SHARED_TURNS = 64               # until we look for another processor; a client moves sooner, and may have to
    SPIN_CREDIT = 16                # fruitless spins until a worker stops spinning for a while
    PARTIAL_WAIT_US = 10000         # how long workers wait for the rest of a message that is on its way
    EXECUTING_POLL_US = 1000
    IN_A_ROW = 64                   # requests of one connection, if no worker is there for others
    BLOCKED_US = 100000             # at one thing: somebody else is to serve the others
    STUCK_US = 1000000              # at one request: no more of that kind
    EXTRA_IDLE_MS = 1000            # until a worker that is not needed ends

log = logging.getLogger(__name__)

cdef int32_t _spinning = 0
cdef int32_t _waiting = 0               # workers that wait in the epoll, for whoever comes
all_workers = NULL
spinning_at_most = 1

#: Between two looks at the workers, in seconds: while some are busy, and while none are.
_CLOSE_LOOK_S = 0.05
_LOOK_S = 0.5


# ---- slot channels ---------------------------------------------------------------------------------------------------

cdef int _serve_slot(Service service, worker *w, connection *c, const message *msg) noexcept nogil:
    """One request of a slot channel. 0, -EAGAIN (the reply is not all gone yet), HANDED_OVER or another -errno."""
    cdef size_t room = min(<size_t>BUFFER_BYTES, <size_t>c.ch.largest)
    cdef uint8_t *out = c.ch.ops.reserve(&c.ch, room, msg.head.op == OP_READ)
    cdef size_t size = 0
    cdef int result = SLOT_BUSY
    w.pipe.onward = c.ch.family == AF_UNIX
    while True:
        result = execute_in_slot(c.s, c.slot, c, &w.me, w.scratch, &w.count, &w.at, msg, &c.early, out, room,
                                 &w.pipe if c.ch.ring == NULL else NULL, &size)
        if result != SLOT_BUSY or c.s.slot_table[c.slot].connection != c:
            break
        if is_errand(msg.head.op) and _join(service, c, msg) == HANDED_OVER:
            return HANDED_OVER
        usleep(EXECUTING_POLL_US)   # the connection that brought this request first was cut while it was executed
    if result == HANDED_OVER:
        with gil:
            return service._new_errand(c, msg)
    if result < 0:
        return -EPROTO
    c.ch.ops.release(&c.ch)
    return c.ch.ops.commit(&c.ch, size, NULL, 0) if w.pipe.bytes == 0 else _commit_from_pipe(w, c, size)


cdef int _commit_from_pipe(worker *w, connection *c, size_t size) noexcept nogil:
    """Send a reply whose body is in the worker's pipe. As commit."""
    cdef int status = commit_from_pipe(&c.ch, size, w.pipe.ends[0], w.pipe.bytes)
    w.pipe.bytes = 0
    if status < 0 and status != -EAGAIN:
        pipe_drop(&w.pipe)
    return status


cdef int _join(Service service, connection *c, const message *msg) noexcept with gil:
    return service._join_errand(c, msg)


# ---- the worker's loop -----------------------------------------------------------------------------------------------

cdef bint _may_spin(worker *w) noexcept nogil:
    """Whether looking for the next request is likely to pay: it lately did, and cores are left for others."""
    if w.spin_credit <= 0:
        w.spin_credit += 1
        return False
    if atomic_add_int(&_spinning, 1) > spinning_at_most:
        atomic_add_int(&_spinning, -1)
        return False
    return True


cdef int _spin(worker *w, connection *c, message *msg) noexcept nogil:
    """Look for the next request for a while; the result of the last receive."""
    cdef int64_t now = now_us()
    cdef int64_t deadline = now + SPIN_CAP_US
    cdef int found = 0
    if not spin_begin(&w.spinner, now) or not _may_spin(w):
        return 0
    while found == 0 and w.spinner.spent_us < SPIN_US and now < deadline:
        now = spin_turn(&w.spinner, now)
        found = c.ch.ops.receive(&c.ch, msg)
    if spin_shares(&w.spinner, SHARED_TURNS, now):
        move_away()
    atomic_add_int(&_spinning, -1)
    if found > 0:
        spin_found(&w.spinner, now)
        w.spin_credit = SPIN_CREDIT
    else:
        w.spin_credit -= 1
        if w.spin_credit == 0:
            w.spin_credit = -SPIN_CREDIT
    return found


cdef int _await_rest(connection *c, message *msg) noexcept nogil:
    """Wait for the rest of a message, but not for each piece anew: a peer that dribbles must not hold a worker."""
    cdef int64_t now = now_us()
    cdef int found = 0
    if c.partial_since_us == 0:
        c.partial_since_us = now
    while found == 0 and now < c.partial_since_us + PARTIAL_WAIT_US and \
            c.ch.ops.wait(&c.ch, WAIT_READABLE, -1, -1, c.partial_since_us + PARTIAL_WAIT_US - now):
        found = c.ch.ops.receive(&c.ch, msg)
        now = now_us()
    return found


cdef int _receive(worker *w, connection *c, message *msg, bint served) noexcept nogil:
    """The next message: 1; 0: none now; or -errno. Of a long WRITE some may be done already."""
    cdef int found = c.ch.ops.receive(&c.ch, msg)
    if found == 0 and served and c.ch.end == c.ch.begin:
        found = _spin(w, c, msg)
    if found == 0 and c.ch.end > c.ch.begin:
        found = _await_rest(c, msg)
    if found == RECEIVE_BEGUN:
        c.partial_since_us = c.partial_since_us or now_us()
        write_early(w, c, msg, c.partial_since_us + PARTIAL_WAIT_US)
        found = c.ch.ops.receive(&c.ch, msg)
        if found == 0:
            found = _await_rest(c, msg)
    if found != 0:
        c.partial_since_us = 0
    return found


cdef int _serve_message(Service service, worker *w, connection *c, const message *msg) noexcept nogil:
    if msg.head.flags & MESSAGE_REPLY:
        return -EPROTO
    if msg.head.op >= OP_LOOKUP and c.state == STATE_SLOT:
        return _serve_slot(service, w, c, msg)
    if c.state == STATE_EVENT and msg.head.op != OP_DETACH:
        return serve_event(w, c, msg)
    with gil:
        return service._session_message(c, msg)


cdef int _serve(Service service, worker *w, connection *c) noexcept nogil:
    """Serve a connection as long as messages keep coming. 0: wait for more; EPOLLOUT: for room; -errno: close it.

    EPOLLIN | EPOLLOUT: come back soon. After a number of messages it is another connection's turn, if one may wait.
    """
    cdef message msg
    cdef int served = 0
    cdef int result = c.ch.ops.flush(&c.ch)
    if result == -EAGAIN:
        return EPOLLOUT
    while result == 0 and not service.stopping and (served < IN_A_ROW or atomic_load_int(&_waiting) > 0):
        result = _receive(w, c, &msg, served > 0)
        if result == 0:
            return 0
        if result < 0:
            break
        served += 1
        _turn(w)
        result = _serve_message(service, w, c, &msg)
        c.early.done = 0
    if result == -EPROTO:
        w.count.malformed += 1
    if result == 0:
        return EPOLLIN | EPOLLOUT       # the next message may be in our buffer, where the epoll does not see it
    return EPOLLOUT if result == -EAGAIN else result


cdef bint arm(Service service, connection *c, uint32_t events, int how) noexcept nogil:
    """Leave a connection to the epoll, until there is something to read or, EPOLLOUT, room. False: it takes no more."""
    cdef epoll_event event
    if c.ch.ops.doze(&c.ch, WAIT_READABLE if events & EPOLLIN else WAIT_WRITABLE):
        events |= EPOLLOUT          # it is there already: the descriptor can always be written to, so it wakes at once
    elif c.ch.ring != NULL:
        events = EPOLLIN
    # Who waits for room must not wake for a peer that has shut its side: that would never end.
    event.events = events | EPOLLONESHOT | (EPOLLRDHUP if events & EPOLLIN else 0)
    event.data.ptr = c
    return epoll_ctl(service.epoll_fd, how, c.ch.fd, &event) == 0


cdef void _serve_connection(Service service, worker *w, connection *c) noexcept nogil:
    cdef int result
    c.ch.ops.wake(&c.ch)
    lend_buffers(&c.ch, w.inbox, BUFFER_BYTES, w.outbox, BUFFER_BYTES)
    result = _serve(service, w, c)
    if result == HANDED_OVER:
        if park(&c.ch) < 0:
            c.ch.begin = c.ch.end = 0   # no client sends before it has its reply
        with gil:
            service._begin_errand(c)
    elif result >= 0 and park(&c.ch) == 0:
        arm(service, c, result if result > 0 else EPOLLIN, EPOLL_CTL_MOD)
    else:
        connection_free(c)


cdef void _accept(Service service, listener *from_) noexcept nogil:
    """Accept one connection; the others wake other workers."""
    cdef connection *c
    cdef int fd = accept4(from_.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)
    cdef bint is_vsock
    if fd < 0:
        if errno in (EMFILE, ENFILE):
            _refuse_one(service, from_.fd)
        return
    if atomic_load_int(&connection_count) > descriptors_module.descriptor_limit // 4 * 3:
        close(fd)
        return
    with gil:
        is_vsock = _tune(fd, from_.memory != NULL)
    c = connection_new(fd, SOURCE_CONNECTION, from_.needs_authentication, from_.memory)
    if c == NULL:
        close(fd)
    else:
        c.is_vsock = is_vsock
        if not arm(service, c, EPOLLIN, EPOLL_CTL_ADD):     # ENOSPC: /proc/sys/fs/epoll/max_user_watches
            connection_free(c)


cdef void _refuse_one(Service service, int listening) noexcept nogil:
    """Out of descriptors: end one waiting connection instead of being woken for it for ever.

    Several workers may be at it: each closes only what it took or made itself, as any other number may be anybody's by now.
    """
    cdef int spare = atomic_swap_int(&service.spare_fd, -1)
    if spare >= 0:
        close(spare)
    close(accept4(listening, NULL, NULL, SOCK_CLOEXEC))
    spare = eventfd(0, EFD_CLOEXEC)
    if spare >= 0:
        spare = atomic_swap_int(&service.spare_fd, spare)
    if spare >= 0:
        close(spare)                    # another worker was quicker: one is enough


cdef int _tune(int fd, bint is_bell) except -1:
    """1 if it is a vsock socket; 0."""
    sock = socket.socket(fileno=fd)
    try:
        tune_bell(sock) if is_bell else tune_socket(sock)
    except OSError as error:
        log.debug("an accepted socket could not be tuned: %s", error)
    is_vsock = sock.family == socket.AF_VSOCK
    sock.detach()
    return is_vsock


cdef inline void _turn(worker *w) noexcept nogil:
    """Show that the worker is at something else than before."""
    w.at.op = 0
    w.turns += 1
    atomic_store_u64(&w.at.turn, w.turns)


cdef void _work(Service service, worker *w, int idle_ms) noexcept nogil:
    """Serve until `stop`, or until there was nothing to do for that long."""
    cdef epoll_event event
    cdef int found
    while not service.stopping:
        atomic_store_u64(&w.at.turn, 0)
        atomic_add_int(&_waiting, 1)
        found = epoll_wait(service.epoll_fd, &event, 1, idle_ms)
        atomic_add_int(&_waiting, -1)
        if found == 0:
            return
        if found < 0:
            continue
        _turn(w)
        if (<listener *>event.data.ptr).kind == SOURCE_CONNECTION:
            _serve_connection(service, w, <connection *>event.data.ptr)
        elif (<listener *>event.data.ptr).kind == SOURCE_LISTENER:
            _accept(service, <listener *>event.data.ptr)


cdef bint _lend_memory(worker *w) noexcept nogil:
    """Give a worker what it needs to serve; False without memory."""
    w.inbox = <uint8_t *>malloc(BUFFER_BYTES)
    w.outbox = <uint8_t *>malloc(BUFFER_BYTES)
    w.scratch = <uint8_t *>malloc(SCRATCH_BYTES)
    w.spin_credit = SPIN_CREDIT
    return w.inbox != NULL and w.outbox != NULL and w.scratch != NULL


cdef void _take_memory(worker *w) noexcept nogil:
    """The opposite: what stays are its figures."""
    free(w.inbox)
    free(w.outbox)
    free(w.scratch)
    w.inbox = w.outbox = w.scratch = NULL


cdef class Service:
    """What the workers share: the epoll, what is listened on, and who answers what they do not answer themselves."""

    def __cinit__(self):
        self.epoll_fd = self.stop_fd = self.spare_fd = -1
        self.spare = []

    cdef int _session_message(self, connection *c, const message *msg) except -2:
        """Answer HELLO, AUTHENTICATE, MOUNT, ATTACH, DETACH, PING. 0, -EAGAIN or another -errno."""
        raise NotImplementedError

    cdef int _new_errand(self, connection *c, const message *msg) except -2:
        """Keep a request that the slot admitted. HANDED_OVER, or -EPROTO if its caller is malformed."""
        raise NotImplementedError

    cdef int _join_errand(self, connection *c, const message *msg) except -2:
        """Let a repeated request wait for the errand that its first copy began: HANDED_OVER, or 0 if that has ended."""
        raise NotImplementedError

    cdef int _begin_errand(self, connection *c) except -2:
        """Have the errand of a connection that its worker is done with carried out, or answered there too."""
        raise NotImplementedError

    def listen(self, int fd, bint needs_authentication, RingMemory memory=None) -> None:
        """Serve connections of a listening, non-blocking socket, which stays the caller's.

        `memory`: the socket is its bell, and what connects there names a channel. It must outlive the server.
        """
        cdef epoll_event event
        cdef listener *added = NULL
        cdef int i
        for i in range(<int>MAX_LISTENERS):
            if added == NULL and self.listeners[i].kind != SOURCE_LISTENER:
                added = &self.listeners[i]
        if added == NULL:
            raise ValueError(f"more than {<int>MAX_LISTENERS} sockets to listen on")
        added.kind = SOURCE_LISTENER
        added.fd = fd
        added.needs_authentication = needs_authentication
        added.memory = &memory.m if memory is not None else NULL
        event.events = EPOLLIN | EPOLLEXCLUSIVE
        event.data.ptr = added
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))

    def deafen(self, int fd) -> None:
        """Stop listening on a socket; who is connected stays."""
        cdef int i
        epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, fd, NULL)
        for i in range(<int>MAX_LISTENERS):
            if self.listeners[i].kind == SOURCE_LISTENER and self.listeners[i].fd == fd:
                self.listeners[i].kind = 0

    def accept(self, bint now) -> None:
        """Accept connections at all sockets again, or leave them waiting there for a while."""
        cdef epoll_event event
        cdef int i
        for i in range(<int>MAX_LISTENERS):
            if self.listeners[i].kind == SOURCE_LISTENER:
                event.events = EPOLLIN | EPOLLEXCLUSIVE
                event.data.ptr = &self.listeners[i]
                epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD if now else EPOLL_CTL_DEL, self.listeners[i].fd, &event)

    @property
    def greets(self) -> bool:
        """Whether somebody is connected who belongs to no session yet."""
        return somebody_new()

    def hang_up(self, RingMemory memory=None) -> None:
        """Cut whoever is connected by way of a memory; without one, everybody."""
        cut_those_in(&memory.m if memory is not None else NULL)

    def work(self) -> None:
        """Body of a worker thread; returns after `stop`."""
        cdef worker *w = self._new_worker()
        cdef int ends = 2 if pipe_make(&w.pipe) else 0
        self.crew += 1
        self.running += 1
        descriptors_module.descriptor_limit -= ends
        try:
            with nogil:
                _work(self, w, -1)
        finally:
            self.crew -= 1
            self.running -= 1
            descriptors_module.descriptor_limit += ends
            self._retire(w)

    def help_out(self) -> None:
        """Body of a worker thread that `watch_workers` asked for: it returns when it is not needed any more, too."""
        cdef worker *w = NULL
        try:
            w = self._new_worker()
            w.pipe.ends[0] = -1     # descriptors may be short by now
            while not self.stopping and self.running - self.blocked <= self.crew:
                with nogil:
                    _work(self, w, EXTRA_IDLE_MS)
        finally:
            self.running -= 1
            if w != NULL:
                self._retire(w)

    cdef int _retire(self, worker *w) except -1:
        """Keep what a worker leaves for the next: its figures."""
        pipe_drop(&w.pipe)
        _take_memory(w)
        self.spare.append(<size_t>w)
        return 0

    cdef worker *_new_worker(self) except NULL:
        """What a worker has for itself, for the thread that calls."""
        global all_workers
        cdef worker *w
        cdef int error
        if self.spare:
            w = <worker *><size_t>self.spare.pop()
        else:
            w = <worker *>calloc(1, sizeof(worker))
            if w == NULL:
                raise MemoryError
            w.next = all_workers
            all_workers = w
        if not _lend_memory(w):
            _take_memory(w)
            self.spare.append(<size_t>w)
            raise MemoryError
        error = identity_init(&w.me)
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        return w

    # ---- looking after the workers ----

    def watch_workers(self, start: Callable[[], None]) -> None:
        """Body of the thread that has others take the places of workers that hang; returns after `stop`.

        `start` starts a thread with `help_out`.
        """
        poller = select.poll()
        poller.register(self.stop_fd, select.POLLIN)
        while not poller.poll(1000 * (_CLOSE_LOOK_S if self.watched_closely else _LOOK_S)):
            self._look_at_workers()
            see_to_hung_closes()
            see_to_chores()
            see_to_lock_polling()
            for _ in range(min(self.crew - (self.running - self.blocked), MAX_WORKERS - self.running)):
                self.running += 1
                try:
                    start()
                except RuntimeError as error:
                    self.running -= 1
                    log.warning("no thread in place of a worker that hangs: %s", error)
                    break

    cdef int _look_at_workers(self) except -1:
        """Count the workers that are blocked, and find out what those hang in that have been for long."""
        cdef int64_t now = now_us()
        cdef worker *w = all_workers
        cdef uint64_t turn
        cdef list stuck = []
        self.blocked = 0
        self.watched_closely = False
        while w != NULL:
            turn = atomic_load_u64(&w.at.turn)
            self.watched_closely |= turn != 0
            if turn == 0 or turn != w.seen_turn:
                w.seen_turn = turn
                w.seen_us = now
            else:
                self.blocked += now - w.seen_us >= BLOCKED_US
                if now - w.seen_us >= STUCK_US and self._judged(w, turn):
                    stuck.append((w.at.session, w.stuck_on, bool(w.at.changes), int(w.at.op)))
            w = w.next
        publish(stuck)
        return 0

    cdef bint _judged(self, worker *w, uint64_t turn) except -1:
        """Whether it is known what a worker hangs in."""
        address = self.sessions.get(w.at.session) if w.at.op != 0 else None
        if address is None:
            return False
        if w.judged_turn != turn:
            w.judged_turn = turn
            w.stuck_on = judge(<session *><size_t>address, &w.at)
        return w.stuck_on != 0
