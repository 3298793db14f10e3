"""Connections and the worker threads that serve them.

All workers wait on one epoll. A connection is armed EPOLLONESHOT, so the worker that wakes for it owns it: it reads,
executes and answers, looks a little longer for the next request (waking an idle core costs more than a whole request),
and arms it again. Only session messages (HELLO, MOUNT, …) touch Python, and errands: rare requests that may take long.

Lock order: _connections_guard, session.guard, session.outbox_guard.
Who owns what: a connection belongs to the worker that holds its one-shot event; others may only shutdown(2) it, under
session.guard (attached ones) or _connections_guard, which its owner takes before it frees it. An errand owns the
connection that it came by until it has answered; the dicts of errands belong to whoever holds the GIL.
"""
from libc.errno cimport EACCES, EAGAIN, EINVAL, EMFILE, ENFILE, EPERM, EPROTO, EPROTONOSUPPORT, ESTALE, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from qtfs_common.protocol cimport *
from qtfs_common.rings.channel cimport greeter_init, works_in
from qtfs_common.rings.memory cimport RingMemory
from qtfs_common.spinning cimport SPIN_CAP_US, move_away, spin_begin, spin_shares, spin_turn
from qtfs_common.transport cimport WAIT_READABLE, WAIT_WRITABLE, channel, commit_from_pipe, lend_buffers, message, now_us, park, socket_channel_init
from qtfs_server.connection cimport STATE_EVENT, STATE_GREETED, STATE_NEW, STATE_SLOT, STATE_TRUSTED, connection
from qtfs_server.dispatch cimport SLOT_BUSY, abandon_in_slot, execute_in_slot, is_errand, settle_in_slot
from qtfs_server.event_channel cimport abandon_all, answer_wait, let_all_go, open_events, serve_event
from qtfs_server.identity cimport identity_init
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_PATH, RESOLVE_NO_MAGICLINKS, SYS_openat2, \
    atomic_add_int, atomic_load_int, close, open_how, pthread_mutex_init, pthread_mutex_lock, \
    pthread_mutex_t, pthread_mutex_unlock, syscall
from qtfs_server.operations.locks cimport queue_for_locks, set_answer, stop_waiting_for_locks, wait_for_locks
from qtfs_server.policy cimport ALLOW_MOUNT, path_place, place, count_denial
from qtfs_server.request cimport HANDED_OVER, SCRATCH_BYTES
from qtfs_server.nodes cimport node_pin, node_unpin, root_enter
from qtfs_server.session cimport node, session, session_new, session_unref, set_farewell
from qtfs_server.splicing cimport pipe_drop, pipe_make
from qtfs_server.streams cimport stop_watching_streams, watch_streams
from qtfs_server.worker cimport BUFFER_BYTES, worker
from qtfs_server cimport descriptors as descriptors_module

import hmac
import logging
import os
import secrets
import socket
import struct

from qtfs_common import auth
from qtfs_common.addresses import tune_socket
from qtfs_common.protocol import OPERATION_NAMES
from qtfs_server.mount_watch import watch_mounts

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLRDHUP
        EPOLLONESHOT
        EPOLLEXCLUSIVE
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL
        EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)
    int epoll_wait(int, epoll_event *, int, int)

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
    int eventfd(unsigned int, int)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SOCK_CLOEXEC
        SOCK_NONBLOCK
        SHUT_RD
        SHUT_RDWR
    int accept4(int, void *, void *, int)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int, const void *, size_t)
    int usleep(unsigned int)

cdef enum:
    SPIN_US = 200                   # how long to look for the next request; below 100 it costs more than it gains
    SHARED_TURNS = 64               # until we look for another processor; a client moves sooner, and may have to
    SPIN_CREDIT = 16                # fruitless spins until a worker stops spinning for a while
    PARTIAL_WAIT_US = 10000         # how long workers wait for the rest of a message that is on its way
    EXECUTING_POLL_US = 1000
    UNATTACHED_TIMEOUT_US = 60000000
    ERRAND_SEND_TIMEOUT_US = 5000000   # whose client does not read its answer is cut

log = logging.getLogger(__name__)

cdef pthread_mutex_t _connections_guard
cdef connection *_connections = NULL
cdef int32_t _connection_count = 0
cdef uint64_t _copied = 0                 # by connections that have ended, under the guard
cdef int32_t _spinning = 0
cdef int32_t _spinning_at_most = 1
pthread_mutex_init(&_connections_guard, NULL)


