"""What hangs on the server does not take the whole mount.

The engine begins only a few requests in a file system that is stuck. The others it answers ERROR_DELAYED, without having
done anything: then the worker puts the request off, here, and is free. It is tried again after a while, by whoever is.

Before the engine knows, every worker may have begun one that hangs. While all workers wait and the engine still answers
PING, so that it is not the engine that is slow, one more worker after the other is started, beyond `threads`.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from qtfs_client.drivers.fuse3.placing cimport bring_home
from qtfs_client.drivers.fuse3.state cimport LINK_UP, PENDING_BYTES, PENDING_REQUESTS, mount_state, pending_request, worker
from qtfs_client.includes.linux cimport load_i64, load_int, load_u64, pthread_mutex_lock, pthread_mutex_unlock, \
    store_u64
from qtfs_common.includes.polling cimport eventfd_write
from qtfs_common.transport cimport now_us

cdef enum:
    FIRST_DELAY_US = 50000          # until a request is tried again, doubled each time
    LAST_DELAY_US = 1000000
    PATIENCE_US = 250000            # all workers wait for that long: another one is started


# ---- putting off -------------------------------------------------------------------------------------------------------

cdef bint put_off(worker *w) noexcept nogil:
    """Take over a worker's request; False if too many have been set aside."""
    cdef mount_state *m = w.mount
    cdef int64_t now = now_us()
    cdef size_t size = w.request.len
    cdef pending_request *kept = NULL
    bring_home(w)
    if not w.data_lost:
        kept = <pending_request *>malloc(sizeof(pending_request) + size)
    if kept == NULL:
        return False
    memcpy(kept + 1, w.buffer, size)
    kept.size = size
    kept.device = w.device
    kept.answered = w.answered
    kept.since_us = w.since_us
    kept.delay_us = min(2 * w.delay_us, <int64_t>LAST_DELAY_US) if w.delay_us > 0 else FIRST_DELAY_US
    kept.due_us = now + kept.delay_us
    pthread_mutex_lock(&m.guard)
    # What is answered counts no more: as much of it can come as there are open files.
    if not kept.answered and (m.pending_count >= PENDING_REQUESTS or m.pending_bytes >= PENDING_BYTES):
        pthread_mutex_unlock(&m.guard)
        free(kept)
        return False
    # Together with the list, so that an INTERRUPT finds the request in one place or the other.
    kept.interrupted_us = w.interrupted_us
    if kept.interrupted_us == 0 and load_u64(&w.interrupted) == w.request.unique:
        kept.interrupted_us = now
    store_u64(&w.current, 0)
    kept.next = m.delayed
    m.delayed = kept
    if not kept.answered:
        m.pending_count += 1
        m.pending_bytes += size
    pthread_mutex_unlock(&m.guard)
    eventfd_write(m.event_fd, 1)
    return True


cdef int64_t bring_back_locked(mount_state *m, int64_t now) noexcept nogil:
    """Give workers what is due to be tried again. When the next is, or 0."""
    cdef pending_request **at = &m.delayed
    cdef pending_request *found
    cdef int64_t next_us = 0
    cdef bint some = False
    while at[0] != NULL:
        found = at[0]
        if found.due_us > now:
            next_us = min(next_us, found.due_us) if next_us > 0 else found.due_us
            at = &found.next
            continue
        at[0] = found.next
        found.next = NULL
        m.pending_end[0] = found
        m.pending_end = &found.next
        some = True
    if some:
        _have_taken_locked(m)
    return next_us


cdef void _have_taken_locked(mount_state *m) noexcept nogil:
    """See that a worker looks at what was set aside: one that sleeps does not."""
    cdef worker *w = m.parked
    if w != NULL:
        m.parked = w.next_parked
        w.parked = False
        m.coming += 1
        eventfd_write(w.link.wake_fd, 1)
    elif m.reader != NULL:
        eventfd_write(m.reader.link.wake_fd, 1)


# ---- more workers ------------------------------------------------------------------------------------------------------

cdef void _start_locked(mount_state *m) noexcept nogil:
    """Have one more worker, beyond `threads` if need be."""
    if m.starting or m.worker_count >= m.most_workers:
        return
    m.worker_limit = max(m.worker_limit, m.worker_count + 1)
    m.starting = True
    eventfd_write(m.manager_fd, 1)


cdef uint64_t _what_all_wait_for_locked(mount_state *m) noexcept nogil:
    """A mark of the requests that the workers have; 0: some worker has none."""
    cdef uint64_t mark = m.worker_count, current
    cdef uint32_t i
    if m.idle + m.coming > 0 or m.parked != NULL:
        return 0
    for i in range(m.worker_count):
        current = load_u64(&m.workers[i].current)
        if load_int(&m.workers[i].link.link) != LINK_UP:
            return 0                # it is the connection, or the engine
        mark = mark * 31 + current
    return mark


cdef void see_to_crew(mount_state *m, int64_t now) noexcept nogil:
    """Start a worker if all have waited for long, and the engine has answered a PING since."""
    cdef uint64_t mark
    pthread_mutex_lock(&m.guard)
    mark = _what_all_wait_for_locked(m) if m.saturated and m.worker_count < m.most_workers else 0
    if mark == 0 or mark != m.waited_for:
        m.waited_for = mark
        m.waiting_since_us = now if mark != 0 else 0
    elif now - m.waiting_since_us > PATIENCE_US and now - load_i64(&m.silent_us) > m.waiting_since_us:
        m.waiting_since_us = now
        _start_locked(m)
    elif now - m.waiting_since_us > PATIENCE_US // 2 and m.pinged_us < m.waiting_since_us:
        m.pinged_us = 0             # the next one is due now
    pthread_mutex_unlock(&m.guard)
