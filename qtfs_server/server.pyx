"""Sessions as their clients begin, join and end them; errands; figures.

Lock order: connections_guard, session.guard, session.outbox_guard.
Who owns what: a connection belongs to the worker that holds its one-shot event. An errand owns the connection that it
came by until it has answered; the dicts of errands belong to whoever holds the GIL.
"""
from libc.errno cimport EACCES, EAGAIN, EINVAL, ENOMEM, EPERM, EPROTO, EPROTONOSUPPORT, ESTALE, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qtfs_common.includes.polling cimport EFD_CLOEXEC, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, \
    epoll_create1, epoll_ctl, epoll_event, eventfd
from qtfs_common.protocol cimport *
from qtfs_common.transport cimport WAIT_WRITABLE, WRITE_FIXED_BYTES, channel, message, now_us, tell_begun
from qtfs_server.connection cimport STATE_EVENT, STATE_GREETED, STATE_NEW, STATE_SLOT, STATE_TRUSTED, bytes_copied, \
    connection, connection_count, cut_unattached, probe_vsock_peers
from qtfs_server.chores cimport chores_done
from qtfs_server.dispatch cimport abandon_in_slot, settle_in_slot
from qtfs_server.event_channel cimport abandon_all, abandon_later, answer_wait, let_all_go, open_events
from qtfs_server.figures cimport session_figures
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_DIRECTORY, O_PATH, RESOLVE_NO_MAGICLINKS, SYS_openat2, \
    atomic_add_int, open_how, pthread_mutex_lock, pthread_mutex_unlock, read, syscall, write
from qtfs_server.openers cimport go_on_opening, suspend_openings
from qtfs_server.operations.locks cimport go_on_waiting_for_locks, lock_polling, queue_for_locks, set_answer, \
    stop_waiting_for_locks, wait_for_locks
from qtfs_server.policy cimport ALLOW_MOUNT, path_place, place, count_denial
from qtfs_server.request cimport HANDED_OVER
from qtfs_server.node_descriptors cimport node_pin, node_unpin
from qtfs_server.nodes cimport root_enter as _root_enter
from qtfs_server.passing cimport PASSED_MEMORY, PASSED_STATE, Passed, adopt_lock_owners, descriptors_of, memory_of, \
    restore_memory
from qtfs_server.recovery cimport lock_all_again, recover, wake_pollers
from qtfs_server.service cimport SOURCE_STOP, all_workers, arm, spinning_at_most as _spinning_at_most
from qtfs_server.session cimport HANDLE_STORED, handle_at, node, session, session_new, session_unref, set_farewell
from qtfs_server.state_file cimport state_free, state_header, state_open, state_remove, state_take
from qtfs_server.streams cimport go_on_watching_streams, stop_watching_streams, watch_streams
from qtfs_server.unnamed cimport store_all
from qtfs_server.worker cimport worker
from qtfs_server cimport descriptors as descriptors_module
from qtfs_server cimport handles as handles_module

import hmac
import logging
import os
import secrets
import struct
from collections.abc import Iterator

from qtfs_common import auth
from qtfs_common.protocol import OPERATION_NAMES
from qtfs_server.mount_watch import watch_mounts
from qtfs_server.state_file import discard_session, left_sessions
from qtfs_server.stuck import stuck_requests

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SHUT_RD
        SHUT_RDWR

cdef enum:
    PROBE_PERIOD_US = 20000000
    FIRST_BYTES = 16384 + WRITE_FIXED_BYTES     # of a message, before it is known whether it is a long WRITE
    ERRAND_SEND_TIMEOUT_US = 5000000   # whose client does not read its answer is cut

log = logging.getLogger(__name__)


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
        elif sent != -EAGAIN or not ch.ops.wait(ch, WAIT_WRITABLE, -1, -1, ERRAND_SEND_TIMEOUT_US):
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
        reply = struct.pack("<IHHiIQQ", sizeof(header) + len(body), self.head.op, MESSAGE_REPLY, max(error, 0),
                            self.slot, self.head.sequence, self.head.tag) + body
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
            arm(self.server, c, EPOLLIN, EPOLL_CTL_MOD)
        return 0


