"""Requests that may have to wait for long: SETLKW, and OPEN, READ and WRITE of FIFOs and devices.

A worker asks once, over its slot. If the server would have to wait, the request comes here and the worker is free; the
event thread sends it again, over the event channel, and hands the answer to the kernel whenever it comes. A caller that
catches a signal makes us send CANCEL, and gets what the server says then. One that dies is answered at once. Its request
stays as an *orphan* until the server has answered, so that a file opened or a lock granted meanwhile is given back.

Everything here is under mount_state.guard; only the event thread sends, receives and frees.
"""
from libc.errno cimport EINTR, EIO, ENOMEM, EPIPE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from qtfs_client.drivers.fuse3.callers cimport fatal_signal_pending, kill_by_broken_pipe, signal_wants_out
from qtfs_client.drivers.fuse3.device cimport write_reply
from qtfs_client.drivers.fuse3.exchange cimport is_given_up
from qtfs_client.drivers.fuse3.replies cimport open_flags
from qtfs_client.drivers.fuse3.state cimport builder, mount_state, waiting, worker
from qtfs_client.includes.fuse_abi cimport fuse_open_out, fuse_read_in, fuse_write_out
from qtfs_client.includes.linux cimport load_int, load_u64, pthread_mutex_lock, pthread_mutex_unlock, store_u64
from qtfs_common.includes.polling cimport eventfd_write
from qtfs_common.protocol cimport EVENT_SLOT, OP_OPEN, OP_READ, OP_RELEASE, OP_SETLKW, OP_WRITE, caller, count_reply, \
    groups_bytes, header, lock_request, open_reply, release_request, write_request
from qtfs_common.transport cimport message, now_us

cdef enum:
    UNLOCK = 2                      # lock_request.type
    LARGEST_ERRNO = 511             # the kernel refuses replies with more


# ---- from the workers ----------------------------------------------------------------------------------------------------

cdef uint8_t *_copy_message(worker *w, uint16_t op, uint64_t done, size_t *size) noexcept nogil:
    """What the worker has just built, as a message of the event channel. NULL without memory.

    `done`: of a WRITE's data, bytes that are not to be sent again.
    """
    cdef uint8_t *copy
    cdef header *head
    size[0] = w.message_bytes + w.payload_bytes - done
    copy = <uint8_t *>malloc(size[0])
    if copy == NULL:
        return NULL
    memcpy(copy, w.room, w.message_bytes)
    if w.payload_bytes > done:
        memcpy(copy + w.message_bytes, w.payload + done, w.payload_bytes - done)
    head = <header *>copy
    head.length = <uint32_t>size[0]
    head.op = op
    head.slot = EVENT_SLOT
    head.sequence = 0
    if op == OP_WRITE:
        (<write_request *>(copy + w.message_bytes - sizeof(write_request))).size -= <uint32_t>done
    return copy


cdef int wait_for_server(worker *w, builder build, uint16_t op, uint64_t done) noexcept nogil:
    """Take over a worker's request: the worker is free for others. 0, or -errno to answer the kernel with."""
    cdef mount_state *m = w.mount
    cdef waiting *wait = <waiting *>calloc(1, sizeof(waiting))
    cdef int error = build(w) if wait != NULL else -ENOMEM
    if error == 0:
        wait.message = _copy_message(w, op, done, &wait.message_bytes)
        error = 0 if wait.message != NULL else -ENOMEM
    if error < 0:
        free(wait)
        return error
    wait.request = w.request[0]
    wait.device = w.device
    wait.op = op
    wait.done = done
    wait.limit = (<fuse_read_in *>w.argument).size if op == OP_READ else 0
    wait.since_us = now_us()
    pthread_mutex_lock(&m.guard)
    # Together with the list, so that an INTERRUPT finds the request in one place or the other.
    wait.interrupted = load_u64(&w.interrupted) == w.request.unique
    store_u64(&w.current, 0)
    wait.next = m.waits
    m.waits = wait
    pthread_mutex_unlock(&m.guard)
    eventfd_write(m.event_fd, 1)
    return 0


