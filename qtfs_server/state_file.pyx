"""The file that a session's tables lie in, mapped whole, so that they outlive the engine: /run/qtfs/sessions/ID.

Tables have the places of their largest sizes; the file is sparse. Memory is allocated before it is used, a few pages at a
time: what has been granted cannot end in a bus error. Without a directory for them tables lie in anonymous memory.

The files belong to root alone and hold the secrets of sessions. A file is of use to an engine that listens at an address
in common with its former one, since the same boot, and if what the tables look like has not changed.

Sources: mmap(2), fallocate(2), tmpfs(5).
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, strcmp, strncpy
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from qtfs_common.protocol cimport MAX_SLOTS
from qtfs_common.transport cimport now_us
from qtfs_server.descriptors cimport close_counted, descriptor_opened
from qtfs_server.includes.linux cimport LOCK_EX, LOCK_NB, O_CLOEXEC, O_CREAT, O_EXCL, O_NOFOLLOW, O_RDWR, close, \
    fallocate, flock, openat, unlinkat
from qtfs_server.session cimport MAX_DEVICES, MAX_HANDLES, MAX_NODES, MAX_SHAPES, device, handle, lock_note, node, record, \
    shape, slot

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        MAP_NORESERVE

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int, int64_t)

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct stat_t "struct stat":
        int64_t st_size
        uint32_t st_uid
    int fstat(int, stat_t *)

cdef enum:
    PAGE = 4096
    GROWTH_BYTES = 16384            # of a table at a time
    HEADER_BYTES = 8192
    MAX_TEXTS = 1 << 24
    MAX_LOCK_NOTES = 1 << 21
    VERSION = 1                     # of what the tables mean; their sizes are looked at besides

cdef struct region_shape:
    uint64_t offset
    uint64_t item_bytes
    uint64_t most

cdef region_shape _regions[REGIONS]
cdef uint64_t _file_bytes = 0
cdef uint64_t _layout = VERSION
cdef uint64_t MAGIC = 0x5154465353455353
cdef int _directory = -1            # -1: none, sessions end with the engine
cdef bint _complained = False       # under the GIL
cdef char _boot_id[40]
cdef char _listening[512]


cdef void _place(region which, uint64_t item_bytes, uint64_t most) noexcept:
    global _file_bytes, _layout
    if _file_bytes == 0:
        _file_bytes = HEADER_BYTES
    _regions[<int>which] = region_shape(_file_bytes, item_bytes, most)
    _file_bytes = (_file_bytes + item_bytes * most + PAGE - 1) // PAGE * PAGE
    _layout = (_layout * 31 + item_bytes) * 31 + most


_place(SLOTS, sizeof(slot), MAX_SLOTS)
_place(DEVICES, sizeof(device), MAX_DEVICES)
_place(SHAPES, sizeof(shape), MAX_SHAPES)
_place(RECORDS, sizeof(record), MAX_NODES)
_place(NODES, sizeof(node), MAX_NODES)
_place(HANDLES, sizeof(handle), MAX_HANDLES)
_place(TEXTS, sizeof(text_cell), MAX_TEXTS)
_place(LOCK_NOTES, sizeof(lock_note), MAX_LOCK_NOTES)


def use_directory(directory: Path | None, listening: str = "") -> None:
    """Where sessions keep their tables from now on; None: in anonymous memory.

    `listening`: the engine's addresses, a blank between each. OSError: the directory cannot be made or used.
    """
    global _directory
    if _directory >= 0:
        os.close(_directory)
        _directory = -1
    if directory is None:
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    _directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    addresses = listening.encode()
    strncpy(_boot_id, boot_id, sizeof(_boot_id) - 1)
    strncpy(_listening, addresses, sizeof(_listening) - 1)


def layout_number() -> int:
    """Of what the tables look like: an engine with another one cannot take them over."""
    return _layout


def left_sessions() -> list[str]:
    """Names of the files that engines before us left."""
    return [] if _directory < 0 else sorted(os.listdir(_directory))


def discard_session(name: str) -> None:
    """Remove a file that is of no use."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=_directory)


# ---- tables --------------------------------------------------------------------------------------------------------

cdef void *table(state_header *state, region which) noexcept nogil:
    """Where a table begins."""
    return <uint8_t *>state + _regions[<int>which].offset