# ---- life of a connection ------------------------------------------------------------------------------------------

cdef connection *_connection_new(int fd, const listener *from_) noexcept nogil:
    """A connection for an accepted socket, listed; NULL without memory."""
    global _connections
    cdef connection *c = <connection *>calloc(1, sizeof(connection))
    if c == NULL:
        return NULL
    c.kind = SOURCE_CONNECTION
    c.needs_authentication = from_.needs_authentication
    c.since_us = now_us()
    if from_.memory != NULL:
        greeter_init(&c.ch, fd, from_.memory)
    else:
        socket_channel_init(&c.ch, fd)
    pthread_mutex_lock(&_connections_guard)
    c.next = _connections
    if _connections != NULL:
        _connections.previous = c
    _connections = c
    pthread_mutex_unlock(&_connections_guard)
    atomic_add_int(&_connection_count, 1)
    atomic_add_int(&descriptors_module.descriptors, 1)
    return c


cdef void _unlist(connection *c) noexcept nogil:
    global _connections, _copied
    pthread_mutex_lock(&_connections_guard)
    _copied += c.ch.copied
    if c.previous != NULL:
        c.previous.next = c.next
    else:
        _connections = c.next
    if c.next != NULL:
        c.next.previous = c.previous
    pthread_mutex_unlock(&_connections_guard)


cdef void _leave_session(connection *c) noexcept nogil:
    """Give up the slot or event channel, and the reference."""
    cdef session *s = c.s
    if s == NULL:
        return
    pthread_mutex_lock(&s.guard)
    if c.state == STATE_EVENT and s.event == c:
        pthread_mutex_lock(&s.outbox_guard)
        s.event = NULL
        pthread_mutex_unlock(&s.outbox_guard)
    elif c.state == STATE_SLOT and s.slot_table[c.slot].connection == c:
        s.slot_table[c.slot].connection = NULL
    s.connections -= 1
    s.idle_since_us = now_us()
    pthread_mutex_unlock(&s.guard)
    c.s = NULL
    session_unref(s)


cdef void _connection_free(connection *c) noexcept nogil:
    _leave_session(c)
    _unlist(c)
    c.ch.ops.close(&c.ch)
    free(c)
    atomic_add_int(&_connection_count, -1)
    atomic_add_int(&descriptors_module.descriptors, -1)


# ---- slot channels ---------------------------------------------------------------------------------------------------

cdef int _serve_slot(Server server, worker *w, connection *c, const message *msg) noexcept nogil:
    """One request of a slot channel. 0, -EAGAIN (the reply is not all gone yet), HANDED_OVER or another -errno."""
    cdef size_t room = min(<size_t>BUFFER_BYTES, <size_t>c.ch.largest)
    cdef uint8_t *out = c.ch.ops.reserve(&c.ch, room, msg.head.op == OP_READ)
    cdef size_t size = 0
    cdef int result = SLOT_BUSY
    while True:
        result = execute_in_slot(c.s, c.slot, &w.me, w.scratch, &w.count, msg, out, room,
                                 &w.pipe if c.ch.ring == NULL else NULL, &size)
        if result != SLOT_BUSY or c.s.slot_table[c.slot].connection != c:
            break
        if is_errand(msg.head.op) and _join(server, c, msg) == HANDED_OVER:
            return HANDED_OVER
        usleep(EXECUTING_POLL_US)   # the connection that brought this request first was cut while it was executed
    if result == HANDED_OVER:
        with gil:
            return server._new_errand(c, msg)
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


cdef int _join(Server server, connection *c, const message *msg) noexcept with gil:
    return server._join_errand(c, msg)


# ---- the worker's loop -----------------------------------------------------------------------------------------------

cdef bint _may_spin(worker *w) noexcept nogil:
    """Whether looking for the next request is likely to pay: it lately did, and cores are left for others."""
    if w.spin_credit <= 0:
        w.spin_credit += 1
        return False
    if atomic_add_int(&_spinning, 1) > _spinning_at_most:
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
    if found == 1:
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
            c.ch.ops.wait(&c.ch, WAIT_READABLE, -1, c.partial_since_us + PARTIAL_WAIT_US - now):
        found = c.ch.ops.receive(&c.ch, msg)
        now = now_us()
    return found


