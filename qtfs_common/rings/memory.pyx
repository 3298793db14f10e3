"""Mapping a BAR or a file that the other side maps too; the engine lays it out, a client finds its way in it.

Sources: Documentation/PCI/sysfs-pci.rst, mmap(2), sigaction(2).
"""
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qtfs_common.rings.layout cimport RING_LINE_BYTES, RING_LINES_AT, RING_MAGIC, RING_VERSION, ring_control, \
    ring_line

import mmap
import os

from qtfs_common.rings.geometry import Geometry

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
    void *MAP_FAILED
    void *c_mmap "mmap"(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)

cdef extern from "<sys/vfs.h>" nogil:
    ctypedef struct statfs_t "struct statfs":
        long f_type
    int fstatfs(int, statfs_t *)

cdef extern from "<linux/magic.h>" nogil:
    enum:
        SYSFS_MAGIC

cdef extern from "qtfs_common/rings/bus_error.h" nogil:
    int bus_watch(void *, size_t, int32_t *)
    void bus_unwatch(int)

cdef extern from * nogil:
    int load_int "__atomic_load_n"(const int32_t *, int)
    void store_int "__atomic_store_n"(int32_t *, int32_t, int)
    bint swap_word "__atomic_compare_exchange_n"(uint64_t *, uint64_t *, uint64_t, bint, int, int)
    enum:
        __ATOMIC_ACQUIRE
        __ATOMIC_ACQ_REL
        __ATOMIC_RELEASE


# ---- where things lie ------------------------------------------------------------------------------------------------

cdef ring_control *control(const ring_memory *m) noexcept nogil:
    return <ring_control *>m.base


cdef ring_line *client_line(const ring_memory *m, uint32_t channel) noexcept nogil:
    return <ring_line *>(m.base + RING_LINES_AT + 2 * channel * RING_LINE_BYTES)


cdef ring_line *engine_line(const ring_memory *m, uint32_t channel) noexcept nogil:
    return <ring_line *>(m.base + RING_LINES_AT + (2 * channel + 1) * RING_LINE_BYTES)


cdef uint8_t *request_area(const ring_memory *m, uint32_t channel) noexcept nogil:
    return m.base + m.areas_at + channel * (m.request_bytes + m.reply_bytes)


cdef uint8_t *reply_area(const ring_memory *m, uint32_t channel) noexcept nogil:
    return request_area(m, channel) + m.request_bytes


cdef bint is_lost(const ring_memory *m) noexcept nogil:
    return load_int(&m.lost, __ATOMIC_ACQUIRE) != 0


cdef bint is_laid_out(const ring_memory *m) noexcept nogil:
    """Whether the areas lie where we know them, and always have since we do."""
    return ring_load(&control(m).layouts) == m.layouts


cdef bint is_same_engine(const ring_memory *m) noexcept nogil:
    """Whether nobody else has laid it out since."""
    return ring_load(&control(m).instance) == m.instance


# ---- for Python ------------------------------------------------------------------------------------------------------

