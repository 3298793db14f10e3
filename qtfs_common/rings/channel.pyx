"""One channel of the shared memory: messages in two rings, and a socket that rings when the other side sleeps.

While both sides are awake no system call is made. Who is going to sleep says so in its line, looks once more, and sleeps on
the socket; who has written something looks whether the other side sleeps, and sends a byte. Between the two stands a full
barrier on both sides, so that one of them sees what the other did. The socket also tells that the other side is gone.

The other side may write anything anywhere at any time. So a header is copied out, checked and then used; positions are
checked against our own idea of the area, and messages are copied out whole, but for long ones of file data, of which
nothing but the fixed part in front is looked at (and that once). In a BAR these are copied, too: the kernel has no pages of it
to give to /dev/fuse, or to a file system that does direct I/O (check_vma_flags in mm/gup.c: EFAULT).
"""
from libc.errno cimport EAGAIN, EBUSY, ECONNRESET, EINTR, EMSGSIZE, ENOMEM, EPROTO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.unistd cimport close

from qtfs_common.includes.polling cimport POLLIN
from qtfs_common.protocol cimport OP_READ, OP_WRITE, header
from qtfs_common.rings.layout cimport BELL_LINK, BELL_MAGIC, RING_ALIGNMENT, RING_SKIP, SLEEPS_BY_LINK, SLEEPS_FOR_MESSAGES, \
    SLEEPS_FOR_ROOM, bell_greeting, ring_line
from qtfs_common.rings.memory cimport client_line, engine_line, is_laid_out, is_lost, is_same_engine, reply_area, \
    request_area, ring_full_barrier, ring_load, ring_load_32, ring_memory, ring_publish, ring_store_32, ring_write_barrier
from qtfs_common.transport cimport INBOX_BYTES, WAIT_READABLE, WAIT_WRITABLE, channel, \
    channel_operations, message, poll_socket, release_buffers, socket_channel_init

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        SHUT_RD
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    int shutdown(int, int)

cdef extern from * nogil:
    int load_int "__atomic_load_n"(const int32_t *, int)
    void store_int "__atomic_store_n"(int32_t *, int32_t, int)
    int add_int "__atomic_add_fetch"(int32_t *, int32_t, int)
    int swap_int "__atomic_exchange_n"(int32_t *, int32_t, int)
    enum:
        __ATOMIC_ACQUIRE
        __ATOMIC_RELEASE
        __ATOMIC_ACQ_REL

cdef enum cutting:                  # of our own end, as by shutdown(2)
    UNCUT
    CUT_READING
    CUT_WHOLLY

cdef enum:
    COPIED_BYTES = 16384            # messages up to this are always copied out
    RESTART_BYTES = 65536           # an empty ring is begun anew from here on: its first pages are in the cache


cdef inline ring_end *_end(channel *ch) noexcept nogil:
    return <ring_end *>ch.ring


cdef inline uint64_t _aligned(uint64_t size) noexcept nogil:
    return (size + RING_ALIGNMENT - 1) & ~<uint64_t>(RING_ALIGNMENT - 1)


# ---- receiving -------------------------------------------------------------------------------------------------------

cdef bint _is_over(const ring_end *e) noexcept nogil:
    """Whether the other side, or the memory, is gone, or our own side wants an end."""
    return e.hung_up or is_lost(e.memory) or load_int(&e.cut, __ATOMIC_ACQUIRE) == CUT_WHOLLY or \
        ring_load(&e.theirs.epoch) != e.epoch


cdef int _broken(const ring_end *e) noexcept nogil:
    """What nonsense in the memory means: another claim, or no memory, if it is so; else the other side's mistake."""
    return -ECONNRESET if _is_over(e) else -EPROTO