cdef int _receive(worker *w, connection *c, message *msg, bint served) noexcept nogil:
    """The next message: 1; 0: none now; or -errno."""
    cdef int found = c.ch.ops.receive(&c.ch, msg)
    if found == 0 and c.ch.end > c.ch.begin:
        found = _await_rest(c, msg)
    if found != 0:
        c.partial_since_us = 0
    elif served and c.ch.end == c.ch.begin:
        found = _spin(w, c, msg)
    return found


cdef int _serve_message(Server server, worker *w, connection *c, const message *msg) noexcept nogil:
    if msg.head.flags & MESSAGE_REPLY:
        return -EPROTO
    if msg.head.op >= OP_LOOKUP and c.state == STATE_SLOT:
        return _serve_slot(server, w, c, msg)
    if c.state == STATE_EVENT and msg.head.op != OP_DETACH:
        return serve_event(w, c, msg)
    with gil:
        return server._session_message(c, msg)


cdef int _serve(Server server, worker *w, connection *c) noexcept nogil:
    """Serve a connection as long as messages keep coming. 0: wait for more; EPOLLOUT: for room; -errno: close it."""
    cdef message msg
    cdef bint served = False
    cdef int result = c.ch.ops.flush(&c.ch)
    if result == -EAGAIN:
        return EPOLLOUT
    while result == 0 and not server.stopping:
        result = _receive(w, c, &msg, served)
        if result <= 0:
            break
        served = True
        result = _serve_message(server, w, c, &msg)
    if result == -EPROTO:
        w.count.malformed += 1
    return EPOLLOUT if result == -EAGAIN else result


cdef void _arm(Server server, connection *c, uint32_t events, int how) noexcept nogil:
    cdef epoll_event event
    if c.ch.ops.doze(&c.ch, WAIT_READABLE if events & EPOLLIN else WAIT_WRITABLE):
        events |= EPOLLOUT          # it is there already: the descriptor can always be written to, so it wakes at once
    elif c.ch.ring != NULL:
        events = EPOLLIN
    # Who waits for room must not wake for a peer that has shut its side: that would never end.
    event.events = events | EPOLLONESHOT | (EPOLLRDHUP if events & EPOLLIN else 0)
    event.data.ptr = c
    epoll_ctl(server.epoll_fd, how, c.ch.fd, &event)


cdef void _serve_connection(Server server, worker *w, connection *c) noexcept nogil:
    cdef int result
    c.ch.ops.wake(&c.ch)
    lend_buffers(&c.ch, w.inbox, BUFFER_BYTES, w.outbox, BUFFER_BYTES)
    result = _serve(server, w, c)
    if result == HANDED_OVER:
        if park(&c.ch) < 0:
            c.ch.begin = c.ch.end = 0   # no client sends before it has its reply
        with gil:
            server._begin_errand(c)
    elif result >= 0 and park(&c.ch) == 0:
        _arm(server, c, EPOLLOUT if result == EPOLLOUT else EPOLLIN, EPOLL_CTL_MOD)
    else:
        _connection_free(c)


cdef void _accept(Server server, listener *from_) noexcept nogil:
    """Accept one connection; the others wake other workers."""
    cdef connection *c
    cdef int fd = accept4(from_.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)
    if fd < 0:
        if errno in (EMFILE, ENFILE):
            _refuse_one(server, from_.fd)
        return
    if atomic_load_int(&_connection_count) > descriptors_module.descriptor_limit // 4 * 3:
        close(fd)
        return
    with gil:
        _tune(fd)
    c = _connection_new(fd, from_)
    if c == NULL:
        close(fd)
    else:
        _arm(server, c, EPOLLIN, EPOLL_CTL_ADD)


cdef void _refuse_one(Server server, int listening) noexcept nogil:
    """Out of descriptors: end one waiting connection instead of being woken for it for ever."""
    close(server.spare_fd)
    close(accept4(listening, NULL, NULL, SOCK_CLOEXEC))
    server.spare_fd = eventfd(0, EFD_CLOEXEC)


cdef int _tune(int fd) except -1:
    sock = socket.socket(fileno=fd)
    try:
        tune_socket(sock)
    except OSError as error:
        log.debug("an accepted socket could not be tuned: %s", error)
    sock.detach()
    return 0