cdef class Server(Service):
    """All that the engine's threads share. Threads are the caller's: each runs `work`, `wait_for_locks` or
    `watch_streams`."""

    def __init__(self, *, carrier: object, key: bytes | None = None, grace_s: float = 90.0,
                 descriptor_limit: int = 1024) -> None:
        """`key`: the shared secret of addresses that demand authentication; `descriptor_limit`: RLIMIT_NOFILE.

        `carrier` carries errands out, see errands.Errands.
        """
        cdef epoll_event event
        global _spinning_at_most
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

    def go_on(self) -> None:
        """Undo `stop`, once every thread has returned; the threads are the caller's to start again."""
        cdef uint64_t unused = 0
        read(self.stop_fd, &unused, sizeof(unused))
        self.stopping = False
        go_on_waiting_for_locks()
        go_on_watching_streams()
        go_on_opening()

    @property
    def busy(self) -> bool:
        """After `stop`: whether something is under way that may still change what sessions have."""
        cdef bint opening
        with nogil:
            opening = suspend_openings()
        return self.running > 0 or bool(self.errands) or opening or not chores_done() or lock_polling()

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
        welcome = struct.pack("<HHIII32s", PROTOCOL_VERSION, c.needs_authentication, 0, _max_payload(c), MAX_SLOTS,
                              server_nonce)
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
        nonces = client_nonce + server_nonce
        if self.key is None or not auth.verify(body, self.key, auth.CLIENT, client_nonce, server_nonce, nonces):
            log.warning("a client failed to authenticate")
            c.state = STATE_NEW
            raise Refused(EACCES)
        c.state = STATE_TRUSTED
        return auth.proof(self.key, auth.SERVER, client_nonce, server_nonce, nonces)

    cdef bytes _mount(self, connection *c, bytes body):
        """Open the source, ask the whitelist, begin a session whose slot 0 this connection is."""
        flags, slots = _unpack("<II", body[:sizeof(mount_request)])
        path = body[sizeof(mount_request):]
        if not 1 <= slots <= MAX_SLOTS or not path.startswith(b"/") or b"\0" in path or len(path) >= MAX_PATH:
            raise Refused(EINVAL)
        cdef bytes secret = secrets.token_bytes(SECRET_BYTES)
        cdef uint64_t id = secrets.randbits(63) | 1
        cdef int fd
        cdef bytes real
        fd, real = _open_source(path)
        cdef session *s = session_new(id, <const uint8_t *><const char *>secret, secrets.randbits(31) | 1, slots, flags,
                                      <const char *>real)
        if s == NULL:
            os.close(fd)
            raise OSError(ENOMEM, "no room for a session's tables")
        cdef int error = root_enter(s, fd, path_place(<const char *>real, NULL))
        if error < 0:
            session_unref(s)
            raise Refused(-error)
        self.sessions[id] = <size_t>s
        self._bind(c, s, 0)
        log.info("session %016x: %s", id, os.fsdecode(real))
        return struct.pack("<Q32sII", id, secret, slots, int(self.grace_s))

    def recover(self, given: dict[str, Passed]) -> None:
        """Go on with the sessions that an engine before us left, once: before anybody can connect.

        `given`: descriptors that were passed on, by the name of their session's file. What finds no place stays there.
        """
        cdef session *s
        cdef Passed passed
        recovered = []
        for name in {**given, **dict.fromkeys(left_sessions())}:
            passed = given.get(name) or Passed([])
            s = self._recover_one(name.encode(), passed)
            if s != NULL:
                self.sessions[s.id] = <size_t>s
                recovered.append((s.id, passed))
        for id, passed in recovered:
            s = <session *><size_t>self.sessions[id]
            with nogil:
                adopt_lock_owners(s, passed.items, passed.count)
            lost = lock_all_again(s)
            if lost:
                log.warning("session %016x: %d owners of locks have lost one: their files are EIO", id, lost)
        if recovered:
            log.warning("%d sessions of the engine before this one go on", len(recovered))

    cdef state_header *_state_of(self, bytes name, Passed given, int *fd, const char **why) except? NULL:
        """The tables of a session, by the descriptor that was passed on or else by their name; NULL: `why`."""
        cdef state_header *state
        fd[0] = given.take(PASSED_STATE)
        if fd[0] < 0:
            return state_open(name, fd, why)
        state = state_take(fd[0], why)
        if state == NULL:
            os.close(fd[0])
        return state

    cdef session *_recover_one(self, bytes name, Passed given) except? NULL:
        """The session of a file that an engine before us left; NULL: it is of no use, and gone unless another has it."""
        cdef const char *why = NULL
        cdef int fd = -1
        cdef state_header *state = self._state_of(name, given, &fd, &why)
        cdef session *s = NULL
        if state != NULL:
            if now_us() - state.alive_us > <int64_t>(self.grace_s * 1e6):
                why = b"its grace is over"
            elif not path_place(state.root, NULL).allowed & ALLOW_MOUNT:
                why = b"the whitelist does not allow it any more"
            if why != NULL:
                state_free(state, fd)
            else:
                with nogil:
                    s = recover(state, fd, given.items, given.count)
                why = b"its directory is gone"
        if s != NULL:
            self._remember(s, given.take(PASSED_MEMORY))
        elif why[0] != 0:
            log.warning("session %s of the engine before this one ends: %s", os.fsdecode(name), why.decode())
            discard_session(os.fsdecode(name))
        return s

    cdef int _remember(self, session *s, int memory) except -1:
        """Restore what was in the memory of the engine before us; -1: nothing is known of it."""
        if memory >= 0:
            with open(memory, "rb") as file:
                restore_memory(s, file.read())
        wake_pollers(s)
        return 0

    def without_file(self) -> list[str]:
        """Names of the sessions whose tables lie in memory, and end with this engine."""
        cdef session *s
        found = []
        for id in list(self.sessions):
            s = <session *><size_t>self.sessions[id]
            if s.state_fd < 0:
                found.append(f"{id:016x}")
        return found

    def is_stored(self, name: str, uint32_t index, uint32_t generation) -> bool:
        """Whether a session's handle has a copy in systemd's store."""
        cdef session *s
        if int(name, 16) not in self.sessions:
            return False
        s = <session *><size_t>self.sessions[int(name, 16)]
        return 0 < index < s.handle_count and handle_at(s, index).generation == generation and \
            bool(handle_at(s, index).flags & HANDLE_STORED)

    def store_all(self) -> None:
        """After `stop`: have systemd keep what the next engine could not open."""
        cdef session *s
        for id in list(self.sessions):
            s = <session *><size_t>self.sessions[id]
            with nogil:
                store_all(s)

    def belongings(self) -> Iterator[tuple[str, list[tuple[int, int, int, int]], bytes]]:
        """After `stop`: the name of each session, its descriptors (passing.Passed), and what lies in no table."""
        cdef session *s
        for id in list(self.sessions):
            s = <session *><size_t>self.sessions[id]
            s.state.alive_us = now_us()
            yield f"{id:016x}", descriptors_of(s), memory_of(s)

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
            tell_begun(&c.ch, OP_WRITE, FIRST_BYTES)
            s.slot_table[slot].connection = c   # the event channel follows once it has its reply, open_events
        if older != NULL:
            older.ch.ops.cut(&older.ch, SHUT_RDWR)
        if s.connections == 0 and s.idle_since_us > 0:
            self.resumed += 1
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
        state_remove(s.id)
        pthread_mutex_lock(&s.guard)
        s.ended = True
        for slot in range(s.slots + 1):
            c = <connection *>(s.event if slot == s.slots else s.slot_table[slot].connection)
            if c != NULL:
                c.ch.ops.cut(&c.ch, SHUT_RD if c == asking else SHUT_RDWR)
        pthread_mutex_unlock(&s.guard)
        self.carrier.session_ended(s.id)
        with nogil:
            if asking == NULL:      # the main thread is not to hang
                abandon_later(s)
            else:                   # a worker may, whose client finds its locks free once it has its reply
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
                arm(self, c, EPOLLIN, EPOLL_CTL_MOD)
            self.carrier.start(errand)
        elif errand.reply is not None:
            errand._send(c)
        else:
            older = errand.c
            errand.c = c
            if errand.begun:        # it was cut when this one was attached: a worker frees it
                arm(self, older, EPOLLIN, EPOLL_CTL_MOD)
        return 0

    # ---- housekeeping, figures ----

    def expire(self) -> None:
        """Once a second: end sessions without connections whose grace time is over, and connections that never said who
        they are; see whether those by vsock have ended unheard.
        """
        cdef session *s
        cdef int64_t now = now_us()
        for id in list(self.sessions):
            if id not in self.sessions:     # it ended while another one was
                continue
            s = <session *><size_t>self.sessions[id]
            s.state.alive_us = now
            if s.connections == 0 and now - s.idle_since_us > <int64_t>(self.grace_s * 1e6):
                log.warning("session %016x: its client is gone for %g s", id, self.grace_s)
                self._end_session(s, NULL)
        cut_unattached(now)
        if now - self.probed_us > PROBE_PERIOD_US:
            self.probed_us = now
            probe_vsock_peers()

    def figures(self) -> dict[str, object]:
        """What doc/control.md says: counters since the start, and what is held now."""
        requests: dict[str, int] = {}
        errors: dict[str, int] = {}
        cdef worker *w = all_workers
        cdef uint64_t malformed = self.malformed_errands, repeated = 0, continued = 0
        while w != NULL:
            malformed += w.count.malformed
            repeated += w.count.repeated
            continued += w.count.continued
            for number, name in OPERATION_NAMES.items():
                if w.count.requests[<int>number]:
                    requests[name] = requests.get(name, 0) + w.count.requests[<int>number]
                if w.count.errors[<int>number]:
                    errors[name] = errors.get(name, 0) + w.count.errors[<int>number]
            w = w.next
        return {"requests": requests, "errors": errors, "malformed": malformed, "repeated": repeated,
                "continued": continued, "lost_handles": handles_module.lost_handles,
                "resumed": self.resumed, "errands": len(self.errands), "sessions": self._sessions_figures(),
                "connections": connection_count, "copied": bytes_copied(), "descriptors": descriptors_module.descriptors,
                "workers": self.running, "stuck": stuck_requests()}

    cdef list _sessions_figures(self):
        """Of every session. It is held while we look: other threads may end it whenever Python code runs."""
        cdef session *s
        cdef list found = []
        for id in list(self.sessions):
            if id not in self.sessions:
                continue
            s = <session *><size_t>self.sessions[id]
            atomic_add_int(&s.references, 1)
            try:
                found.append({**session_figures(s), "mounts": self.carrier.mounts_of(s.id)})
            finally:
                with nogil:
                    session_unref(s)
        return found


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