# ---- the list ------------------------------------------------------------------------------------------------------------

cdef waiting **_find_locked(mount_state *m, uint64_t tag) noexcept nogil:
    cdef waiting **at = &m.waits
    while at[0] != NULL and (<header *>at[0].message).tag != tag:
        at = &at[0].next
    return at


cdef void _forget_locked(waiting **at) noexcept nogil:
    cdef waiting *wait = at[0]
    at[0] = wait.next
    free(wait.message)
    free(wait)


cdef void free_waits(mount_state *m) noexcept nogil:
    """The mount is over."""
    while m.waits != NULL:
        _forget_locked(&m.waits)


# ---- answering the kernel ------------------------------------------------------------------------------------------------

cdef int _answer_error(waiting *wait, int error) noexcept nogil:
    """Positive errno; what a WRITE has done before counts more. 0 or -errno of the device."""
    cdef fuse_write_out out
    if error > LARGEST_ERRNO or error < 0:
        error = EIO
    if wait.op == OP_WRITE and wait.done > 0:
        out.size = <uint32_t>wait.done
        out.padding = 0
        return write_reply(wait.device, wait.request.unique, 0, &out, sizeof(out), NULL, 0)
    if wait.op == OP_WRITE and error == EPIPE:
        kill_by_broken_pipe(wait.request.pid)
    return write_reply(wait.device, wait.request.unique, -error, NULL, 0, NULL, 0)


cdef int _answer_open(mount_state *m, waiting *wait, const message *got) noexcept nogil:
    cdef fuse_open_out out
    if got.body_bytes != sizeof(open_reply):
        return _answer_error(wait, EIO)
    out.fh = (<open_reply *>got.body).handle
    out.open_flags = open_flags(m, <open_reply *>got.body, 0)
    out.padding = 0
    return write_reply(wait.device, wait.request.unique, 0, &out, sizeof(out), NULL, 0)


cdef int _answer_write(waiting *wait, const message *got) noexcept nogil:
    cdef fuse_write_out out
    if got.body_bytes != sizeof(count_reply):
        return _answer_error(wait, EIO)
    out.size = <uint32_t>(wait.done + (<count_reply *>got.body).count)
    out.padding = 0
    return write_reply(wait.device, wait.request.unique, 0, &out, sizeof(out), NULL, 0)


cdef int _answer(mount_state *m, waiting *wait, const message *got) noexcept nogil:
    """Hand the server's answer on. 0, or -errno of the device: the kernel did not take it."""
    if got.head.error != 0:
        return _answer_error(wait, got.head.error)
    if wait.op == OP_OPEN:
        return _answer_open(m, wait, got)
    if wait.op == OP_WRITE:
        return _answer_write(wait, got)
    if got.body_bytes > wait.limit:
        return _answer_error(wait, EIO)
    return write_reply(wait.device, wait.request.unique, 0, got.body, got.body_bytes, NULL, 0)


# ---- giving back what nobody took ------------------------------------------------------------------------------------------

cdef void *_record(waiting *wait, size_t size) noexcept nogil:
    """The fixed record at the end of a message."""
    return wait.message + wait.message_bytes - size


cdef void _turn_into_unlock(waiting *wait) noexcept nogil:
    """The lock was granted to somebody who is no more."""
    (<lock_request *>_record(wait, sizeof(lock_request))).type = UNLOCK


cdef bint _turn_into_release(waiting *wait, uint64_t handle) noexcept nogil:
    """The file was opened for somebody who is no more. False without memory: it stays open until the mount ends."""
    cdef size_t fixed = sizeof(header) + sizeof(caller) + \
        groups_bytes((<caller *>(wait.message + sizeof(header))).ngroups)
    cdef uint8_t *larger = <uint8_t *>malloc(fixed + sizeof(release_request))
    cdef release_request *body
    if larger == NULL:
        return False
    memcpy(larger, wait.message, fixed)
    free(wait.message)
    wait.message = larger
    wait.message_bytes = fixed + sizeof(release_request)
    body = <release_request *>(larger + fixed)
    memset(body, 0, sizeof(release_request))
    body.handle = handle
    (<header *>larger).length = <uint32_t>wait.message_bytes
    (<header *>larger).op = wait.op = OP_RELEASE
    return True


