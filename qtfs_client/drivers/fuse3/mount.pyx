"""`Mount`: the state of one mount as Python sees it. What is per-request is not here."""
from libc.errno cimport EPROTONOSUPPORT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from qtfs_client.drivers.fuse3.callers cimport callers_can_be_seen
from qtfs_client.drivers.fuse3.device cimport clone_device, negotiate
from qtfs_client.drivers.fuse3.events cimport watch
from qtfs_client.drivers.fuse3.exchange cimport stop
from qtfs_client.drivers.fuse3.notices cimport expire_name_apart
from qtfs_client.drivers.fuse3.special cimport SpecialRules
from qtfs_client.drivers.fuse3.state cimport BUFFER_BYTES, CACHE_ALWAYS, CACHE_AUTO, CACHE_NONE, FORGETS_AT_ONCE, \
    LINK_LOST, LINK_READY, LINK_UP, REQUEST_PAYLOAD, line, mount_change, mount_state, pending_request, waiting, \
    worker
from qtfs_client.drivers.fuse3.waits cimport free_waits
from qtfs_client.drivers.fuse3.workers cimport work
from qtfs_client.includes.fuse_abi cimport fuse_in_header, fuse_write_in
from qtfs_client.includes.linux cimport close, load_int, load_u64, posix_memalign, pthread_mutex_destroy, \
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, store_int
from qtfs_common.includes.polling cimport EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, POLLERR, POLLIN, epoll_create1, eventfd, \
    eventfd_write, poll, pollfd
from qtfs_common.pipes cimport pipe_drop
from qtfs_common.protocol cimport MAX_SLOTS, forget_item
from qtfs_common.transport cimport Connection

import os

from qtfs_client.drivers.mounting import close_under

cdef enum:
    PAGE_BYTES = 4096
    DAY_S = 86400

_CACHES = {"none": CACHE_NONE, "auto": CACHE_AUTO, "always": CACHE_ALWAYS}

#: What stands for the event channel where lines are named by their slot.
EVENT_LINE = -1


cdef worker *_worker_new(mount_state *m, uint32_t slot) noexcept:
    """A worker with its buffers, or NULL. Pages of the buffers that are never used cost nothing.

    The first two, which hold all but data, are there from the start: the kernel would find them for a request that it
    hands over, but not for a process that is being killed, and the caller would get EIO instead of ECONNABORTED
    (fuse_dev_do_read in fs/fuse/dev.c, __get_user_pages in mm/gup.c).
    """
    cdef worker *w = <worker *>calloc(1, sizeof(worker))
    if w == NULL:
        return NULL
    w.mount = m
    w.slot = slot
    w.spin_credit = w.look_credit = 1
    w.link.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    w.forgotten = <forget_item *>malloc(FORGETS_AT_ONCE * sizeof(forget_item))
    if w.link.wake_fd < 0 or w.forgotten == NULL or posix_memalign(<void **>&w.memory, PAGE_BYTES, BUFFER_BYTES + PAGE_BYTES) != 0:
        _worker_free(w)
        return NULL
    w.buffer = w.memory + PAGE_BYTES - sizeof(fuse_in_header) - sizeof(fuse_write_in)
    memset(w.buffer, 0, PAGE_BYTES)
    w.request = <fuse_in_header *>w.buffer
    w.argument = w.buffer + sizeof(fuse_in_header)
    return w


cdef void _worker_free(worker *w) noexcept:
    if w.link.wake_fd >= 0:
        close(w.link.wake_fd)
    pipe_drop(&w.pipe)
    free(w.forgotten)
    free(w.memory)
    free(w)


cdef struct mount_figures:          # as doc/control.md has them
    uint64_t workers
    uint64_t requests
    uint64_t lookups
    uint64_t forgotten
    uint64_t forgets_unsent
    uint64_t invalidations
    uint64_t placed
    uint64_t piped
    uint64_t pending
    uint64_t waits
    uint64_t orphans