cdef class RingMemory:
    """The mapping. What is in it must not be used before `lay_out` or `read_layout`; it lasts as long as the object."""

    def __cinit__(self):
        memset(&self.m, 0, sizeof(self.m))
        self.region = -1

    def __init__(self, int fd) -> None:
        """Map the whole of a file or BAR; the descriptor stays the caller's. Raises OSError."""
        cdef statfs_t where
        cdef size_t size = os.fstat(fd).st_size & ~(<size_t>mmap.PAGESIZE - 1)
        cdef void *base = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if base == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.m.base = <uint8_t *>base
        self.m.has_pages = fstatfs(fd, &where) == 0 and where.f_type != SYSFS_MAGIC
        self.m.bytes = size
        self.region = bus_watch(base, size, &self.m.lost)
        if self.region < 0:
            raise OSError("too many mappings of shared memory")

    def __dealloc__(self):
        if self.region >= 0:
            bus_unwatch(self.region)
        if self.m.base != NULL:
            munmap(self.m.base, self.m.bytes)

    @property
    def size(self) -> int:
        """Bytes that are mapped."""
        return self.m.bytes

    @property
    def lost(self) -> bool:
        """Whether the memory was taken away, and this is something else now."""
        return is_lost(&self.m)

    @property
    def users(self) -> int:
        """Channels that work in it."""
        return self.m.users

    @property
    def channels(self) -> int:
        """How many it is laid out for."""
        return self.m.channels

    @property
    def instance(self) -> int:
        """Of the engine that laid it out."""
        return self.m.instance

    def is_served(self, uint32_t channel) -> bool:
        """Whether the engine serves a claim of that channel."""
        return ring_load(&engine_line(&self.m, channel).epoch) != 0

    def tidy(self) -> None:
        """As the engine: no channel seems to be served that nobody serves, whoever wrote that into the memory."""
        cdef uint32_t channel
        cdef uint64_t epoch
        cdef uint64_t *at
        for channel in range(self.m.channels):
            at = &engine_line(&self.m, channel).epoch
            epoch = ring_load(at)
            if epoch != 0 and load_int(&self.m.served[channel], __ATOMIC_ACQUIRE) == 0:
                # A worker that takes the channel up at this moment writes another epoch.
                swap_word(at, &epoch, 0, False, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)

    def owner(self) -> tuple[int, int, int, bytes]:
        """(magic, version, instance, boot id) as they stand there now."""
        cdef ring_control *c = control(&self.m)
        return c.magic, c.version, ring_load(&c.instance), c.boot[:16]

    @property
    def is_ours(self) -> bool:
        """As the engine: whether nobody else has laid it out, or spoilt what stands in front."""
        cdef ring_control *c = control(&self.m)
        return c.magic == RING_MAGIC and ring_load(&c.instance) == self.m.instance

    def give_up(self) -> None:
        """Take it for lost: whoever works in it ends."""
        store_int(&self.m.lost, 1, __ATOMIC_RELEASE)

    def pulse(self) -> int:
        """The engine's beat."""
        return ring_load(&control(&self.m).beat)

    def _adopt(self, geometry) -> None:
        self.m.channels = geometry.channels
        self.m.request_bytes = geometry.request_bytes
        self.m.reply_bytes = geometry.reply_bytes
        self.m.areas_at = geometry.areas_at

    def lay_out(self, geometry, uint64_t instance, bytes boot not None) -> None:
        """As the engine: write the control block and the engine's lines. `boot`: 16 bytes. Raises ValueError."""
        cdef ring_control *c = control(&self.m)
        cdef uint32_t channel
        geometry.check(self.m.bytes)
        ring_publish(&c.instance, 0)
        if (c.channels, c.request_bytes, c.reply_bytes, c.areas_at) != \
                (geometry.channels, geometry.request_bytes, geometry.reply_bytes, geometry.areas_at):
            ring_publish(&c.layouts, c.layouts + 1)
        self._adopt(geometry)
        self.m.layouts = c.layouts
        for channel in range(self.m.channels):
            memset(engine_line(&self.m, channel), 0, sizeof(ring_line))
        c.version = RING_VERSION
        c.channels = geometry.channels
        c.request_bytes = geometry.request_bytes
        c.reply_bytes = geometry.reply_bytes
        c.areas_at = geometry.areas_at
        c.total_bytes = geometry.total_bytes
        memcpy(c.boot, <const char *>boot, 16)
        ring_publish(&c.magic, RING_MAGIC)
        self.m.instance = instance
        ring_publish(&c.instance, instance)

    def leave(self) -> None:
        """As the engine: say that nobody serves here any more."""
        ring_publish(&control(&self.m).instance, 0)

    def read_layout(self) -> Geometry:
        """As a client: take the layout over, once and for all. Raises ValueError: it does not fit the memory."""
        cdef ring_control copy = control(&self.m)[0]
        geometry = Geometry(copy.channels, copy.request_bytes, copy.reply_bytes)
        geometry.check(self.m.bytes)
        if copy.areas_at != geometry.areas_at:
            raise ValueError("the areas do not lie where they should")
        self._adopt(geometry)
        self.m.layouts = copy.layouts
        self.m.instance = copy.instance
        return geometry