cdef bint _has_to_be_undone(waiting *wait, const message *got) noexcept nogil:
    """Whether an orphan was granted something; then its message now takes that back."""
    if got.head.error != 0:
        return False
    if wait.op == OP_SETLKW and wait.dying:
        _turn_into_unlock(wait)
    elif wait.op != OP_OPEN or got.body_bytes != sizeof(open_reply) or \
            not _turn_into_release(wait, (<open_reply *>got.body).handle):
        return False
    # A tag of its own: under the old one the server has answered already. The kernel's are even.
    (<header *>wait.message).tag |= 1
    wait.dying = wait.sent = wait.cancelled = False
    wait.undoing = True
    return True


cdef void take_wait_reply(mount_state *m, const message *got) noexcept nogil:
    """An answer of the server to something that waited."""
    cdef waiting **at
    cdef waiting *wait
    pthread_mutex_lock(&m.guard)
    at = _find_locked(m, got.head.tag)
    wait = at[0]
    if wait != NULL and not wait.orphan and _answer(m, wait, got) < 0:
        wait.orphan = wait.dying = True
    if wait != NULL and (not wait.orphan or wait.undoing or not _has_to_be_undone(wait, got)):
        _forget_locked(at)
    pthread_mutex_unlock(&m.guard)


# ---- what the server has to know ---------------------------------------------------------------------------------------

cdef bint next_wait_message(mount_state *m, uint8_t **found, size_t *size) noexcept nogil:
    """Something that the server has not been told. False: nothing. A `size` of 0: CANCEL with the tag of `found`."""
    cdef waiting *wait
    pthread_mutex_lock(&m.guard)
    wait = m.waits
    while wait != NULL and (wait.sent and (wait.cancelled or not wait.wants_out)):
        wait = wait.next
    if wait != NULL:
        found[0] = wait.message
        size[0] = 0 if wait.sent else wait.message_bytes
        wait.cancelled = wait.sent
        wait.sent = True
    pthread_mutex_unlock(&m.guard)
    return wait != NULL


cdef void ask_again(mount_state *m, bint same_session) noexcept nogil:
    """Over a fresh event channel, say everything once more. The server knows what it has answered."""
    cdef waiting **at = &m.waits
    pthread_mutex_lock(&m.guard)
    while at[0] != NULL:
        if at[0].orphan and not same_session:
            _forget_locked(at)          # whatever it was granted has ended with the session
            continue
        at[0].sent = at[0].cancelled = False
        at = &at[0].next
    pthread_mutex_unlock(&m.guard)


# ---- callers that do not want to wait any longer -------------------------------------------------------------------------

cdef int _is_over(mount_state *m, waiting *wait, int64_t now) noexcept nogil:
    """The errno that a wait is to end with although the server has not answered; 0: it goes on."""
    if load_int(&m.down) or is_given_up(m, wait.since_us, now):
        return EIO
    if wait.interrupted and fatal_signal_pending(wait.request.pid):
        return EINTR
    return 0


cdef void see_to_waits_locked(mount_state *m, int64_t now) noexcept nogil:
    """Answer those that need not wait for the server; have the others cancelled whose callers caught a signal."""
    cdef waiting *wait = m.waits
    cdef int error
    while wait != NULL:
        error = 0 if wait.orphan else _is_over(m, wait, now)
        if error:
            _answer_error(wait, error)
            wait.orphan = wait.wants_out = True
            wait.dying = error == EINTR
        elif wait.interrupted and not wait.wants_out:
            wait.wants_out = signal_wants_out(wait.request.pid)
        wait = wait.next