cdef void _work(Server server, worker *w) noexcept nogil:
    cdef epoll_event event
    while not server.stopping:
        if epoll_wait(server.epoll_fd, &event, 1, -1) <= 0:
            continue
        if (<listener *>event.data.ptr).kind == SOURCE_CONNECTION:
            _serve_connection(server, w, <connection *>event.data.ptr)
        elif (<listener *>event.data.ptr).kind == SOURCE_LISTENER:
            _accept(server, <listener *>event.data.ptr)


cdef worker *_worker_new() noexcept nogil:
    cdef worker *w = <worker *>calloc(1, sizeof(worker))
    if w == NULL:
        return NULL
    w.inbox = <uint8_t *>malloc(BUFFER_BYTES)
    w.outbox = <uint8_t *>malloc(BUFFER_BYTES)
    w.scratch = <uint8_t *>malloc(SCRATCH_BYTES)
    w.spin_credit = SPIN_CREDIT
    return w if w.inbox != NULL and w.outbox != NULL and w.scratch != NULL else NULL


class Refused(Exception):
    """A session message that is answered with an errno."""

    def __init__(self, error: int, body: bytes = b"") -> None:
        super().__init__(os.strerror(error))
        self.error = error
        self.body = body


cdef bint _send_all(channel *ch, const uint8_t *data, size_t size) noexcept nogil:
    """Send a message whole from a thread that may wait; False if the peer does not take it."""
    cdef ssize_t sent
    while size > 0:
        sent = ch.ops.put(ch, data, size)
        if sent > 0:
            data += sent
            size -= sent
        elif sent != -EAGAIN or not ch.ops.wait(ch, WAIT_WRITABLE, -1, ERRAND_SEND_TIMEOUT_US):
            return False
    return True


cdef class Errand:
    """A request that a thread of its own carries out, because it may take long or needs Python."""

    @property
    def op(self) -> int:
        """Number of the operation."""
        return self.head.op

    @property
    def session_lives(self) -> bool:
        """Whether the session has not ended."""
        return self.session in self.server.sessions

    @property
    def read_only(self) -> bool:
        """Whether the session is."""
        return self.s.read_only

    def root(self) -> int:
        """A descriptor of the session's root, O_PATH, which is the caller's. OSError: it is gone."""
        cdef node *n = NULL
        cdef int error
        with nogil:
            error = node_pin(self.s, ROOT_NODE, &n)
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        try:
            return os.dup(n.fd)
        finally:
            node_unpin(self.s, n)

    def settle(self, int error, bytes body not None) -> None:
        """Answer, once: `error` is 0 or an errno, which goes without a body. -1: the request broke the protocol."""
        cdef session *s = self.s
        body = b"" if error else body
        reply = struct.pack("<IHHiIQQ", sizeof(header) + len(body), self.head.op, MESSAGE_REPLY, max(error, 0), self.slot,
                            self.head.sequence, self.head.tag) + body
        if error < 0:
            self.reply = b""
            self.server.malformed_errands += 1
            abandon_in_slot(s, self.slot)
        else:
            self.reply = reply
            settle_in_slot(s, self.slot, self.head.op, <const uint8_t *><const char *>reply, len(reply))
        self.server.errands.pop((self.session, self.slot), None)
        self._send(self.c)
        self.s = NULL
        with nogil:
            session_unref(s)

    cdef int _send(self, connection *c) except -1:
        """Send the reply, and give the connection back to the workers."""
        cdef const uint8_t *data = <const uint8_t *><const char *>self.reply
        cdef size_t size = len(self.reply)
        with nogil:
            if size == 0 or not _send_all(&c.ch, data, size):
                c.ch.ops.cut(&c.ch, SHUT_RDWR)
            _arm(self.server, c, EPOLLIN, EPOLL_CTL_MOD)
        return 0