cdef void _look(mount_state *m, mount_figures *out) noexcept nogil:
    """Without the GIL: whoever holds it may wait for the guard."""
    cdef waiting *wait
    cdef uint32_t i
    memset(out, 0, sizeof(out[0]))
    out.invalidations = load_u64(&m.invalidations)
    pthread_mutex_lock(&m.guard)
    out.workers = m.worker_count
    for i in range(m.worker_count):
        out.requests += m.workers[i].requests
        out.lookups += m.workers[i].lookups
        out.placed += m.workers[i].data_placed
        out.piped += m.workers[i].data_piped
    out.forgotten = m.forgotten
    out.forgets_unsent = m.forget_count
    out.pending = m.pending_count
    wait = m.waits
    while wait != NULL:
        out.waits += 1
        out.orphans += wait.orphan
        wait = wait.next
    pthread_mutex_unlock(&m.guard)


cdef class Mount:
    """Serves the requests of a FUSE device. Every thread that runs in it must have returned before it is dropped."""
    cdef mount_state m
    cdef SpecialRules rules
    cdef object __weakref__
    cdef dict connections               # slot or EVENT_LINE: Connection; they own what the lines point to

    def __cinit__(self):
        memset(&self.m, 0, sizeof(self.m))
        self.m.device = self.m.triage_device = -1
        self.m.event_fd = self.m.manager_fd = self.m.changes_fd = self.m.bell = -1
        self.m.pending_end = &self.m.pending
        self.m.changes_end = &self.m.changes
        self.m.event.link = LINK_LOST
        pthread_mutex_init(&self.m.guard, NULL)

    def __init__(self, int device, *, str cache="auto", int channels=16, int spare_channels=0, double timeout_s=30.0,
                 int spin_us=200, uint32_t max_payload=REQUEST_PAYLOAD, bint neighbour=False, owner: int | None = None,
                 bint special_remote=True, bint polls=True, SpecialRules rules=None):
        """Take over a mounted /dev/fuse descriptor.

        `spare_channels`: how many more there may be while the others hang.
        `max_payload`: bytes of the longest READ or WRITE. `neighbour`: the engine runs on this machine.
        `owner`: the only user besides root who is let in.
        `special_remote`: FIFOs and devices are opened on the server, where the kernel tells who wants to open. `polls`:
        the kernel may ask what is ready. `rules`: for what lies below the source, of this mount alone.
        """
        self.connections = {}
        self.rules = rules
        if rules is not None:
            rules.attach(&self.m, self)
        self.m.device = device
        self.m.cache = _CACHES[cache]
        self.m.name_valid_s = {"none": 0, "auto": 1, "always": DAY_S}[cache]
        self.m.absent_valid_s = DAY_S if cache == "always" else 0
        self.m.worker_limit = min(channels, MAX_SLOTS)
        self.m.most_workers = min(channels + spare_channels, MAX_SLOTS)
        self.m.timeout_us = <int64_t>(timeout_s * 1e6)
        self.m.spin_us = spin_us
        self.m.max_payload = min(max_payload, <uint32_t>REQUEST_PAYLOAD)
        self.m.crew = max(1, len(os.sched_getaffinity(0)) // (4 if neighbour else 2))
        self.m.deny_others = owner is not None
        self.m.owner = owner or 0
        self.m.special_remote = special_remote and callers_can_be_seen()
        self.m.polls = polls
        self.m.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.m.manager_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.m.changes_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.m.bell = epoll_create1(EPOLL_CLOEXEC)
        if min(self.m.event_fd, self.m.manager_fd, self.m.changes_fd, self.m.bell) < 0:
            raise OSError("no descriptors are left")
        self.m.triage_buffer = <uint8_t *>malloc(BUFFER_BYTES)
        if self.m.triage_buffer == NULL:
            raise MemoryError

    def __dealloc__(self):
        self._free_lists()
        for slot in range(self.m.worker_count):
            _worker_free(self.m.workers[slot])
        free(self.m.triage_buffer)
        for fd in (self.m.device, self.m.triage_device, self.m.event_fd, self.m.manager_fd, self.m.changes_fd,
                   self.m.bell):
            if fd >= 0:
                close(fd)
        pthread_mutex_destroy(&self.m.guard)

    cdef void _free_lists(self) noexcept:
        cdef pending_request *pending
        cdef mount_change *change = self.m.changes
        self.m.pending_end[0] = self.m.delayed
        pending = self.m.pending
        while pending != NULL:
            self.m.pending = pending.next
            free(pending)
            pending = self.m.pending
        while change != NULL:
            self.m.changes = change.next
            free(change)
            change = self.m.changes
        free_waits(&self.m)
        free(self.m.forgets)
        self.m.forgets = NULL

    def negotiate(self) -> bool:
        """Answer the kernel's INIT; False if the file system was unmounted meanwhile. Raises OSError.

        EPROTONOSUPPORT: the kernel speaks a protocol older than FUSE 7.31 (Linux 5.4 has that).
        """
        cdef int status
        with nogil:
            status = negotiate(&self.m)
        if status == -EPROTONOSUPPORT:
            raise OSError(EPROTONOSUPPORT, "this kernel's FUSE is too old")
        if status < 0:
            return False
        self.m.triage_device = clone_device(self.m.device)
        return True

    @property
    def has_triage(self) -> bool:
        """Whether interrupts are seen while every worker is busy."""
        return self.m.triage_device >= 0

    @property
    def special_remote(self) -> bool:
        """Whether opening a FIFO or device of the server opens it there."""
        return self.m.special_remote

    # ---- lines ----

    cdef line *_line(self, int slot) noexcept:
        return &self.m.event if slot == EVENT_LINE else &self.m.workers[slot].link

    def add_worker(self, Connection connection not None, uint32_t epoch, uint64_t last_sequence=0) -> int:
        """Make one more worker, on a connection that is attached as the next slot; a thread then runs it."""
        cdef uint32_t slot = self.m.worker_count
        cdef worker *w = _worker_new(&self.m, slot)
        if w == NULL:
            raise MemoryError
        w.link.ch = &connection.ch
        w.link.epoch = epoch
        w.sequence = last_sequence
        self.connections[slot] = connection
        pthread_mutex_lock(&self.m.guard)
        self.m.workers[slot] = w
        self.m.worker_count += 1
        self.m.starting = False
        pthread_mutex_unlock(&self.m.guard)
        return slot

    def deliver(self, int slot, Connection connection not None, uint32_t epoch, uint64_t last_sequence) -> bool:
        """Replace the lost channel of a slot, or of EVENT_LINE; False if that had none before."""
        cdef line *link = self._line(slot)
        old = self.connections.get(slot)
        link.fresh = &connection.ch
        link.fresh_sequence = last_sequence
        link.fresh_epoch = epoch
        self.connections[slot] = connection
        store_int(&link.link, LINK_READY)
        eventfd_write(self.m.event_fd if slot == EVENT_LINE else link.wake_fd, 1)
        if old is not None:
            old.close()
        return old is not None

    def lost(self) -> list[int]:
        """Slots whose channels broke, and EVENT_LINE, which comes first."""
        return [slot for slot in range(EVENT_LINE, <int>self.m.worker_count)
                if load_int(&self._line(slot).link) == LINK_LOST]

    def detached_event_channel(self) -> Connection | None:
        """The event channel, once the mount has ended, if it still stands."""
        return self.connections.get(EVENT_LINE) if load_int(&self.m.event.link) == LINK_UP else None

    # ---- for the manager ----

    @property
    def wants_worker(self) -> bool:
        """Whether all workers are busy, and there may be more."""
        return self.m.starting

    @property
    def worker_count(self) -> int:
        """Workers that were made."""
        return self.m.worker_count

    def worker_failed(self) -> None:
        """No worker could be made; it will be asked for again."""
        pthread_mutex_lock(&self.m.guard)
        self.m.starting = False
        pthread_mutex_unlock(&self.m.guard)

    def set_down(self, bint down) -> None:
        """Whether the server is out of reach: then whatever has no channel fails at once."""
        store_int(&self.m.down, down)
        for slot in range(self.m.worker_count):
            eventfd_write(self.m.workers[slot].link.wake_fd, 1)
        eventfd_write(self.m.event_fd, 1)

    def wait(self, double timeout_s, int signals=-1) -> None:
        """Sleep until a channel breaks, a worker is wanted, the mount ends, or the descriptor `signals` has something.

        Both descriptors are read empty. `timeout_s` below 0: no timeout.
        """
        cdef pollfd fds[2]
        cdef int timeout_ms = <int>(timeout_s * 1000) if timeout_s >= 0 else -1
        fds[0].fd = self.m.manager_fd
        fds[1].fd = signals
        fds[0].events = fds[1].events = POLLIN
        with nogil:
            poll(fds, 2, timeout_ms)
        for fd in (self.m.manager_fd, signals):
            try:
                if fd >= 0:
                    os.read(fd, 4096)
            except BlockingIOError:
                pass

    @property
    def stopping(self) -> bool:
        """Whether the mount has ended."""
        return load_int(&self.m.stopping) != 0

    def figures(self) -> dict[str, int]:
        """Counters since the start, and what waits now: see doc/control.md."""
        cdef mount_figures found
        with nogil:
            _look(&self.m, &found)
        return found

    # ---- the server's mounts ----

    @property
    def device_fd(self) -> int:
        """/dev/fuse: readable when the kernel asks for something, in error once the mount has ended."""
        return self.m.device

    @property
    def has_ended(self) -> bool:
        """Whether the kernel has ended the file system: then it is mounted nowhere."""
        cdef pollfd device
        device.fd = self.m.device
        device.events = 0
        return poll(&device, 1, 0) == 1 and device.revents & POLLERR != 0

    @property
    def changes_fd(self) -> int:
        """Becomes readable when `take_changes` has something."""
        return self.m.changes_fd

    def take_changes(self) -> list[bytes]:
        """Bodies of the MOUNTS_CHANGED that came since the last call; an empty one may stand for any that did not."""
        cdef mount_change *change
        cdef mount_change *following
        cdef list bodies = []
        try:
            os.read(self.m.changes_fd, 8)
        except BlockingIOError:
            pass
        pthread_mutex_lock(&self.m.guard)
        change = self.m.changes
        self.m.changes = NULL
        self.m.changes_end = &self.m.changes
        self.m.change_count = 0
        pthread_mutex_unlock(&self.m.guard)
        while change != NULL:
            following = change.next
            bodies.append((<char *>(change + 1))[:change.size])
            free(change)
            change = following
        return bodies

    def expire_name(self, uint64_t directory, bytes name not None) -> None:
        """Make the kernel look a name up again before it trusts it. It waits for what is under way in the directory.

        Not from a thread that serves requests.
        """
        cdef const char *text = name
        cdef size_t name_bytes = len(name)
        with nogil:
            expire_name_apart(&self.m, directory, text, name_bytes)

    def disconnect(self) -> None:
        """Give the device up, once no thread serves it: whoever waits for it in the kernel gets ECONNABORTED."""
        for fd in (self.m.device, self.m.triage_device):
            if fd >= 0:
                close_under(fd)

    # ---- threads ----

    def run_worker(self, uint32_t slot) -> None:
        """Serve requests until the mount ends."""
        cdef worker *w = self.m.workers[slot]
        with nogil:
            work(w)

    def run_events(self) -> None:
        """Serve the event channel until the mount ends."""
        with nogil:
            watch(&self.m)

    def stop(self) -> None:
        """End every thread."""
        with nogil:
            stop(&self.m)
