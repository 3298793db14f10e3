"""Requests that the engine before us may have carried out: what is noted before an effect, and what it tells afterwards.

An engine that is killed in a system call has had its effect or not, and nobody learned which. So what was there before is
noted with the slot, outside its memory. When the request comes again it is compared with what is there now: a directory
that was not there before MKDIR and is there now is the one that was made. In doubt are only names and bytes that somebody
else changed in the same way between the note and the death of the engine.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

from qtfs_server.attributes cimport stat_fd, stat_name
from qtfs_server.includes.linux cimport AT_FDCWD, O_CLOEXEC, O_RDONLY, S_IFMT, close, getxattr, openat, pread, statx_t, written
from qtfs_server.descriptors cimport proc_path
from qtfs_server.request cimport SCRATCH_BYTES, request

cdef extern from "<string.h>" nogil:
    void *memmem(const void *, size_t, const void *, size_t)


cdef bint may_be_done(const request *r) noexcept nogil:
    """Whether the engine before us may have had the request's effect."""
    return r.resumed and r.before.known


# ---- notes -------------------------------------------------------------------------------------------------------------

cdef uint64_t _ino(int directory, const char *name) noexcept nogil:
    cdef statx_t st
    return st.stx_ino if stat_name(directory, name, &st) == 0 else 0


cdef uint64_t _size(int fd) noexcept nogil:
    cdef statx_t st
    return st.stx_size if stat_fd(fd, &st) == 0 else 0


cdef void note_name(request *r, int directory, const char *name) noexcept nogil:
    """What a name leads to, before it is made or removed."""
    if r.before == NULL or may_be_done(r):
        return
    r.before.ino = _ino(directory, name)
    written()
    r.before.known = True


cdef void note_names(request *r, int directory, const char *name, int new_directory, const char *new_name) noexcept nogil:
    """What two names lead to, before a RENAME."""
    if r.before == NULL or may_be_done(r):
        return
    r.before.other_ino = _ino(new_directory, new_name)
    note_name(r, directory, name)


cdef void note_size(request *r, int fd) noexcept nogil:
    """How long a file is, before it is appended to."""
    if r.before == NULL or may_be_done(r):
        return
    r.before.size = _size(fd)
    written()
    r.before.known = True


cdef void note_attribute(request *r, const char *path, const char *name) noexcept nogil:
    """Whether there is an extended attribute, before it is made or removed."""
    if r.before == NULL or may_be_done(r):
        return
    r.before.ino = getxattr(path, name, NULL, 0) >= 0
    written()
    r.before.known = True


# ---- conclusions -------------------------------------------------------------------------------------------------------

cdef bint was_made(const request *r, int directory, const char *name, uint32_t type, uint64_t ino) noexcept nogil:
    """Whether a name, of that type (S_IFMT bits) and inode (0: any), has come since the request was begun."""
    cdef statx_t st
    if not may_be_done(r) or r.before.ino != 0 or stat_name(directory, name, &st) < 0:
        return False
    return (st.stx_mode & S_IFMT) == type and (ino == 0 or st.stx_ino == ino)


cdef bint was_removed(const request *r, int directory, const char *name) noexcept nogil:
    """Whether what the name led to then is gone from there."""
    return may_be_done(r) and r.before.ino != 0 and _ino(directory, name) != r.before.ino


cdef bint was_renamed(const request *r, int directory, const char *name, int new_directory, const char *new_name,
                      bint exchanged) noexcept nogil:
    """Whether the new name leads to what the old one did then."""
    if not may_be_done(r) or r.before.ino == 0 or _ino(new_directory, new_name) != r.before.ino:
        return False
    return _ino(directory, name) == r.before.other_ino if exchanged else _ino(directory, name) != r.before.ino


cdef size_t _appended(const request *r, int fd, const uint8_t *data, size_t size) noexcept nogil:
    """How much of the data a readable descriptor shows behind the former end of the file."""
    cdef ssize_t got = pread(fd, r.scratch, SCRATCH_BYTES, r.before.size)
    cdef size_t at = 0
    if got > 0 and size <= <size_t>got and memmem(r.scratch, got, data, size) != NULL:
        return size                 # perhaps behind what others appended
    while got > 0 and at < size:    # too long for that, or a part of it: a killed write(2) may stop between pages
        if memcmp(r.scratch, data + at, min(<size_t>got, size - at)) != 0:
            return 0
        at += min(<size_t>got, size - at)
        got = pread(fd, r.scratch, SCRATCH_BYTES, r.before.size + at)
    return at


cdef size_t was_appended(const request *r, int fd, const uint8_t *data, size_t size) noexcept nogil:
    """How many bytes of the data are at the end of the file already."""
    cdef char link[32]
    cdef size_t found = 0
    cdef int readable
    if not may_be_done(r) or _size(fd) == r.before.size:
        return 0
    proc_path(link, fd)
    readable = openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC)
    if readable >= 0:
        found = _appended(r, readable, data, size)
        close(readable)
    return found