def _open_source(path: bytes) -> tuple[int, bytes]:
    """Open the directory a client wants to mount, if the whitelist has it; the descriptor and where it really is.

    EPERM comes before ENOENT tells anything.

    Magic links are not followed: /proc/PID/root/home is not the /home that the whitelist means.
    """
    cdef open_how how
    memset(&how, 0, sizeof(how))
    how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC
    how.resolve = RESOLVE_NO_MAGICLINKS
    cdef const char *text = path
    cdef int fd, failure
    with nogil:                     # it may hang
        fd = <int>syscall(SYS_openat2, AT_FDCWD, text, &how, sizeof(how))
        failure = errno
    if fd < 0:
        # Through the symbolic links, as the open went: what lies behind one is not for everybody to find out.
        _check_mount(os.path.realpath(path))
        raise Refused(failure)
    try:
        real = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))      # OSError: there is no path as long as that
        _check_mount(real)
    except BaseException:
        os.close(fd)
        raise
    return fd, real


cdef int root_enter(session *s, int fd, place where) noexcept:
    """The same without the GIL: it may hang."""
    cdef int error
    with nogil:
        error = _root_enter(s, fd, where)
    return error


def _check_mount(path: bytes) -> None:
    if not path_place(<const char *>path, NULL).allowed & ALLOW_MOUNT:
        count_denial(ALLOW_MOUNT)
        # count_denial warns once; a client that tries again and again must not fill the log.
        log.info("whitelist: %s may not be mounted: it is not in [Mount]", os.fsdecode(path))
        raise Refused(EPERM)