cdef class Server:
    """All that the engine's threads share. Threads are the caller's: each runs `work`, `wait_for_locks` or
    `watch_streams`."""

    def __cinit__(self):
        self.epoll_fd = self.stop_fd = self.spare_fd = -1

    def __init__(self, *, carrier: object, key: bytes | None = None, grace_s: float = 90.0,
                 descriptor_limit: int = 1024) -> None:
        """`key`: the shared secret of addresses that demand authentication; `descriptor_limit`: RLIMIT_NOFILE.

        `carrier` carries errands out, see errands.Errands.
        """
        cdef epoll_event event
        global _spinning_at_most
        self.workers = []
        self.sessions = {}
        self.carrier = carrier
        self.errands = {}
        self.joining = {}
        self.key = key
        self.grace_s = grace_s
        descriptors_module.descriptor_limit = descriptor_limit
        _spinning_at_most = max(1, (os.cpu_count() or 1) // 2)
        set_answer(answer_wait)
        set_farewell(let_all_go)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.stop_fd = eventfd(0, EFD_CLOEXEC)
        self.spare_fd = eventfd(0, EFD_CLOEXEC)
        if min(self.epoll_fd, self.stop_fd, self.spare_fd) < 0:
            raise OSError(errno, os.strerror(errno))
        self.stop_source.kind = SOURCE_STOP
        event.events = EPOLLIN
        event.data.ptr = &self.stop_source
        epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.stop_fd, &event)

    def listen(self, int fd, bint needs_authentication, RingMemory memory=None) -> None:
        """Serve connections of a listening, non-blocking socket, which stays the caller's.

        `memory`: the socket is its bell, and what connects there names a channel. It must outlive the server.
        """
        cdef epoll_event event
        cdef listener *added = NULL
        cdef int i
        for i in range(64):
            if added == NULL and self.listeners[i].kind != SOURCE_LISTENER:
                added = &self.listeners[i]
        if added == NULL:
            raise ValueError("at most 64 addresses")
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
        for i in range(64):
            if self.listeners[i].kind == SOURCE_LISTENER and self.listeners[i].fd == fd:
                self.listeners[i].kind = 0

    def hang_up(self, RingMemory memory not None) -> None:
        """Cut whoever is connected by way of a memory."""
        cdef connection *c
        pthread_mutex_lock(&_connections_guard)
        c = _connections
        while c != NULL:
            if works_in(&c.ch, &memory.m):
                c.ch.ops.cut(&c.ch, SHUT_RDWR)
            c = c.next
        pthread_mutex_unlock(&_connections_guard)

    def work(self) -> None:
        """Body of a worker thread; returns after `stop`."""
        cdef worker *w = _worker_new()
        cdef int error
        if w == NULL:
            raise MemoryError
        error = identity_init(&w.me)
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        self.workers.append(<size_t>w)
        if pipe_make(&w.pipe):
            descriptors_module.descriptor_limit -= 2
        with nogil:
            _work(self, w)

    def wait_for_locks(self) -> None:
        """Body of the thread that tries waiting lock requests again; returns after `stop`."""
        with nogil:
            wait_for_locks()

    def watch_streams(self) -> None:
        """Body of the thread that serves whatever waits for FIFOs, devices and pseudo files; returns after `stop`."""
        with nogil:
            watch_streams()

    def watch_mounts(self) -> None:
        """Body of the thread that follows the mount table and lets mounts go; returns after `stop`."""
        watch_mounts(self.stop_fd)

    def queue_for_locks(self) -> None:
        """Body of a thread that queues in the kernel for locks which processes of the server hold."""
        with nogil:
            queue_for_locks()

    def stop(self) -> None:
        """Let every thread finish what it is executing and return."""
        cdef uint64_t one = 1
        self.stopping = True
        write(self.stop_fd, &one, sizeof(one))
        stop_waiting_for_locks()
        stop_watching_streams()

    # ---- session messages ----

    cdef int _session_message(self, connection *c, const message *msg) except -2:
        """Answer HELLO, AUTHENTICATE, MOUNT, ATTACH, DETACH, PING. 0, -EAGAIN or another -errno."""
        cdef bytes body = (<char *>msg.body)[:msg.body_bytes]
        cdef bytes reply = b""
        cdef int error = 0
        try:
            if msg.head.op == OP_HELLO and c.state == STATE_NEW:
                reply = self._hello(c, body)
            elif msg.head.op == OP_AUTHENTICATE and c.state == STATE_GREETED:
                reply = self._authenticate(c, body)
            elif msg.head.op == OP_MOUNT and c.state == STATE_TRUSTED:
                reply = self._mount(c, body)
            elif msg.head.op == OP_ATTACH and c.state == STATE_TRUSTED:
                reply = self._attach(c, body)
            elif msg.head.op == OP_DETACH and c.s != NULL and not body:
                self._end_session(c.s, c)
            elif msg.head.op != OP_PING or body or c.state == STATE_NEW:
                log.warning("a peer sent %s where it must not; its connection is closed",
                            OPERATION_NAMES.get(msg.head.op, f"operation {msg.head.op}"))
                return -EPROTO
        except Refused as refused:
            error = refused.error
            reply = refused.body
        except OSError as failed:
            error = failed.errno or EPROTO
        except Exception:
            log.exception("a session message could not be answered")
            return -EPROTO
        cdef int sent = _reply(c, msg.head.op, msg.head.tag, error, reply)
        if c.state == STATE_EVENT and msg.head.op == OP_ATTACH:
            open_events(c)
        return sent

    cdef bytes _hello(self, connection *c, bytes body):
        """Agree on a version. A peer with no version in common gets EPROTONOSUPPORT and, in the body, what we speak."""
        magic, oldest, newest, _, _, nonce = _unpack("<IHHII32s", body)
        if magic != HELLO_MAGIC:
            raise Refused(EPROTO)
        server_nonce = auth.new_nonce()
        welcome = struct.pack("<HHIII32s", PROTOCOL_VERSION, c.needs_authentication, 0, _max_payload(c), MAX_SLOTS, server_nonce)
        memcpy(c.client_nonce, <const char *>nonce, NONCE_BYTES)
        memcpy(c.server_nonce, <const char *>server_nonce, NONCE_BYTES)
        if not oldest <= PROTOCOL_VERSION <= newest:
            raise Refused(EPROTONOSUPPORT, welcome)
        c.state = STATE_GREETED if c.needs_authentication else STATE_TRUSTED
        return welcome

    cdef bytes _authenticate(self, connection *c, bytes body):
        """Check the client's proof that it has the key, and prove the same to it."""
        client_nonce = c.client_nonce[:NONCE_BYTES]
        server_nonce = c.server_nonce[:NONCE_BYTES]
        if self.key is None or not auth.verify(body, self.key, auth.CLIENT, client_nonce, server_nonce, client_nonce + server_nonce):
            log.warning("a client failed to authenticate")
            c.state = STATE_NEW
            raise Refused(EACCES)
        c.state = STATE_TRUSTED
        return auth.proof(self.key, auth.SERVER, client_nonce, server_nonce, client_nonce + server_nonce)

    cdef bytes _mount(self, connection *c, bytes body):
        """Open the source, ask the whitelist, begin a session whose slot 0 this connection is."""
        flags, slots = _unpack("<II", body[:sizeof(mount_request)])
        path = body[sizeof(mount_request):]
        if not 1 <= slots <= MAX_SLOTS or not path.startswith(b"/") or b"\0" in path or len(path) >= MAX_PATH:
            raise Refused(EINVAL)
        cdef int fd = _open_source(path)
        cdef bytes secret = secrets.token_bytes(SECRET_BYTES)
        cdef uint64_t id = secrets.randbits(63) | 1
        cdef bytes real = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))
        cdef session *s = session_new(id, <const uint8_t *><const char *>secret, secrets.randbits(31), slots)
        if s == NULL:
            os.close(fd)
            raise MemoryError
        s.read_only = flags & MOUNT_READ_ONLY
        s.watches_mounts = flags & MOUNT_WATCH
        s.lets_root_go = flags & MOUNT_LET_GO
        cdef int error = root_enter(s, fd, path_place(<const char *>real, NULL))
        if error < 0:
            session_unref(s)
            raise Refused(-error)
        self.sessions[id] = <size_t>s
        self._bind(c, s, 0)
        log.info("session %016x: %s", id, os.fsdecode(real))
        return struct.pack("<Q32sII", id, secret, slots, int(self.grace_s))

    cdef bytes _attach(self, connection *c, bytes body):
        """Give a slot or the event channel of a session to this connection; an older holder is cut off."""
        id, secret, slot, _ = _unpack("<Q32sII", body)
        cdef session *s
        if id not in self.sessions:
            raise Refused(ESTALE)
        s = <session *><size_t>self.sessions[id]
        if not hmac.compare_digest(s.secret[:SECRET_BYTES], secret):
            raise Refused(EACCES)
        if slot != EVENT_SLOT and slot >= s.slots:
            raise Refused(EINVAL)
        self._bind(c, s, slot)
        return struct.pack("<Q", 0 if slot == EVENT_SLOT else s.slot_table[<uint32_t>slot].sequence)

    cdef int _bind(self, connection *c, session *s, uint32_t slot) except -1:
        cdef connection *older
        atomic_add_int(&s.references, 1)
        c.slot = slot
        c.ch.limit = MAX_MESSAGE
        pthread_mutex_lock(&s.guard)
        older = <connection *>(s.event if slot == EVENT_SLOT else s.slot_table[slot].connection)
        if slot != EVENT_SLOT:
            s.slot_table[slot].connection = c   # the event channel follows once it has its reply, open_events
        if older != NULL:
            older.ch.ops.cut(&older.ch, SHUT_RDWR)
        s.connections += 1
        c.s = s
        c.state = STATE_EVENT if slot == EVENT_SLOT else STATE_SLOT
        pthread_mutex_unlock(&s.guard)
        return 0

    cdef int _end_session(self, session *s, connection *asking) except -1:
        """Forget a session and cut its connections, `asking` once it has its reply; the last of them frees it."""
        cdef connection *c
        cdef uint32_t slot
        if self.sessions.pop(s.id, None) is None:
            return 0
        log.info("session %016x: ended", s.id)
        pthread_mutex_lock(&s.guard)
        s.ended = True
        for slot in range(s.slots + 1):
            c = <connection *>(s.event if slot == s.slots else s.slot_table[slot].connection)
            if c != NULL:
                c.ch.ops.cut(&c.ch, SHUT_RD if c == asking else SHUT_RDWR)
        pthread_mutex_unlock(&s.guard)
        self.carrier.session_ended(s.id)
        with nogil:
            abandon_all(s)
            session_unref(s)
        return 0

    # ---- errands: between a worker, which has the connection, and the thread that will have it ----

    cdef int _new_errand(self, connection *c, const message *msg) except -2:
        """Keep a request that the slot admitted. HANDED_OVER, or -EPROTO if its caller is malformed."""
        cdef Errand errand = Errand.__new__(Errand)
        cdef caller who
        memcpy(&who, msg.body, sizeof(caller))
        errand.server = self
        errand.c = c
        errand.s = c.s
        errand.session = c.s.id
        atomic_add_int(&c.s.references, 1)
        errand.slot = c.slot
        errand.head = msg.head
        errand.uid = who.uid
        errand.body = (<char *>msg.body)[sizeof(caller) + groups_bytes(who.ngroups):msg.body_bytes]
        self.errands[c.s.id, c.slot] = errand
        return HANDED_OVER

    cdef int _join_errand(self, connection *c, const message *msg) except -2:
        """Let a repeated request wait for the errand that its first copy began: HANDED_OVER, or 0 if that has ended."""
        cdef Errand errand = self.errands.get((c.s.id, c.slot))
        if errand is None or errand.head.sequence != msg.head.sequence:
            return 0
        self.joining[<size_t>c] = errand
        return HANDED_OVER

    cdef int _begin_errand(self, connection *c) except -2:
        """Have the errand of a connection that its worker is done with carried out, or answered there too."""
        cdef Errand errand = self.joining.pop(<size_t>c, None)
        cdef connection *older
        if errand is None:
            errand = self.errands[c.s.id, c.slot]
            errand.begun = True
            if errand.c != c:       # a repetition was quicker, and this connection was cut
                _arm(self, c, EPOLLIN, EPOLL_CTL_MOD)
            self.carrier.start(errand)
        elif errand.reply is not None:
            errand._send(c)
        else:
            older = errand.c
            errand.c = c
            if errand.begun:        # it was cut when this one was attached: a worker frees it
                _arm(self, older, EPOLLIN, EPOLL_CTL_MOD)
        return 0

    # ---- housekeeping, figures ----

    def expire(self) -> None:
        """End sessions without connections whose grace time is over, and connections that never said who they are."""
        cdef session *s
        cdef connection *c
        cdef int64_t now = now_us()
        for id in list(self.sessions):
            s = <session *><size_t>self.sessions[id]
            if s.connections == 0 and now - s.idle_since_us > <int64_t>(self.grace_s * 1e6):
                log.warning("session %016x: its client is gone for %g s", id, self.grace_s)
                self._end_session(s, NULL)
        pthread_mutex_lock(&_connections_guard)
        c = _connections
        while c != NULL:
            if c.state < STATE_SLOT and now - c.since_us > UNATTACHED_TIMEOUT_US:
                c.ch.ops.cut(&c.ch, SHUT_RDWR)
            c = c.next
        pthread_mutex_unlock(&_connections_guard)

    def figures(self) -> dict[str, object]:
        """Counters since the start: requests and errors by operation, sessions with what they hold, descriptors, and `copied`:
        bytes of messages that went through buffers of ours.
        """
        cdef worker *w
        cdef session *s
        requests: dict[str, int] = {}
        errors: dict[str, int] = {}
        cdef uint64_t malformed = self.malformed_errands, repeated = 0
        for address in self.workers:
            w = <worker *><size_t>address
            malformed += w.count.malformed
            repeated += w.count.repeated
            for number, name in OPERATION_NAMES.items():
                if w.count.requests[<int>number]:
                    requests[name] = requests.get(name, 0) + w.count.requests[<int>number]
                if w.count.errors[<int>number]:
                    errors[name] = errors.get(name, 0) + w.count.errors[<int>number]
        sessions = []
        for address in self.sessions.values():
            s = <session *><size_t>address
            sessions.append({"id": f"{s.id:016x}", "nodes": s.nodes_used, "handles": s.handles_used,
                             "connections": s.connections, "mounts": self.carrier.mounts_of(s.id)})
        return {"requests": requests, "errors": errors, "malformed": malformed, "repeated": repeated,
                "sessions": sessions, "connections": _connection_count, "copied": _bytes_copied(), "descriptors": descriptors_module.descriptors}