cdef void _ring_bell(channel *ch, uint32_t sleeping) noexcept nogil:
    """Wake the other side, unless somebody over there looks after it. What does not fit into the socket rings already."""
    if not sleeping & SLEEPS_BY_LINK:
        send(ch.fd, b"\0", 1, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef void _show_head(channel *ch, ring_end *e) noexcept nogil:
    """Let the other side use what we have read."""
    cdef uint32_t sleeping
    if e.shown_head == e.head:
        return
    e.shown_head = e.head
    ring_publish(&e.ours.head, e.head)
    ring_full_barrier()
    sleeping = ring_load_32(&e.theirs.sleeping)
    if sleeping & SLEEPS_FOR_ROOM:
        _ring_bell(ch, sleeping)


cdef void _ring_release(channel *ch) noexcept nogil:
    cdef ring_end *e = _end(ch)
    e.head += e.lent
    e.lent = 0


cdef int _take(channel *ch, ring_end *e, uint64_t there, message *out) noexcept nogil:
    """Take the message at our head; `there` bytes have been written. 1, 0: it was no message, or -errno."""
    cdef uint64_t at = e.head % e.area_bytes
    cdef uint64_t whole
    if there < RING_ALIGNMENT or there > e.area_bytes or there % RING_ALIGNMENT:
        return _broken(e)
    memcpy(&out.head, e.area + at, sizeof(header))
    if out.head.length == RING_SKIP:
        if there < e.area_bytes - at:
            return _broken(e)
        e.head += e.area_bytes - at
        return 0
    whole = _aligned(out.head.length)
    if out.head.length < sizeof(header) or out.head.length > ch.limit or whole > there or \
            at + out.head.length > e.area_bytes:
        return _broken(e)
    out.body_bytes = out.head.length - sizeof(header)
    if e.memory.has_pages and out.head.op == e.bulk_op and out.head.length > COPIED_BYTES:
        out.body = <uint8_t *>e.area + at + sizeof(header)
        e.lent = whole
        return 1 if not is_lost(e.memory) else -ECONNRESET
    if out.head.length > ch.inbox_bytes:
        return -EMSGSIZE
    memcpy(ch.inbox, e.area + at + sizeof(header), out.body_bytes)
    ch.copied += out.body_bytes
    out.body = ch.inbox
    e.head += whole
    return 1 if not is_lost(e.memory) else -ECONNRESET     # what was copied may be the zeros of a bus error


cdef int _ring_receive(channel *ch, message *out) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef uint64_t tail
    cdef int found = 0
    _ring_release(ch)
    if load_int(&e.cut, __ATOMIC_ACQUIRE) != UNCUT or e.serves and ring_load(&e.theirs.epoch) != e.epoch:
        return -ECONNRESET
    tail = ring_load(&e.theirs.tail)
    while found == 0 and tail != e.head:
        found = _take(ch, e, tail - e.head, out)
    if found == 0:
        _show_head(ch, e)
        # A client takes what the engine said before it went.
        return -ECONNRESET if _is_over(e) else 0
    return found


# ---- sending ---------------------------------------------------------------------------------------------------------

cdef uint64_t _free_bytes(ring_end *e) noexcept nogil:
    """Room in the ring, as far as we may believe the other side; what it says is looked at if need be."""
    cdef uint64_t head = ring_load(&e.theirs.head)
    # A head beyond our tail, or one that goes back, is nonsense: then there is no room.
    if e.tail - head <= e.tail - e.seen_head:
        e.seen_head = head
    return e.out_bytes - (e.tail - e.seen_head)


cdef bint _place(ring_end *e, uint64_t size, uint64_t *skip) noexcept nogil:
    """Find room for `size` bytes in a row. How many to skip for that; False: there is none now."""
    cdef uint64_t at = e.tail % e.out_bytes
    cdef uint64_t whole = _aligned(size)
    cdef uint64_t room = _free_bytes(e)
    cdef uint64_t rest = e.out_bytes - at
    skip[0] = rest if whole > rest or at >= RESTART_BYTES and room == e.out_bytes and rest + whole <= room else 0
    return skip[0] + whole <= room


cdef uint8_t *_skip(ring_end *e, uint64_t skip) noexcept nogil:
    """Where the message begins; what is skipped says so."""
    if skip > 0:
        (<uint32_t *>(e.out + e.tail % e.out_bytes))[0] = RING_SKIP
        return e.out
    return e.out + e.tail % e.out_bytes


cdef void _publish(channel *ch, ring_end *e, uint64_t size) noexcept nogil:
    """Show the other side `size` more bytes, skipped ones included."""
    cdef uint32_t sleeping
    e.tail += size
    ring_publish(&e.ours.tail, e.tail)
    ring_full_barrier()
    sleeping = ring_load_32(&e.theirs.sleeping)
    if sleeping & SLEEPS_FOR_MESSAGES:
        _ring_bell(ch, sleeping)


cdef uint8_t *_ring_reserve(channel *ch, size_t size, bint bulk) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef uint64_t skip = 0
    e.direct = 0
    if size > ch.largest:
        return NULL
    if bulk and e.memory.has_pages and _place(e, size, &skip):
        e.direct = skip + 1
        return e.out + (e.tail + skip) % e.out_bytes
    return ch.outbox if size <= ch.outbox_bytes else NULL


cdef int _send_parts(channel *ch, ring_end *e, const uint8_t *first, size_t first_bytes, const uint8_t *second,
                     size_t second_bytes) noexcept nogil:
    """A message in two parts: 0, -EAGAIN: there is no room yet, or -EMSGSIZE."""
    cdef uint64_t size = first_bytes + second_bytes
    cdef uint64_t skip = 0
    cdef uint8_t *at
    if size > ch.largest:
        return -EMSGSIZE
    if not _place(e, size, &skip):
        return -EAGAIN
    at = _skip(e, skip)
    memcpy(at, first, first_bytes)
    if second_bytes > 0:
        memcpy(at + first_bytes, second, second_bytes)
    _publish(ch, e, skip + _aligned(size))
    return 0


cdef int _ring_flush(channel *ch) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef int status
    if ch.unsent_bytes[0] == 0:
        return 0
    if _is_over(e):
        return -ECONNRESET
    status = _send_parts(ch, e, ch.unsent[0], ch.unsent_bytes[0], ch.unsent[1], ch.unsent_bytes[1])
    if status == 0:
        ch.copied += ch.unsent_bytes[0] + ch.unsent_bytes[1]
        ch.unsent_bytes[0] = ch.unsent_bytes[1] = 0
        free(ch.kept_output)
        ch.kept_output = NULL
    return status


cdef int _ring_commit(channel *ch, size_t size, const void *payload, size_t payload_bytes) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef uint64_t skip = e.direct
    _show_head(ch, e)
    if skip > 0:
        e.direct = 0
        if is_lost(e.memory):
            return -ECONNRESET          # so may be what was built there
        _skip(e, skip - 1)
        _publish(ch, e, skip - 1 + _aligned(size))
        return 0
    ch.unsent[0] = ch.outbox
    ch.unsent_bytes[0] = size
    ch.unsent[1] = <const uint8_t *>payload
    ch.unsent_bytes[1] = payload_bytes
    return _ring_flush(ch)


cdef uint8_t *_ring_place(channel *ch, size_t before) noexcept nogil:
    """Only while the channel is ours: other machines do not see our claim, and may take it up after the engine's end."""
    cdef ring_end *e = _end(ch)
    cdef uint64_t skip = 0
    e.placed = 0
    if not e.memory.has_pages or not is_same_engine(e.memory) or _is_over(e) or ch.unsent_bytes[0] > 0 or \
            not _place(e, ch.largest, &skip):
        return NULL
    e.placed = skip + 1
    return e.out + (e.tail + skip) % e.out_bytes + before


cdef int _ring_commit_placed(channel *ch, size_t size, const void *payload, size_t payload_bytes,
                             size_t placed_bytes) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef uint64_t skip = e.placed - 1
    cdef uint8_t *at
    _show_head(ch, e)
    if _is_over(e) or not is_same_engine(e.memory):
        return -ECONNRESET
    at = _skip(e, skip)
    memcpy(at, ch.outbox, size)
    memcpy(at + size, payload, payload_bytes)
    ch.copied += size + payload_bytes
    _publish(ch, e, skip + _aligned(size + payload_bytes + placed_bytes))
    return 0


cdef bint _ring_owns_place(channel *ch) noexcept nogil:
    """The memory has not vanished, no engine has laid it out differently, and nobody else has claimed the channel."""
    cdef ring_end *e = _end(ch)
    ring_full_barrier()                 # what was read there was read before
    return not is_lost(e.memory) and is_laid_out(e.memory) and ring_load(&e.ours.epoch) == e.epoch


cdef ssize_t _ring_put(channel *ch, const uint8_t *data, size_t size) noexcept nogil:
    """A message goes whole or not at all."""
    cdef ring_end *e = _end(ch)
    cdef int status
    if load_int(&e.cut, __ATOMIC_ACQUIRE) == CUT_WHOLLY or is_lost(e.memory):
        return -ECONNRESET
    status = _send_parts(ch, e, data, size, NULL, 0)
    return <ssize_t>size if status == 0 else status


# ---- sleeping, closing -----------------------------------------------------------------------------------------------

cdef int _ready(channel *ch, ring_end *e, int want) noexcept nogil:
    """Which of what is wanted (WAIT_*) can be had now."""
    cdef uint64_t skip = 0
    cdef uint64_t unsent = ch.unsent_bytes[0] + ch.unsent_bytes[1]
    cdef int result = 0
    if _is_over(e):
        return want
    if want & WAIT_READABLE and (ring_load(&e.theirs.tail) != e.head + e.lent or
                                 load_int(&e.cut, __ATOMIC_ACQUIRE) != UNCUT):
        result |= WAIT_READABLE
    if want & WAIT_WRITABLE and _place(e, unsent if unsent > 0 else ch.largest, &skip):
        result |= WAIT_WRITABLE
    return result


cdef bint _ring_doze(channel *ch, int want) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef uint32_t sleeping = e.sleeping
    if want & WAIT_READABLE:
        sleeping |= SLEEPS_FOR_MESSAGES
    if want & WAIT_WRITABLE:
        sleeping |= SLEEPS_FOR_ROOM
    _show_head(ch, e)
    ring_store_32(&e.ours.sleeping, sleeping)
    ring_full_barrier()
    return _ready(ch, e, want) != 0


cdef void _ring_wake(channel *ch) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef char rings[64]
    cdef ssize_t got
    ring_store_32(&e.ours.sleeping, e.sleeping)
    got = recv(ch.fd, rings, sizeof(rings), MSG_DONTWAIT)
    if got == 0 or got < 0 and errno not in (EAGAIN, EINTR):
        e.hung_up = True


cdef int _ring_wait(channel *ch, int want, int wake_fd, int other_fd, int64_t timeout_us) noexcept nogil:
    cdef ring_end *e = _end(ch)
    cdef int others = 0
    if not _ring_doze(ch, want):
        poll_socket(ch, POLLIN, wake_fd, other_fd, timeout_us, &others)
    _ring_wake(ch)
    return _ready(ch, e, want) | others


cdef void _ring_cut(channel *ch, int how) noexcept nogil:
    cdef ring_end *e = _end(ch)
    if how != SHUT_RD:
        store_int(&e.cut, CUT_WHOLLY, __ATOMIC_RELEASE)
    elif load_int(&e.cut, __ATOMIC_ACQUIRE) == UNCUT:
        store_int(&e.cut, CUT_READING, __ATOMIC_RELEASE)
    shutdown(ch.fd, how)


cdef void _ring_close(channel *ch) noexcept nogil:
    cdef ring_end *e = _end(ch)
    release_buffers(ch)
    if not is_lost(e.memory):           # else somebody else may be using it by now
        ring_publish(&e.ours.epoch, 0)
    close(ch.fd)
    ch.fd = -1
    if e.serves:
        store_int(&e.memory.served[e.number], 0, __ATOMIC_RELEASE)
    if e.claim_fd >= 0:
        close(e.claim_fd)
    add_int(&e.memory.users, -1, __ATOMIC_ACQ_REL)
    free(e)
    ch.ring = NULL


cdef channel_operations _ring_operations
_ring_operations.receive = _ring_receive
_ring_operations.reserve = _ring_reserve
_ring_operations.commit = _ring_commit
_ring_operations.flush = _ring_flush
_ring_operations.place = _ring_place
_ring_operations.commit_placed = _ring_commit_placed
_ring_operations.owns_place = _ring_owns_place
_ring_operations.put = _ring_put
_ring_operations.release = _ring_release
_ring_operations.wait = _ring_wait
_ring_operations.doze = _ring_doze
_ring_operations.wake = _ring_wake
_ring_operations.cut = _ring_cut
_ring_operations.close = _ring_close


# ---- beginning -------------------------------------------------------------------------------------------------------

cdef int _ring_init(channel *ch, ring_memory *memory, uint32_t number, uint64_t epoch, bint serves) noexcept nogil:
    """Turn `ch`, whose descriptor is the bell, into one side of a channel: 0 or -ENOMEM.

    The engine's is a greeter, which is a user of the memory already. Another thread may cut it at this moment.
    """
    cdef ring_end *e = <ring_end *>calloc(1, sizeof(ring_end))
    if e == NULL:
        return -ENOMEM
    e.memory = memory
    e.number = number
    e.epoch = epoch
    e.serves = serves
    e.claim_fd = -1
    e.ours = engine_line(memory, number) if serves else client_line(memory, number)
    e.theirs = client_line(memory, number) if serves else engine_line(memory, number)
    e.out = reply_area(memory, number) if serves else request_area(memory, number)
    e.out_bytes = memory.reply_bytes if serves else memory.request_bytes
    e.area = request_area(memory, number) if serves else reply_area(memory, number)
    e.area_bytes = memory.request_bytes if serves else memory.reply_bytes
    e.bulk_op = OP_WRITE if serves else OP_READ
    if not serves:
        add_int(&memory.users, 1, __ATOMIC_ACQ_REL)
        # The engine may still be looking at the claim before this one, whose positions are no mistake of ours.
        ring_publish(&e.ours.epoch, 0)
        ring_write_barrier()
    ch.ring = e
    ch.family = 0                       # the bell's is not that of the messages
    ch.ops = &_ring_operations
    # What does not fit behind the last message begins at the front, and what was skipped is used up.
    ch.largest = <uint32_t>min(min(e.out_bytes, e.area_bytes) // 2, <uint64_t>INBOX_BYTES)
    e.ours.tail = e.ours.head = 0
    ring_store_32(&e.ours.sleeping, 0)
    return 0


cdef void _flush(const ring_memory *memory, uint32_t number) noexcept nogil:
    """See that what was written is there before the other side is told by another way: no read overtakes it."""
    ring_full_barrier()
    ring_load(&client_line(memory, number).epoch)


cdef bint _is_fresh(const ring_memory *memory, const bell_greeting *asked) noexcept nogil:
    """Whether nothing has been said under the claim: what lies in the area otherwise is another conversation's."""
    cdef ring_line *client = client_line(memory, asked.channel)
    return ring_load(&client.epoch) == asked.epoch and client.tail == 0 and client.head == 0


cdef int _serve_claim(channel *ch, const bell_greeting *asked) noexcept nogil:
    """Take up the channel that a greeting names: 0 or -errno."""
    cdef ring_memory *memory = <ring_memory *>ch.ring
    cdef int error
    if asked.magic != BELL_MAGIC or asked.channel >= memory.channels or asked.epoch == 0:
        return -EPROTO
    if asked.instance != memory.instance or is_lost(memory) or not _is_fresh(memory, asked):
        return -ECONNRESET
    if swap_int(&memory.served[asked.channel], 1, __ATOMIC_ACQ_REL):
        return -EBUSY                   # the one before has not been found dead yet
    error = _ring_init(ch, memory, asked.channel, asked.epoch, True)
    if error < 0:
        store_int(&memory.served[asked.channel], 0, __ATOMIC_RELEASE)
        return error
    ch.begin = ch.end = 0
    ring_publish(&_end(ch).ours.epoch, asked.epoch)
    _flush(memory, asked.channel)
    send(ch.fd, b"\0", 1, MSG_DONTWAIT | MSG_NOSIGNAL)
    return 0


cdef int _greeter_receive(channel *ch, message *out) noexcept nogil:
    """0, with the channel turned into that of the greeting once all of it has come; or -errno."""
    cdef bell_greeting asked
    cdef ssize_t got
    while ch.end < sizeof(asked):
        got = recv(ch.fd, ch.inbox + ch.end, sizeof(asked) - ch.end, MSG_DONTWAIT)
        if got == 0:
            return -ECONNRESET
        if got < 0 and errno != EINTR:
            return 0 if errno == EAGAIN else -errno
        ch.end += max(got, 0)
    memcpy(&asked, ch.inbox, sizeof(asked))
    return _serve_claim(ch, &asked)


cdef void _greeter_close(channel *ch) noexcept nogil:
    add_int(&(<ring_memory *>ch.ring).users, -1, __ATOMIC_ACQ_REL)
    ch.ring = NULL
    _a_socket.ops.close(ch)


cdef channel _a_socket
socket_channel_init(&_a_socket, -1)
cdef channel_operations _greeter_operations = _a_socket.ops[0]
_greeter_operations.receive = _greeter_receive
_greeter_operations.close = _greeter_close


cdef void greeter_init(channel *ch, int fd, ring_memory *memory) noexcept nogil:
    """Make `ch` a channel over what was accepted on the bell socket: its greeting says which one."""
    socket_channel_init(ch, fd)
    add_int(&memory.users, 1, __ATOMIC_ACQ_REL)
    ch.ops = &_greeter_operations
    ch.ring = memory


cdef bint is_greeter(const channel *ch) noexcept nogil:
    """Whether it has yet to name a channel."""
    return ch.ops == &_greeter_operations


cdef bint works_in(const channel *ch, const ring_memory *memory) noexcept nogil:
    """Whether a channel's messages, or those to come, go by that memory."""
    if ch.ops == &_greeter_operations:
        return ch.ring == memory
    return ch.ops == &_ring_operations and (<const ring_end *>ch.ring).memory == memory


cdef class RingConnection(Connection):
    """A client's side of one channel, for as long as its claim."""

    def __init__(self, RingMemory memory not None, uint32_t number, uint64_t epoch, *, int claim_fd, int bell_fd,
                 uint32_t bell) -> None:
        """Write the claim into the memory. Both descriptors become the connection's: the lock that is the claim, and the
        bell. `bell`: BELL_SOCKET or BELL_LINK.
        """
        self.memory = memory
        socket_channel_init(&self.ch, bell_fd)
        if _ring_init(&self.ch, &memory.m, number, epoch, False) < 0:
            raise MemoryError
        cdef ring_end *e = _end(&self.ch)
        e.claim_fd = claim_fd
        e.sleeping = SLEEPS_BY_LINK if bell == BELL_LINK else 0
        e.ours.bell = bell
        e.ours.instance = memory.m.instance
        ring_publish(&e.ours.epoch, epoch)
        _flush(&memory.m, number)
        self._begin()

    def __dealloc__(self):
        self.close()                    # while the memory is still there

    @property
    def served(self) -> bool:
        """Whether the engine has taken the claim up."""
        return self.open and ring_load(&_end(&self.ch).theirs.epoch) == _end(&self.ch).epoch

    @property
    def hung_up(self) -> bool:
        """Whether the engine has turned the claim down, or is gone."""
        return not self.open or _end(&self.ch).hung_up or is_lost(&self.memory.m)

    def receive(self, double timeout_s=30.0) -> tuple[int, int, int, int, int, int, bytes]:
        """As of any connection. What was copied from memory that vanished meanwhile is not handed out."""
        got = Connection.receive(self, timeout_s)
        if is_lost(&self.memory.m):
            raise ConnectionResetError(ECONNRESET, "the memory has vanished")
        return got

    def listen_for_bell(self, double timeout_s) -> None:
        """Sleep until the engine rings."""
        cdef int others = 0
        cdef int64_t timeout_us = <int64_t>(timeout_s * 1e6)
        with nogil:
            poll_socket(&self.ch, POLLIN, -1, -1, timeout_us, &others)
            _ring_wake(&self.ch)