cdef int grow(int fd, state_header *state, region which, uint32_t index) noexcept nogil:
    """See that there is memory for the item of an index. 0, or -ENOMEM: there is none, or the table is full."""
    cdef const region_shape *r = &_regions[<int>which]
    cdef uint64_t begin, end
    if index < state.ready[<int>which]:
        return 0
    if index >= r.most:
        return -ENOMEM
    begin = (state.ready[<int>which] * r.item_bytes) // PAGE * PAGE
    end = ((index + 1) * r.item_bytes + GROWTH_BYTES - 1) // GROWTH_BYTES * GROWTH_BYTES
    end = min(end, (r.most * r.item_bytes + PAGE - 1) // PAGE * PAGE)
    if fd >= 0 and fallocate(fd, 0, r.offset + begin, end - begin) < 0:
        return -ENOMEM
    state.ready[<int>which] = <uint32_t>min(end // r.item_bytes, r.most)
    return 0


# ---- life ----------------------------------------------------------------------------------------------------------

cdef void _name(uint64_t id, char *out) noexcept nogil:
    snprintf(out, 24, b"%016llx", <unsigned long long>id)


cdef int _create(uint64_t id) noexcept nogil:
    """An empty file of full length: a descriptor or -1."""
    cdef char name[24]
    cdef int fd
    _name(id, name)
    fd = openat(_directory, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0o600)
    if fd >= 0 and (ftruncate(fd, _file_bytes) < 0 or fallocate(fd, 0, 0, HEADER_BYTES) < 0 or
                    flock(fd, LOCK_EX | LOCK_NB) < 0):
        close(fd)
        state_remove(id)
        fd = -1
    return fd


cdef void _complain() noexcept with gil:
    """Say once that a session has no file: the directory is full, or files may not be that large (RLIMIT_FSIZE)."""
    global _complained
    if not _complained:
        _complained = True
        log.warning("no room for the files of sessions: some will end with this engine")


cdef state_header *_map(int fd) noexcept nogil:
    """Map a file whole; -1: memory that ends with us."""
    cdef int how = MAP_SHARED if fd >= 0 else MAP_PRIVATE | MAP_ANONYMOUS
    cdef void *mapped = mmap(NULL, _file_bytes, PROT_READ | PROT_WRITE, how | MAP_NORESERVE, fd, 0)
    return NULL if mapped == MAP_FAILED else <state_header *>mapped


cdef state_header *state_new(uint64_t id, const uint8_t *secret, uint32_t salt, uint32_t slots, uint32_t mount_flags,
                             const char *root, int *fd) noexcept nogil:
    """The tables of a new session, all empty but for its slots; NULL: there is no room."""
    cdef state_header *state
    fd[0] = _create(id) if _directory >= 0 else -1
    state = _map(fd[0])
    if fd[0] >= 0:
        descriptor_opened()
    elif _directory >= 0:
        _complain()
    if state == NULL or grow(fd[0], state, SLOTS, slots - 1) < 0:
        close_counted(fd[0])
        state_remove(id)
        if state != NULL:
            munmap(state, _file_bytes)
        return NULL
    state.layout = _layout
    memcpy(state.boot_id, _boot_id, sizeof(_boot_id))
    memcpy(state.listening, _listening, sizeof(_listening))
    strncpy(state.root, root, sizeof(state.root) - 1)
    state.id = id
    memcpy(state.secret, secret, sizeof(state.secret))
    state.salt = salt
    state.slots = slots
    state.mount_flags = mount_flags
    state.alive_us = now_us()
    state.magic = MAGIC
    return state


cdef void state_remove(uint64_t id) noexcept nogil:
    """Take a session's file away from engines to come; the tables stay until state_free."""
    cdef char name[24]
    _name(id, name)
    if _directory >= 0:
        unlinkat(_directory, name, 0)


cdef void state_free(state_header *state, int fd) noexcept nogil:
    """Give the memory of tables back."""
    munmap(state, _file_bytes)
    close_counted(fd)


# ---- files that are there --------------------------------------------------------------------------------------------

cdef bint _listens_there(const char *listening) noexcept:
    """Whether an engine listened at one of our addresses."""
    ours = set((<bytes>_listening).split())
    return bool(ours & set((<bytes>listening).split()))


cdef const char *_unfit(const state_header *state) noexcept nogil:
    """Why a file is of no use to us; NULL: it is."""
    cdef bint ours
    if state.magic != MAGIC or state.layout != _layout:
        return b"it is of another version"
    if strcmp(state.boot_id, _boot_id) != 0:
        return b"the machine was started again since"
    if not 1 <= state.slots <= MAX_SLOTS or state.ready[<int>SLOTS] < state.slots:
        return b"it is damaged"
    with gil:
        ours = _listens_there(state.listening)
    if ours:
        return NULL
    return b""


cdef state_header *state_open(const char *name, int *fd, const char **why) noexcept nogil:
    """Map the file that a former engine left. NULL: it is of no use, `why`; an empty one: it is another engine's."""
    cdef state_header *state = NULL
    fd[0] = openat(_directory, name, O_RDWR | O_NOFOLLOW | O_CLOEXEC)
    if fd[0] < 0:
        why[0] = b"it cannot be opened"
        return NULL
    if flock(fd[0], LOCK_EX | LOCK_NB) < 0:
        why[0] = b""
    else:
        state = state_take(fd[0], why)
    if state == NULL:
        close(fd[0])
    return state


cdef state_header *state_take(int fd, const char **why) noexcept nogil:
    """Map a locked file, whose descriptor is taken over; NULL: it is of no use, `why`, and the descriptor stays."""
    cdef stat_t st
    cdef state_header *state = NULL
    if fstat(fd, &st) < 0 or <uint64_t>st.st_size != _file_bytes:
        why[0] = b"it is of another version"
    else:
        state = _checked(_map(fd), why)
    if state != NULL:
        descriptor_opened()
    return state


cdef state_header *_checked(state_header *state, const char **why) noexcept nogil:
    """A mapped file, unless it is of no use, or NULL."""
    if state == NULL:
        why[0] = b"there is no memory"
        return NULL
    why[0] = _unfit(state)
    if why[0] != NULL:
        munmap(state, _file_bytes)
        state = NULL
    return state