cdef uint64_t _bytes_copied() noexcept:
    cdef connection *c
    cdef uint64_t total
    pthread_mutex_lock(&_connections_guard)
    total = _copied
    c = _connections
    while c != NULL:
        total += c.ch.copied
        c = c.next
    pthread_mutex_unlock(&_connections_guard)
    return total


cdef uint32_t _max_payload(const connection *c) noexcept:
    """The longest READ or WRITE that the connection can carry, in whole pages."""
    return min(<uint32_t>MAX_PAYLOAD, (c.ch.largest - (MAX_MESSAGE - MAX_PAYLOAD)) & ~<uint32_t>4095)


cdef int _reply(connection *c, uint16_t op, uint64_t tag, int error, bytes body) except -2:
    """Send the reply of a session message: 0, -EAGAIN or another -errno."""
    cdef bytes whole = struct.pack("<IHHiIQQ", sizeof(header) + len(body), op, MESSAGE_REPLY, error, 0, 0, tag) + body
    cdef uint8_t *room = c.ch.ops.reserve(&c.ch, len(whole), False)
    if room == NULL:
        return -EPROTO
    memcpy(room, <const char *>whole, len(whole))
    return c.ch.ops.commit(&c.ch, len(whole), NULL, 0)


def _unpack(layout: str, body: bytes) -> tuple:
    """struct.unpack for a peer's bytes: a wrong length is the peer's error."""
    try:
        return struct.unpack(layout, body)
    except struct.error:
        raise Refused(EPROTO) from None


def _open_source(path: bytes) -> int:
    """Open the directory a client wants to mount, if the whitelist has it. EPERM comes before ENOENT tells anything.

    Magic links are not followed: /proc/PID/root/home is not the /home that the whitelist means.
    """
    cdef open_how how
    memset(&how, 0, sizeof(how))
    how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC
    how.resolve = RESOLVE_NO_MAGICLINKS
    cdef int fd = <int>syscall(SYS_openat2, AT_FDCWD, <const char *>path, &how, sizeof(how))
    if fd < 0:
        error = errno
        # Through the symbolic links, as the open went: what lies behind one is not for everybody to find out.
        _check_mount(os.path.realpath(path))
        raise Refused(error)
    try:
        _check_mount(os.fsencode(os.readlink(f"/proc/self/fd/{fd}")))
    except Refused:
        os.close(fd)
        raise
    return fd


def _check_mount(path: bytes) -> None:
    if not path_place(<const char *>path, NULL).allowed & ALLOW_MOUNT:
        count_denial(ALLOW_MOUNT)
        # count_denial warns once; a client that tries again and again must not fill the log.
        log.info("whitelist: %s may not be mounted: it is not in [Mount]", os.fsdecode(path))
        raise Refused(EPERM)
