"""INTERRUPT: finding the request that it names, wherever that is.

Source: Documentation/filesystems/fuse, "Interrupting filesystem operations".
"""
from libc.errno cimport EAGAIN, EINTR, EIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free

from qtfs_client.drivers.fuse3.callers cimport caught_signal_pending, fatal_signal_pending
from qtfs_client.drivers.fuse3.device cimport write_reply
from qtfs_client.drivers.fuse3.exchange cimport ends_without, is_given_up
from qtfs_client.drivers.fuse3.made_nodes cimport interrupt_open
from qtfs_client.drivers.fuse3.replies cimport answer_from_memory_locked
from qtfs_client.drivers.fuse3.state cimport CAUGHT_SIGNAL_US, MEMORY_US, mount_state, pending_request, waiting, worker
from qtfs_client.includes.fuse_abi cimport FUSE_FLUSH, FUSE_RELEASE, FUSE_RELEASEDIR, fuse_in_header
from qtfs_client.includes.linux cimport load_int, load_u64, pthread_mutex_lock, pthread_mutex_unlock, store_u64
from qtfs_common.includes.polling cimport eventfd_write
from qtfs_common.transport cimport now_us

cdef bint _in_a_worker(mount_state *m, uint64_t target) noexcept nogil:
    cdef worker *w
    cdef uint32_t i
    for i in range(m.worker_count):
        w = m.workers[i]
        if load_u64(&w.current) == target:
            store_u64(&w.interrupted, target)
            eventfd_write(w.link.wake_fd, 1)
            return True
    return False


cdef bint _waiting(mount_state *m, uint64_t target) noexcept nogil:
    cdef waiting *wait = m.waits
    while wait != NULL:
        if wait.request.unique == target:
            wait.interrupted = True
            eventfd_write(m.event_fd, 1)
            return True
        wait = wait.next
    return False


cdef bint _set_aside(mount_state *m, pending_request *pending, uint64_t target) noexcept nogil:
    while pending != NULL:
        if (<fuse_in_header *>(pending + 1)).unique == target:
            pending.interrupted_us = now_us()
            eventfd_write(m.event_fd, 1)
            return True
        pending = pending.next
    return False


cdef void interrupt(mount_state *m, int device, uint64_t unique, uint64_t target) noexcept nogil:
    """Tell whoever holds the request `target`. `unique` is the INTERRUPT's own, `device` where it was read.

    If nobody holds it, it is either answered already, or read by a thread that has not come to note it: EAGAIN makes
    the kernel send the INTERRUPT again while the request exists. It looks among the requests of the descriptor that
    the answer comes by, so both are tried.
    """
    cdef bint found
    if m.rules != NULL and interrupt_open(m, target):
        return
    pthread_mutex_lock(&m.guard)
    found = _in_a_worker(m, target) or _waiting(m, target) or \
        _set_aside(m, m.pending, target) or _set_aside(m, m.delayed, target)
    pthread_mutex_unlock(&m.guard)
    if not found and write_reply(m.device, unique, -EAGAIN, NULL, 0, NULL, 0) < 0 and m.triage_device >= 0:
        write_reply(m.triage_device, unique, -EAGAIN, NULL, 0, NULL, 0)


# ---- requests that were set aside --------------------------------------------------------------------------------------

cdef bint _must_arrive(uint32_t opcode) noexcept nogil:
    """Whether the server has to be told even if the kernel was answered."""
    return opcode in (FUSE_FLUSH, FUSE_RELEASE, FUSE_RELEASEDIR)


cdef int _early_error(mount_state *m, pending_request *pending, int64_t now) noexcept nogil:
    """What a request that no worker has taken yet is to be answered by now; 0: nothing, it goes on waiting."""
    cdef fuse_in_header *request = <fuse_in_header *>(pending + 1)
    if load_int(&m.down) or is_given_up(m, pending.since_us, now):
        return EIO
    if request.opcode in (FUSE_RELEASE, FUSE_RELEASEDIR):
        return EIO                      # nobody waits for it, and the kernel has only so many of them under way
    if request.opcode == FUSE_FLUSH and ends_without(m, request.pid, pending.since_us, now):
        return EINTR
    if pending.interrupted_us > 0 and (fatal_signal_pending(request.pid) or
                                       now - pending.interrupted_us > CAUGHT_SIGNAL_US and
                                       caught_signal_pending(request.pid)):
        return EINTR
    return 0


cdef bint _answer_early_locked(mount_state *m, pending_request *pending, int64_t now) noexcept nogil:
    """Whether a request that was set aside is answered now."""
    cdef fuse_in_header *request = <fuse_in_header *>(pending + 1)
    cdef int error = _early_error(m, pending, now)
    if error != 0:
        write_reply(pending.device, request.unique, -error, NULL, 0, NULL, 0)
        return True
    return now - pending.since_us > MEMORY_US and answer_from_memory_locked(m, pending.device, request)


cdef void answer_pending_locked(mount_state *m, int64_t now) noexcept nogil:
    """Answer what need not wait for a worker any longer: the server has not begun it, so there is nothing to undo.

    What must arrive stays, but takes nobody's place: as much of it can come as there are open files.
    """
    m.pending_end = _answer_some_locked(m, &m.pending, now)
    _answer_some_locked(m, &m.delayed, now)


cdef pending_request **_answer_some_locked(mount_state *m, pending_request **at, int64_t now) noexcept nogil:
    """Of one list, whose end it returns."""
    cdef pending_request *pending
    while at[0] != NULL:
        pending = at[0]
        if pending.answered or not _answer_early_locked(m, pending, now):
            at = &pending.next
            continue
        m.pending_count -= 1
        m.pending_bytes -= pending.size
        pending.answered = _must_arrive((<fuse_in_header *>(pending + 1)).opcode)
        if pending.answered:
            at = &pending.next
            continue
        at[0] = pending.next
        free(pending)
    return at
